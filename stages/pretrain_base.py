"""pretrain_base: train the tiny base model without labels, and write models/tiny.

`make base` runs this stage. `dvc repro` does not run it, because dvc.yaml marks it as frozen.
CONTRADIFF_NUM_PROCESSES sets the number of processes.
"""

from stages.runtime.run import Run, execute
from stages.runtime.training import show_steps

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from contradiff.config import Section
from contradiff.files import replace_dir
from contradiff.toy import base_recipe
from contradiff.toy.generic import render_shapes, render_tinted
from contradiff.training.state import STATE_VERSION
from contradiff.watch import Watch

SEED = 1000
NUM_SHAPES, NUM_TINTED = 48_000, 24_000
"""Numbers of images that train the autoencoder and the denoiser."""


class Params(Section):
    """Empty, because `contradiff.toy.base_recipe` fixes all settings."""


def main(_params: Params, run: Run) -> None:
    def rendered(render: Callable[..., np.ndarray], number: int) -> torch.Tensor:
        images = torch.empty(number, 3, 32, 32, dtype=torch.uint8)
        with run.progress("render", number) as advance:
            for index in range(number):
                drawn = render(np.random.default_rng([SEED, 2, index]), image_size=32)
                images[index] = torch.from_numpy(drawn).permute(2, 0, 1)
                advance(1)
        return images

    def watch_of(recipe: base_recipe.Recipe) -> Watch:
        steps, size = recipe.num_steps, recipe.batch_size
        return Watch(num_steps=steps, batch_size=size, device=run.device)

    shapes, tinted = rendered(render_shapes, NUM_SHAPES), rendered(render_tinted, NUM_TINTED)
    accelerator = run.accelerator()
    recipes = {"vae": asdict(base_recipe.VAE_RECIPE), "unet": asdict(base_recipe.UNET_RECIPE)}
    with run.work_dir(recipes, [], state_version=STATE_VERSION) as work:
        with show_steps(run, "autoencoder", watch_of(base_recipe.VAE_RECIPE)) as on_step:
            vae = base_recipe.train_vae(shapes, accelerator, work, on_step)
        with show_steps(run, "denoiser", watch_of(base_recipe.UNET_RECIPE)) as on_step:
            unet = base_recipe.train_unet(tinted, vae, accelerator, work, on_step)
        if run.is_main:
            with replace_dir(Path("models/tiny")) as folder:
                # Half precision halves the file sizes. Loading converts the weights to float32.
                vae.half().save_pretrained(folder / "vae")
                unet.half().save_pretrained(folder / "unet")
                base_recipe.build_scheduler().save_pretrained(folder / "scheduler")
        accelerator.wait_for_everyone()


if __name__ == "__main__":
    execute(Params, main, parallel=True)
