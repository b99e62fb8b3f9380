"""The embedded default: images, digits and a base model that need no download.

Read `colours`, `outlines` and `objects` (shapes), `classes` (what each class looks like), `render`
(one image), `tree` (a folder of images); then `base_recipe`, which trains the tiny base model on
them. The room may import `training`, `method` and `files`.
"""
