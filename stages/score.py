"""score: generated images against the reference => FID, KID, precision, inception score."""

from stages.runtime.measuring import measure_set
from stages.runtime.run import Run, execute

from functools import partial
from pathlib import Path

from contradiff.config import Section, Seed
from contradiff.data.map_shards import STATE_VERSION
from contradiff.data.params import DataParams
from contradiff.data.shard_info import SampleInfo
from contradiff.data.shards import ShardIndex
from contradiff.evaluation.extractors import load_extractor, read_extractor_card
from contradiff.evaluation.fid import check_count
from contradiff.evaluation.images import generated_shard
from contradiff.evaluation.measuring import FeatureSet
from contradiff.evaluation.reference import read_reference, read_reference_card
from contradiff.evaluation.scores import MIN_UNBIASED_IMAGES, ScoreParams, is_biased, scores_of

SAMPLES, EXTRACTOR = Path("build/samples"), Path("build/extractor")
REFERENCE = Path("build/reference")


class Params(Section):
    seed: Seed
    data: DataParams
    score: ScoreParams


def main(params: Params, run: Run) -> None:
    section, size = params.score, params.data.image_size
    samples = ShardIndex.read(SAMPLES, SampleInfo)
    shards = samples.shards("sample")
    num_samples = samples.num_samples("sample")
    extractor = read_extractor_card(EXTRACTOR)
    reference = read_reference_card(REFERENCE, extractor=extractor, image_size=size)
    words = f"{num_samples} samples"
    check_count(num_samples, num_features=extractor.num_features, reference=words)
    read = partial(generated_shard, SAMPLES, image_size=size, batch_size=section.batch_size)
    inputs = [SAMPLES / "index.json", EXTRACTOR, REFERENCE]
    accelerator = run.accelerator()
    with run.work_dir(params, inputs, state_version=STATE_VERSION) as work:
        found = measure_set(
            shards,
            read,
            load_extractor(EXTRACTOR, device=run.device),
            work,
            run=run,
            accelerator=accelerator,
            reference=words,
            num_kept=reference.num_kept,
            splits=section.splits,
            seed=params.seed,
        )
        if accelerator.is_main_process:
            real = read_reference(REFERENCE, reference)
            by_resizer = {
                resizer: score(found[resizer], real[resizer], params, run)
                for resizer in extractor.resizers
            }
            main_one, *others = extractor.resizers
            biased = is_biased(num_samples, reference.num_images)
            if biased:
                run.log(
                    f"FID is biased upwards: fewer than {MIN_UNBIASED_IMAGES:,} images "
                    f"({num_samples} samples, {reference.num_images} of the reference); see KID"
                )
            facts = {
                "biased": biased,
                "num_samples": num_samples,
                "condition": samples.info.condition,
                "guidance": samples.info.guidance,
                "num_reference": reference.num_images,
                "num_kept": min(reference.num_kept, num_samples, reference.num_images),
                "reference": reference.description,
                "reference_sha256": reference.images_sha256,
                "extractor": extractor.name,
                "extractor_accuracy": extractor.val_accuracy,
                "resizer": main_one,
                "seed": params.seed,
            }
            rest = {resizer: by_resizer[resizer] for resizer in others}
            content = {"score": by_resizer[main_one] | facts | rest}
            run.write_json(Path("metrics/score.json"), content)
        accelerator.wait_for_everyone()


def score(samples: FeatureSet, reference: FeatureSet, params: Params, run: Run) -> dict[str, float]:
    """Scores with one resizer; a line of the log says the main ones."""
    values = scores_of(
        samples,
        reference,
        kid_subsets=params.score.kid_subsets,
        kid_subset_size=params.score.kid_subset_size,
        seed=params.seed,
        device=run.device,
    )
    source = samples.statistics.source
    run.log(
        f"FID ({source.extractor}, resizer {source.resizer}) {values['fid']:.2f}, "
        f"KID {values['kid']:.4f} ± {values['kid_std']:.4f}, "
        f"IS {values['inception_score']:.2f} ± {values['inception_score_std']:.2f}"
    )
    return values


if __name__ == "__main__":
    execute(Params, main, parallel=True)
