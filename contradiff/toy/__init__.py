"""The embedded default: images, digits and a base model that need no download.

Read `objects` (shapes), `classes` (what each class looks like), `render` (one image) and `tree` (a
folder of images); `digits` (the other data set) and `rendered` (where both are written); then
`base_recipe`, which trains the tiny base model on rendered images. The room may import `training`,
`method`, `data` and `files`.
"""
