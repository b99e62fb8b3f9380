"""Frozen features of images, computed once and stored on disk.

`params` says which features are computed. `batches` reads images. `models` computes the features of
ContraDiff and of its base, with the variants `inversion` and `diffeed`. `timm_backbone` computes
features of other networks. `write_cache` stores the features, and `cache` reads them.
"""
