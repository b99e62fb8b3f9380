"""Scores of generated images: `fid` is the main one, `scores` has the others and computes all.

`extractors` loads the network that sees the images: a `classifier` trained here, or `inception`.
`measuring` collects its features and logits from shards; `reference` keeps those of real images.
This room may import `training`, `data` and what stands below them.
"""
