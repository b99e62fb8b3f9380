"""Generate images from noise.

Read the modules in this order: `sampling` (the reverse process and guidance), `solvers`,
`cross_attention_cache`, `conditions` (noise, images or classes), `condition_images` (images to
condition on), `class_table` (class embeddings, Table 5), `samples` (shards of generated images).
"""
