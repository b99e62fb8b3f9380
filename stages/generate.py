"""generate: sample images, store them as PNGs in shards, and draw a grid of the first images.

generate.condition chooses the condition: none, validation images or classes. Several processes can
share the work. After an interruption, the next run keeps finished shards.
"""

from stages.runtime.run import Run, execute

import time
from pathlib import Path

from contradiff.base.loading import load_vae
from contradiff.config import Precision, Seed
from contradiff.data import map_shards
from contradiff.data.params import DataParams
from contradiff.data.png import LiveGrid
from contradiff.data.shards import ShardParams, write_shard
from contradiff.files import bytes_of, check_free_space, describe_bytes, replace_dir, replace_file
from contradiff.generation import samples
from contradiff.generation.conditions import load_conditioning
from contradiff.generation.params import GenerateParams
from contradiff.generation.sampling import generate
from contradiff.generation.solvers import load_solver
from contradiff.method.checkpoint import load_checkpoint
from contradiff.method.compilation import compile_blocks
from contradiff.method.lora import cast_frozen_weights
from contradiff.method.model import ContraDiffModel
from contradiff.method.params import Architecture

BASE, CHECKPOINT = Path("build/base"), Path("build/pretrain")
CLASSES, CONDITIONS = Path("build/class_condition"), Path("build/conditions")
SAMPLES, GRID = Path("build/samples"), Path("build/figures/samples.png")


class Params(Architecture):
    seed: Seed
    data: DataParams
    shard: ShardParams
    generate: GenerateParams


def main(params: Params, run: Run) -> None:
    section, device = params.generate, run.device
    num_steps = section.num_inference_steps
    solver = load_solver(BASE, solver=section.solver, num_inference_steps=num_steps)
    processes = run.processes(run.accelerator())
    model = load_checkpoint(CHECKPOINT, base=BASE, expected=params).to(device)
    vae = load_vae(BASE).to(device)  # pyright: ignore[reportArgumentType]
    seed, size, kind = params.seed, params.data.image_size, params.shard.compression
    conditioning = load_conditioning(
        section.condition, model, images=CONDITIONS, table=CLASSES, checkpoint=CHECKPOINT, seed=seed
    )
    speed_up(model, section.precision, run)

    own_inputs = {"noise": [], "class": [CLASSES], "image": [CONDITIONS]}[section.condition]
    inputs, version = [BASE, CHECKPOINT, *own_inputs], map_shards.STATE_VERSION
    with run.work_dir(params, inputs, state_version=version) as work:
        if run.is_main:
            check_disk(run, work, section.num_samples, image_size=size)
        plan = samples.plan_samples(section.num_samples, params.shard)
        preview = LiveGrid(work / f"preview{f'-{run.part}' if run.part else ''}.png")

        def make(name: str, tick: map_shards.Tick) -> map_shards.Made:
            wanted, num_classes = plan[name], conditioning.num_classes
            batches = generate(
                model, vae, solver, wanted, conditioning, params=section, image_size=size, seed=seed
            )
            batches = map(preview.add, batches) if run.is_main else batches
            records = samples.sample_records(wanted, batches, num_classes=num_classes)
            written = write_shard(work / name, records, compression=kind, on_progress=tick)
            return map_shards.Made((written,))

        own = processes.share(list(plan))
        missing = map_shards.missing_items(own, work, name_of=str)
        total, num_own = (sum(len(plan[name]) for name in names) for names in (missing, own))
        if total < num_own:
            run.log(f"resumed: {total} of {num_own} images are still missing")
        run.log(f"the newest images are shown in {preview.path}")
        num_batches = -(-total // section.batch_size) // processes.size
        if run.is_main and num_batches > 10:  # else the estimate would take too much of the time

            def sample(num_steps: int) -> None:
                few = load_solver(BASE, solver=section.solver, num_inference_steps=num_steps)
                batch, settings = range(section.batch_size), {"image_size": size, "seed": seed}
                next(generate(model, vae, few, batch, conditioning, params=section, **settings))

            seconds = num_batches * samples.seconds_of_batch(sample, num_steps=num_steps)
            run.log(f"about {seconds / 3600:,.2g} hours with {processes.size} process(es)")
        started = time.perf_counter()
        with run.progress("sample", total) as advance:
            made = map_shards.map_shards(
                list(plan), make, work, name_of=str, processes=processes, on_progress=advance
            )
        rate = total / (time.perf_counter() - started)
        run.log(f"made {total} images, {rate:.2f} per second, with {processes.size} process(es)")
        if run.is_main:
            info = samples.describe_samples(section, seed=seed, checkpoint=CHECKPOINT, base=BASE)
            with replace_dir(SAMPLES) as folder:
                written = ((samples.SPLIT, item) for item in made)
                map_shards.publish_shards(folder, work, written, info)
            with replace_file(GRID) as path:
                given = CONDITIONS if section.condition == "image" else None
                path.write_bytes(samples.sample_figure(SAMPLES, conditions=given))


def check_disk(run: Run, work: Path, num_samples: int, *, image_size: int) -> None:
    """Say how large the samples can become. Raises ValueError if they may not fit on the disk."""
    num_bytes = samples.max_bytes(num_samples, image_size=image_size)
    run.log(f"{num_samples:,} images, at most {describe_bytes(num_bytes)}")
    num_bytes -= bytes_of(work, "*.tar*")
    SAMPLES.parent.mkdir(exist_ok=True)
    for place in (work, SAMPLES.parent):
        check_free_space(place, num_bytes, ways_out="lower generate.num_samples")


def speed_up(model: ContraDiffModel, precision: Precision, run: Run) -> None:
    if precision == "bf16":
        cast_frozen_weights(model.unet)
    if run.runtime.compile != "none":
        compile_blocks(model.unet)


if __name__ == "__main__":
    execute(Params, main, parallel=True, without_gpu=lambda _: 2, has_parts=True)
