"""The base: the frozen, pretrained latent diffusion model that ContraDiff adapts.

`config` finds the base and checks its configuration. `timesteps` says which timesteps DDIM takes.
`loading` loads its noise schedule, UNet and autoencoder. `headers` reads the headers of its weight
files, and `weights` checks these files before expensive work. `vae` converts pixels to latents and
back.
"""
