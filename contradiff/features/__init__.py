"""Frozen features, by which representations are judged: from images to a table on disk.

`params` says which features there are, `batches` reads images for evaluation, and `models` turns
them into features: those of ContraDiff (`inversion` is its second way to noise), of its base alone,
of `diffeed` and of a `timm_backbone`. `cache` reads the table on disk that `write_cache` writes.
This room imports method, base and data, and no room that judges.
"""
