"""Data in the form that the method reads: shards of images and latents, and training batches.

Shards are tar files (`shards`) with an index (`shard_info`). `remote` reads shards from a server.
`decoding` and `transforms` turn encoded images into crops. `encoding` turns crops into latents, and
`latents` defines their stored form. `pairs` joins images and their latents; `order` and `streams`
make training batches of them. `map_shards` is the resumable loop of every stage that makes shards.
`map_ahead` computes in threads. `subsets` draws few-shot training sets, and `png` writes pictures.
`params` has sections of params.yaml. This package does not read raw data sets. It may import
`method`, `base`, `types`, `config`, `files` and `processes`.
"""
