"""The pretrained latent diffusion model that everything starts from, frozen.

`config` finds the base and checks its configuration, `loading` loads its noise schedule, UNet and
autoencoder, `vae` takes pixels to latents and back.
"""
