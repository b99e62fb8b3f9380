"""Scores of generated images. `fid` computes the main score; `scores` computes all of them.

An extractor is the network that sees the images: `classifier` (trained here) or `inception`.
`extractors` loads it, `measuring` collects its features and logits, `reference` keeps the real
images' features. This package may import `training`, `data`, and what those two may import.
"""
