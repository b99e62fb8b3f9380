"""Frozen features of images, computed once and stored on disk; other rooms test how good they are.

`params` says which features. `batches` reads images. `models` computes the features of ContraDiff
and of its base; `inversion` and `diffeed` are other ways to do so, and `timm_backbone` has other
models. `write_cache` stores the features, and `cache` reads them.
"""
