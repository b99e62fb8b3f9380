"""generate: noise => shards of PNG images, and a grid of the first.

Unconditional, or conditioned on validation images or on classes, with or without guidance. Runs on
as many processes as `python -m stages.generate` starts: each makes whole
shards, the same whoever makes them. Begun again after a kill, it keeps the shards that are whole.
"""

from stages.runtime.crew import Crew
from stages.runtime.run import Run, execute

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from contradiff.base.loading import load_vae
from contradiff.config import Section, Seed
from contradiff.data.map_shards import STATE_VERSION
from contradiff.data.params import DataParams
from contradiff.data.png import LiveGrid, encode_png, image_grid
from contradiff.data.shard_info import SampleInfo
from contradiff.data.shards import (
    Record,
    Shard,
    ShardIndex,
    ShardParams,
    finished_shard,
    read_split,
    resume_shard,
    shard_name,
)
from contradiff.files import explain_full_disk, replace_dir, replace_file, sha256_of
from contradiff.generation.class_table import choose_denoiser, load_class_table, read_class_config
from contradiff.generation.conditions import (
    Conditioning,
    balanced_label,
    class_conditional,
    condition_images,
    image_conditional,
    unconditional,
)
from contradiff.generation.sampling import GenerateParams, generate, shard_indices
from contradiff.generation.solvers import load_solver
from contradiff.method.checkpoint import WEIGHTS_NAME, base_digest, load_checkpoint
from contradiff.method.lora import cast_frozen_weights, merge_lora
from contradiff.method.model import ContraDiff
from contradiff.types import ByteImages

if TYPE_CHECKING:
    from accelerate import Accelerator

BASE, CHECKPOINT = Path("build/base"), Path("build/pretrain")
CLASSES, CONDITIONS = Path("build/class_condition"), Path("build/conditions")
SAMPLES = Path("build/samples")
GRID, GRID_IMAGES, GRID_COLUMNS = Path("build/figures/samples.png"), 96, 16
SECONDS_BETWEEN_PREVIEWS = 10.0
DESCRIPTIONS = {
    "noise": "unconditional: c(noise)",
    "image": "image-conditional: c(image), validation images in order",
    "class": "class-conditional: balanced labels",
}


class Params(Section):
    seed: Seed
    data: DataParams
    shard: ShardParams
    generate: GenerateParams


def main(params: Params, run: Run) -> None:
    section = params.generate
    solver = load_solver(
        BASE, solver=section.solver, num_inference_steps=section.num_inference_steps
    )
    accelerator = run.accelerator()
    model = load_checkpoint(CHECKPOINT, base=BASE).to(run.device)
    conditioning, num_classes = conditioning_of(params, run, model)
    if section.precision == "bf16":
        cast_frozen_weights(model.unet)
    vae = load_vae(BASE).to(run.device)  # pyright: ignore[reportArgumentType]

    def records_of(indices: range, on_batch: Callable[[Sequence[bytes]], None]) -> Iterator[Record]:
        batches = generate(
            model,
            vae,
            solver,
            indices=indices,
            conditioning=conditioning,
            params=section,
            image_size=params.data.image_size,
            seed=params.seed,
            device=run.device,
        )
        return as_records(batches, indices, num_classes=num_classes, on_batch=on_batch)

    inputs = [BASE, CHECKPOINT]
    inputs += {"noise": [], "class": [CLASSES], "image": [CONDITIONS]}[section.condition]
    with run.work_dir(params, inputs, state_version=STATE_VERSION) as work:
        shards = make_shards(params, run, records_of, work=work, accelerator=accelerator)
        if run.is_main:
            assemble(params, shards, work)


def conditioning_of(params: Params, run: Run, model: ContraDiff) -> tuple[Conditioning, int | None]:
    """Return the conditions and, if they are classes, how many; prepare the model's LoRA."""
    section, device = params.generate, run.device
    if section.condition == "class":
        table = load_class_table(CLASSES, checkpoint=CHECKPOINT).to(device)
        choose_denoiser(model, lora=read_class_config(CLASSES)["lora"])
        return class_conditional(table, device=device), table.null_label
    merge_lora(model.unet)
    null = unconditional(model, seed=params.seed, device=device)
    if section.condition == "noise":
        return null, None
    next(condition_images(CONDITIONS, start=0))  # refused now, if there are none

    return image_conditional(
        model,
        lambda start: condition_images(CONDITIONS, start=start),
        null_tokens=null.null_tokens,
        device=device,
    ), None


