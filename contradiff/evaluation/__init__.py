"""Scores of generated images. `fid` computes the main score; `scores` computes all of them.

An extractor is the network that sees the images: `classifier` (trained here) or `inception`.
`inception_files` names its weights, `extractors` loads it, `measuring` collects its features and
logits, `reference` keeps the real images' features. `params` has sections of params.yaml. This
package may import `training`, `data`, and what those two may import.
"""
