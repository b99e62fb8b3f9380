"""The method of the paper (Sec. 3): start reading here.

Read `params` (sections of params.yaml), `noise` (timesteps, Eq. 5), `transformer` and `conditioner`
(an image => tokens), `lora` and `lora_layer`, `unet` and `microbatches` (the UNet in two halves),
`attention` (the feature h, Eq. 4), `losses` (Eqs. 3, 6), `model` (all parts joined), `objective`
(Eq. 7), `parameter_counts`, `weights` and `checkpoint`, in this order. These modules may import
`base`, `types`, `config` and `files`.
"""
