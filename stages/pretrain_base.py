"""pretrain_base: the tiny base's recipe => models/tiny, in diffusers' format. No labels are used.

Frozen in dvc.yaml: `dvc repro` takes its out as it is, as one takes Stable Diffusion. `make base`
retrains it, in CONTRADIFF_NUM_PROCESSES processes.
"""

from stages.runtime.run import Run, execute
from stages.runtime.training import show_steps

from pathlib import Path

import numpy as np
import torch

from contradiff.config import Section
from contradiff.files import replace_dir
from contradiff.toy.base_recipe import build_scheduler, train_unet, train_vae
from contradiff.toy.classes import CLASSES
from contradiff.toy.render import render_image
from contradiff.training.state import STATE_VERSION

SEED = 1000
"""Of the base's own images: ContraDiff's have `seed` of params.yaml, and another form of seed."""
NUM_IMAGES = 16_000
VAE_STEPS, VAE_BATCH = 2_500, 32
UNET_STEPS, UNET_BATCH = 6_000, 128


class Params(Section):
    """None: the recipe is the code, as a pretrained model's is elsewhere."""


def main(_params: Params, run: Run) -> None:
    images = torch.empty(NUM_IMAGES, 3, 32, 32, dtype=torch.uint8)
    with run.progress("render", NUM_IMAGES) as advance:
        for number in range(NUM_IMAGES):
            rng = np.random.default_rng([SEED, 2, number])
            drawn = render_image(int(rng.integers(len(CLASSES))), rng, image_size=32)
            images[number] = torch.from_numpy(drawn).permute(2, 0, 1)
            advance(1)
    accelerator = run.accelerator()
    recipe = {"vae": [VAE_STEPS, VAE_BATCH], "unet": [UNET_STEPS, UNET_BATCH]}
    with run.work_dir(recipe, [], state_version=STATE_VERSION) as work:
        with run.progress("autoencoder", VAE_STEPS, "step") as advance:
            vae = train_vae(
                images,
                num_steps=VAE_STEPS,
                batch_size=VAE_BATCH,
                lr=2e-3,
                kl_weight=1e-4,
                seed=0,
                accelerator=accelerator,
                work_dir=work,
                on_step=show_steps(advance),
            )
        with run.progress("denoiser", UNET_STEPS, "step") as advance:
            unet = train_unet(
                images,
                vae,
                num_steps=UNET_STEPS,
                batch_size=UNET_BATCH,
                lr=2e-3,
                caption_drop=0.5,
                seed=0,
                accelerator=accelerator,
                work_dir=work,
                on_step=show_steps(advance),
            )
        if run.is_main:
            with replace_dir(Path("models/tiny")) as folder:
                # Half precision halves the store; it is loaded as float32.
                vae.half().save_pretrained(folder / "vae")
                unet.half().save_pretrained(folder / "unet")
                build_scheduler().save_pretrained(folder / "scheduler")
        accelerator.wait_for_everyone()


if __name__ == "__main__":
    execute(Params, main, parallel=True)
