"""Scores of generated images.

`extractors` loads the network that sees the images: a `classifier` trained here, or `inception`.
`measuring` collects its features and logits from shards, and `reference` keeps those of the real
images. `fid` is the main score; `scores` has the others, and computes all of them. This room may
import `training`, `data` and what stands below them.
"""
