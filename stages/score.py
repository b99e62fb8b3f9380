"""score: compute FID, KID, precision and inception score of the generated images."""

from stages.runtime.run import Run, execute

from functools import partial
from pathlib import Path

from contradiff.config import Section, Seed
from contradiff.data.map_shards import STATE_VERSION
from contradiff.data.params import DataParams
from contradiff.data.shard_info import SampleInfo
from contradiff.data.shards import ShardIndex
from contradiff.evaluation.extractors import load_extractor, read_extractor_card
from contradiff.evaluation.measuring import Measurement, generated_image, measure_shards
from contradiff.evaluation.params import ScoreParams
from contradiff.evaluation.reference import read_reference
from contradiff.evaluation.scores import MIN_UNBIASED_IMAGES, SCORES, scores_of

SAMPLES, EXTRACTOR, REFERENCE = map(Path, ("build/samples", "build/extractor", "build/reference"))


class Params(Section):
    seed: Seed
    data: DataParams
    score: ScoreParams


def main(params: Params, run: Run) -> None:
    section, size = params.score, params.data.image_size
    samples = ShardIndex.read(SAMPLES, SampleInfo)
    num_samples = samples.num_samples("sample")
    extractor = read_extractor_card(EXTRACTOR)
    reference, real = read_reference(REFERENCE, extractor=extractor, image_size=size)
    num_smallest = min(num_samples, reference.num_images)
    num_kept = min(reference.num_kept, num_smallest)
    if section.kid_subset_size > num_kept:
        raise ValueError(
            f"score.kid_subset_size: {section.kid_subset_size} is more than {num_kept}, the number "
            "of images whose features are kept; lower score.kid_subset_size, or raise "
            "reference.num_kept, generate.num_samples or data.num_val"
        )
    inputs = [SAMPLES / "index.json", EXTRACTOR, REFERENCE]
    load = partial(generated_image, image_size=size)
    measure = partial(measure_shards, SAMPLES, samples.shards("sample"), load, with_logits=True)
    measure = partial(measure, images=f"{num_samples} samples", num_kept=reference.num_kept)
    measure = partial(measure, batch_size=section.batch_size, num_workers=run.runtime.num_workers)
    processes = run.processes(run.accelerator())
    with (
        run.work_dir(params, inputs, state_version=STATE_VERSION) as work_dir,
        run.progress("images", num_samples) as advance,
    ):
        found: dict[str, Measurement] = {}
        if extractor.weakness is None:
            measure = partial(measure, load_extractor(EXTRACTOR, device=run.device), work_dir)
            found = measure(seed=params.seed, processes=processes, on_progress=advance)
        else:
            run.log(f"there are no scores: {extractor.weakness}")
        if not run.is_main:
            return
        main_one, *others = extractor.resizers
        scores: dict[str, dict[str, float] | dict[str, None]] = {main_one: dict.fromkeys(SCORES)}
        score = partial(scores_of, params=section, seed=params.seed, device=run.device)
        for resizer, measurement in found.items():
            values = scores[resizer] = score(measurement, real[resizer])
            run.log(
                f"FID ({extractor.name}, resizer {resizer}) {values['fid']:.2f}, "
                f"KID {values['kid']:.4f} ± {values['kid_std']:.4f}, "
                f"IS {values['inception_score']:.2f} ± {values['inception_score_std']:.2f}"
            )
        if (biased := num_smallest < MIN_UNBIASED_IMAGES) and found:
            run.log(
                f"FID is too large, because {num_samples} generated or {reference.num_images} real "
                f"images are too few (at least {MIN_UNBIASED_IMAGES:,} of each); use KID instead"
            )
        facts: dict[str, object] = {"biased": biased, "resizer": main_one, "seed": params.seed}
        facts |= {"num_samples": num_samples, "num_reference": reference.num_images}
        facts |= {"condition": samples.info.condition, "guidance": samples.info.guidance}
        facts |= {"reference": reference.description, "reference_sha256": reference.images_sha256}
        facts |= {"extractor": extractor.name, "extractor_accuracy": extractor.val_accuracy}
        facts |= {"num_kept": num_kept, "withheld": extractor.weakness}
        facts |= {resizer: scores[resizer] for resizer in others}
        run.write_json(Path("metrics/score.json"), {"score": scores[main_one] | facts})


if __name__ == "__main__":
    execute(Params, main, parallel=True)
