"""The base: the frozen, pretrained latent diffusion model that ContraDiff adapts.

`config` finds the base and checks its configuration. `loading` loads its noise schedule, UNet and
autoencoder. `vae` converts pixels to latents and back.
"""
