"""reference: measure real images with the extractor, for comparison with generated images."""

from stages.runtime.run import Run, execute

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

from contradiff.config import Section, Seed
from contradiff.data.map_shards import STATE_VERSION
from contradiff.data.params import DataParams
from contradiff.data.shard_info import ImageInfo
from contradiff.data.shards import ShardIndex
from contradiff.evaluation.extractors import load_extractor, read_extractor_card
from contradiff.evaluation.measuring import measure_shards, real_image
from contradiff.evaluation.params import ReferenceParams
from contradiff.evaluation.reference import ReferenceCard, write_reference

IMAGES, EXTRACTOR, REFERENCE = map(Path, ("build/shards", "build/extractor", "build/reference"))


class Params(Section):
    seed: Seed
    data: DataParams
    reference: ReferenceParams


def main(params: Params, run: Run) -> None:
    section, size = params.reference, params.data.image_size
    shards = ShardIndex.read(IMAGES, ImageInfo).shards(section.split)
    extractor = read_extractor_card(EXTRACTOR)
    digests = "\n".join(shard.sha256 for shard in shards)
    facts: dict[str, Any] = section.model_dump(include={"split", "num_kept"})
    facts |= {"num_images": sum(shard.num_samples for shard in shards), "image_size": size}
    facts |= {"images_sha256": hashlib.sha256(digests.encode()).hexdigest(), "seed": params.seed}
    facts |= {"extractor": extractor.name, "extractor_sha256": extractor.weights_sha256}
    card = ReferenceCard(resizers=list(extractor.resizers), **facts)
    if card.num_images < extractor.num_features:
        raise ValueError(
            f"reference.split: the extractor has {extractor.num_features} features, so FID needs "
            f"at least {extractor.num_features} images, but the split has {card.num_images}; "
            "set reference.split to a larger split, or add images to the split"
        )
    load = partial(real_image, image_size=size)
    measure = partial(measure_shards, IMAGES, shards, load, with_logits=False)
    measure = partial(measure, images=card.description, num_kept=section.num_kept)
    measure = partial(measure, batch_size=section.batch_size, num_workers=run.runtime.num_workers)
    processes = run.processes(run.accelerator())
    inputs = [IMAGES / "index.json", EXTRACTOR]
    with (
        run.work_dir(params, inputs, state_version=STATE_VERSION) as work_dir,
        run.progress("images", card.num_images) as advance,
    ):
        measure = partial(measure, load_extractor(EXTRACTOR, device=run.device), work_dir)
        found = measure(seed=params.seed, processes=processes, on_progress=advance)
        if run.is_main:
            write_reference(REFERENCE, card, found)


if __name__ == "__main__":
    execute(Params, main, parallel=True, has_parts=True)
