"""Data in the form that the method reads: shards of images and latents, and training batches.

Read `shards` first (tar files with an index). `shard_info` defines the content of an index, and
`remote` reads shards from a server. Then read `decoding` and `transforms` (encoded images =>
crops), `latents` (the stored form of an image) and `encoding` (images => latents), `order` and
`streams` (training batches), `subsets` and `png`. `map_shards` is the resumable loop of every stage
that makes shards. `map_ahead` decodes images in threads. This package reads no raw data sets. It
may import `method`, `base`, `types`, `config`, `files` and `processes`.
"""
