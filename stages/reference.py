"""reference: features of real images, for scores: statistics, a choice of features, and a card."""

from stages.runtime.measuring import measure_set
from stages.runtime.run import Run, execute

from functools import partial
from pathlib import Path

from contradiff.config import Section, Seed
from contradiff.data.map_shards import STATE_VERSION
from contradiff.data.params import DataParams
from contradiff.data.shard_info import ImageInfo
from contradiff.data.shards import ShardIndex
from contradiff.evaluation.extractors import load_extractor, read_extractor_card
from contradiff.evaluation.fid import check_count
from contradiff.evaluation.images import reference_shard
from contradiff.evaluation.reference import (
    ReferenceCard,
    ReferenceParams,
    fingerprint_of,
    write_reference,
)

IMAGES, EXTRACTOR = Path("build/shards"), Path("build/extractor")
REFERENCE = Path("build/reference")


class Params(Section):
    seed: Seed
    data: DataParams
    reference: ReferenceParams


def main(params: Params, run: Run) -> None:
    section, size = params.reference, params.data.image_size
    shards = ShardIndex.read(IMAGES, ImageInfo).shards(section.split)
    extractor_card = read_extractor_card(EXTRACTOR)
    num_images = sum(shard.num_samples for shard in shards)
    card = ReferenceCard(
        split=section.split,
        num_images=num_images,
        image_size=size,
        images_sha256=fingerprint_of(shards),
        extractor=extractor_card.name,
        extractor_sha256=extractor_card.weights_sha256,
        resizers=list(extractor_card.resizers),
        num_kept=section.num_kept,
        seed=params.seed,
    )
    check_count(num_images, num_features=extractor_card.num_features, reference=card.description)
    read = partial(reference_shard, IMAGES, image_size=size, batch_size=section.batch_size)
    inputs = [IMAGES / "index.json", EXTRACTOR]
    accelerator = run.accelerator()
    with run.work_dir(params, inputs, state_version=STATE_VERSION) as work:
        features = measure_set(
            shards,
            read,
            load_extractor(EXTRACTOR, device=run.device),
            work,
            run=run,
            accelerator=accelerator,
            reference=card.description,
            num_kept=section.num_kept,
            splits=None,
            seed=params.seed,
        )
        if accelerator.is_main_process:
            write_reference(REFERENCE, card, features)
        accelerator.wait_for_everyone()


if __name__ == "__main__":
    execute(Params, main, parallel=True)
