"""The method, Sec. 3 of the paper: start here.

In reading order: `noise` (which timesteps, Eq. 5), `transformer` and `conditioner` (an image =>
encoder_hidden_states), `lora`, `unet` and `microbatches` (the denoiser in halves, f(z_t)),
`attention` (h, Eq. 4), `losses` (Eqs. 3 and 6), `model` (all of it together), `objective` (Eq. 7);
then `parameter_counts` and `checkpoint`. The room may import `base`, `types`, `config` and `files`.
"""
