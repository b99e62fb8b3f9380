"""The embedded default: images, digits and a base model that need no download.

Read in this order: `objects` (shapes), `classes` (what each class looks like), `render` (one
image), `tree` (a folder of images), `digits` (the other data set), `rendered` (where both are
written), and `base_recipe`, which trains the tiny base model on rendered images. This package may
import `training`, `method`, `data` and `files`.
"""
