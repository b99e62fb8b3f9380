"""Generate images from noise.

Read the modules in this order: `sampling` (the reverse process and guidance), `solvers`,
`cross_attention_cache`, `conditions` (noise, images or classes), `condition_images` (images to
condition on), `condition_shards` (their shards), `class_table` (class embeddings, Table 5),
`class_table_folder` (its files), `samples` (shards of generated images). `params` has the sections
of params.yaml.
"""