def as_records(
    batches: Iterator[ByteImages],
    indices: range,
    *,
    num_classes: int | None,
    on_batch: Callable[[Sequence[bytes]], None],
) -> Iterator[Record]:
    """Encode batches of images; `on_batch` hears of each when it has been taken up."""
    numbers = iter(indices)
    for images in batches:
        contents = [encode_png(image) for image in images]
        for content in contents:
            number = next(numbers)
            record = {"__key__": f"{number:06d}".encode(), "png": content}
            if num_classes is not None:
                record["cls"] = str(balanced_label(number, num_classes=num_classes)).encode()
            yield record
        on_batch(contents)


def make_shards(
    params: Params,
    run: Run,
    records_of: Callable[[range, Callable[[Sequence[bytes]], None]], Iterator[Record]],
    *,
    work: Path,
    accelerator: "Accelerator",
) -> list[Shard]:
    """Make what is missing in `work`, together with the other processes; return all shards."""
    compression = params.shard.compression
    parts = shard_indices(
        params.generate.num_samples, samples_per_shard=params.shard.samples_per_shard
    )
    paths = [work / shard_name("sample", number, compression) for number in range(len(parts))]
    crew = Crew(work, accelerator.process_index, accelerator.num_processes)
    accelerator.wait_for_everyone()  # the main process holds the folder's lock
    crew.begin()
    missing = [number for number, path in enumerate(paths) if finished_shard(path) is None]
    accelerator.wait_for_everyone()  # all have looked before any begins
    total = sum(len(parts[number]) for number in missing)
    if total < params.generate.num_samples:
        run.log(f"resumed: {total} of {params.generate.num_samples} images are still to be made")
    preview = LiveGrid(
        work / "preview.png",
        columns=GRID_COLUMNS,
        max_images=GRID_IMAGES,
        seconds=SECONDS_BETWEEN_PREVIEWS,
    )
    run.log(f"the newest images: {preview.path}")
    started = time.perf_counter()
    own = shown = 0
    with (
        explain_full_disk(work),
        crew.failing_together(),
        run.progress("sample", total) as advance,
    ):

        def show() -> None:
            nonlocal shown
            if run.is_main:
                done = crew.count_done()
                advance(done - shown)
                shown = done

        def on_batch(contents: Sequence[bytes]) -> None:
            nonlocal own
            own += len(contents)
            crew.say_done(own)
            if run.is_main:
                preview.add(contents)
            show()

        for number in crew.share(missing):
            records = records_of(parts[number], on_batch)
            resume_shard(paths[number], records, compression=compression)
        crew.wait(lambda: all(map(finished_shard, paths)), on_look=show)
    seconds = time.perf_counter() - started
    run.log(f"{total} images, {total / seconds:.2f} a second, on {crew.size} process(es)")
    shards = [shard for path in paths if (shard := finished_shard(path)) is not None]
    # Every process has seen every shard, and so gets here soon; the folder goes after this.
    accelerator.wait_for_everyone()
    return shards


def assemble(params: Params, shards: list[Shard], work: Path) -> None:
    """Move whole shards to build/samples, and show the first images."""
    section = params.generate
    settings: dict[str, Any] = {
        "guidance_interval": section.guidance_interval,
        "num_samples": section.num_samples,
        "seed": params.seed,
        "solver": section.solver,
        "num_inference_steps": section.num_inference_steps,
        "precision": section.precision,
        "checkpoint_sha256": sha256_of(CHECKPOINT / WEIGHTS_NAME),
        "base_sha256": base_digest(BASE),
    }
    info = SampleInfo(
        condition=DESCRIPTIONS[section.condition], guidance=section.guidance, **settings
    )
    with replace_dir(SAMPLES) as folder, explain_full_disk(SAMPLES.parent):
        # The index first: on a full disk it is what fails, and the shards are still in their place.
        ShardIndex({"sample": tuple(shards)}, info).write(folder)
        for shard in shards:
            shutil.move(work / shard.name, folder / shard.name)
    first = [record["png"] for record in islice(read_split(SAMPLES, "sample"), GRID_IMAGES)]
    if section.condition == "image":
        first = below_their_conditions(first)
    with replace_file(GRID) as path:
        path.write_bytes(image_grid(first, columns=GRID_COLUMNS))


def below_their_conditions(samples: list[bytes]) -> list[bytes]:
    """Rows of conditioning images, each above the row of its samples; blanks end a short row."""
    samples = samples[: GRID_IMAGES // 2]
    images = islice(condition_images(CONDITIONS, start=0), len(samples))
    pixels = [item.image[0] for item in images]
    blanks = [encode_png(torch.full_like(pixels[0], 255))] * (-len(samples) % GRID_COLUMNS)
    conditions = [*map(encode_png, pixels), *blanks]
    samples = [*samples, *blanks]
    starts = range(0, len(samples), GRID_COLUMNS)
    rows = [slice(start, start + GRID_COLUMNS) for start in starts]
    return [image for row in rows for image in (*conditions[row], *samples[row])]


if __name__ == "__main__":
    execute(Params, main, parallel=True)
