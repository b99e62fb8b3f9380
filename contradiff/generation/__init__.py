"""Images from noise.

In reading order: `sampling` (the reverse process, guidance), `solvers`, `cross_attention_cache`,
`conditions` (noise, images or classes), `condition_images` (how images to condition on are stored),
`class_table` (the embedding of classes, Table 5), `samples` (shards of generated images and their
figure). The room may import `features`, `training`, `data`, `method`, `base` and what lies below.
"""
