"""The embedded default: images, digits and a base model that need no download.

Read `objects` (shapes), `classes` (what each class looks like), `render` (one image), `tree` (a
folder of images), `digits` (the second data set), `rendered` (where both are written) and
`base_recipe` (training of the tiny base model), in this order. These modules may import `training`,
`method`, `data` and `files`.
"""
