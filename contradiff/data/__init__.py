"""Data in the form that the method reads: shards of images and latents, and training batches.

Shards are tar files (`shards`) with an index (`shard_info`). `remote` reads shards from a server.
`decoding` and `transforms` turn encoded images into crops. `encoding` turns crops into latents, and
`latents` defines their stored form. `order` and `streams` make training batches. `map_shards` is
the resumable loop of every stage that makes shards. `map_ahead` computes in threads. `subsets`
draws few-shot training sets, and `png` writes pictures. This package does not read raw data sets.
It may import `method`, `base`, `types`, `config`, `files` and `processes`.
"""
