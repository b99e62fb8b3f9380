"""Data as the method reads it.

In reading order: `shards` (tar files with an index; what an index says is in `shard_info`, what
lies on a server is read by `remote`), `decoding` and `transforms` (encoded images => crops),
`latents` (what is stored of an image), `encoding` (how it is made and checked), `order` and
`streams` (the batches of a training), `subsets`, `png`. `map_shards` is the resumable loop of every
stage that makes shards; `map_ahead` decodes in threads. The room knows no raw format; it may import
`method`, `base`, `types`, `config`, `files` and `processes`.
"""
