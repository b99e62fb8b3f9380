"""Scores of generated images.

`extractors` loads the network that sees the images: a `classifier` trained here, or `inception`.
`images` decodes them, `measuring` collects features and logits from shards, and `reference` keeps
those of the real images. `fid`, `kid` and `prdc` are the scores; `scores` computes all of them.
This room may import `data` and what stands below it.
"""
