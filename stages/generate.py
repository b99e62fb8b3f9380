"""generate: noise => shards of PNG images, and a grid of the first ones.

Images are unconditional, or conditioned on validation images or on classes, with or without
guidance. The processes that `python -m stages.generate` starts share the shards; their number does
not change the images. After an interruption, the stage keeps the shards that are whole.
"""

from stages.runtime.run import Run, execute

import time
from functools import partial
from operator import attrgetter
from pathlib import Path

from contradiff.base.loading import load_vae
from contradiff.config import Section, Seed
from contradiff.data.map_shards import STATE_VERSION, map_shards, missing_items, publish_shards
from contradiff.data.params import DataParams
from contradiff.data.png import LiveGrid
from contradiff.data.shards import ShardParams
from contradiff.files import replace_dir, replace_file
from contradiff.generation.conditions import load_conditioning
from contradiff.generation.samples import (
    SPLIT,
    describe_samples,
    plan_samples,
    sample_figure,
    write_samples,
)
from contradiff.generation.sampling import GenerateParams, generate
from contradiff.generation.solvers import load_solver
from contradiff.method.checkpoint import load_checkpoint
from contradiff.method.lora import cast_frozen_weights

BASE, CHECKPOINT = Path("build/base"), Path("build/pretrain")
CLASSES, CONDITIONS = Path("build/class_condition"), Path("build/conditions")
SAMPLES, GRID = Path("build/samples"), Path("build/figures/samples.png")


class Params(Section):
    seed: Seed
    data: DataParams
    shard: ShardParams
    generate: GenerateParams


def main(params: Params, run: Run) -> None:
    section, device = params.generate, run.device
    scheduler = load_solver(
        BASE, solver=section.solver, num_inference_steps=section.num_inference_steps
    )
    accelerator = run.accelerator()
    model = load_checkpoint(CHECKPOINT, base=BASE).to(device)
    conditioning = load_conditioning(
        section.condition,
        model,
        images=CONDITIONS,
        table=CLASSES,
        checkpoint=CHECKPOINT,
        seed=params.seed,
        device=device,
    )
    if section.precision == "bf16":
        cast_frozen_weights(model.unet)
    make = partial(
        generate,
        model,
        load_vae(BASE).to(device),  # pyright: ignore[reportArgumentType]
        scheduler,
        conditioning=conditioning,
        params=section,
        image_size=params.data.image_size,
        seed=params.seed,
        device=device,
    )
    own_inputs = {"noise": [], "class": [CLASSES], "image": [CONDITIONS]}[section.condition]
    inputs = [BASE, CHECKPOINT, *own_inputs]
    with run.work_dir(params, inputs, state_version=STATE_VERSION) as work:
        plan = plan_samples(section.num_samples, params.shard)
        missing = missing_items(plan, work, name_of=attrgetter("name"))
        total = sum(len(item.indices) for item in missing)
        if total < section.num_samples:
            run.log(f"resumed: {total} of {section.num_samples} images are still to be made")
        preview = LiveGrid(work / "preview.png")
        run.log(f"the newest images: {preview.path}")
        processes, started = run.processes(accelerator), time.perf_counter()
        with run.progress("sample", total) as advance:
            made = map_shards(
                plan,
                partial(
                    write_samples,
                    make=make,
                    num_classes=conditioning.num_classes,
                    work_dir=work,
                    params=params.shard,
                    on_images=preview.add if run.is_main else lambda _: None,
                ),
                work,
                name_of=attrgetter("name"),
                processes=processes,
                on_progress=advance,
            )
        rate = total / (time.perf_counter() - started)
        run.log(f"{total} images, {rate:.2f} a second, on {processes.size} process(es)")
        if run.is_main:
            with replace_dir(SAMPLES) as folder:
                info = describe_samples(section, seed=params.seed, checkpoint=CHECKPOINT, base=BASE)
                publish_shards(folder, work, ((SPLIT, item) for item in made), info)
            with replace_file(GRID) as path:
                given = CONDITIONS if section.condition == "image" else None
                path.write_bytes(sample_figure(SAMPLES, conditions=given))


if __name__ == "__main__":
    execute(Params, main, parallel=True)
