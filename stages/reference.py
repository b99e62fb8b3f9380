"""reference: real images as the extractor sees them, for scores: measurements and a card."""

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
from contradiff.evaluation.images import real_image
from contradiff.evaluation.measuring import measure_shards
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
    extractor = read_extractor_card(EXTRACTOR)
    card = ReferenceCard(
        split=section.split,
        num_images=sum(shard.num_samples for shard in shards),
        image_size=size,
        images_sha256=fingerprint_of(shards),
        extractor=extractor.name,
        extractor_sha256=extractor.weights_sha256,
        resizers=list(extractor.resizers),
        num_kept=section.num_kept,
        seed=params.seed,
    )
    check_count(card.num_images, num_features=extractor.num_features, images=card.description)
    inputs = [IMAGES / "index.json", EXTRACTOR]
    processes = run.processes(run.accelerator())
    with (
        run.work_dir(params, inputs, state_version=STATE_VERSION) as work_dir,
        run.progress("images", card.num_images) as advance,
    ):
        found = measure_shards(
            IMAGES,
            shards,
            partial(real_image, image_size=size),
            load_extractor(EXTRACTOR, device=run.device),
            work_dir,
            images=card.description,
            num_kept=section.num_kept,
            with_logits=False,
            batch_size=section.batch_size,
            num_workers=run.runtime.num_workers,
            seed=params.seed,
            processes=processes,
            on_progress=advance,
        )
        if run.is_main:
            write_reference(REFERENCE, card, found)


if __name__ == "__main__":
    execute(Params, main, parallel=True)
