"""Frozen features, by which representations are judged: from images to a table on disk.

`batches` reads images, `models` turns them into the features that `params` names: ContraDiff's
(`inversion`: its second way to noise), its base's, of `diffeed` and of a `timm_backbone`. `cache`
reads what `write_cache` writes. This room imports method, base and data, and no room that judges.
"""
