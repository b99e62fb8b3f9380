"""score: generated images against the real validation images => FID and inception score."""

from stages._runtime import Run, execute

from pathlib import Path

from contradiff.config import Section, Seed
from contradiff.data.params import DataParams
from contradiff.data.shards import ShardIndex
from contradiff.evaluation.extractors import ScoreParams, load_extractor, score_images
from contradiff.evaluation.frechet import frechet_distance
from contradiff.evaluation.images import generated_batches, reference_batches
from contradiff.evaluation.inception_score import inception_score

IMAGES, SAMPLES, EXTRACTOR = Path("build/shards"), Path("build/samples"), Path("build/extractor")


class Params(Section):
    seed: Seed
    data: DataParams
    score: ScoreParams


def main(params: Params, run: Run) -> None:
    extractor = load_extractor(EXTRACTOR, device=run.device)
    size, batch_size = params.data.image_size, params.score.batch_size
    num_reference = ShardIndex.read(IMAGES).num_samples("val")
    samples = ShardIndex.read(SAMPLES)
    num_samples = samples.num_samples("sample")
    reference = f"{num_reference} val images, centre crop {size} px"
    with run.progress("features", num_reference + num_samples) as advance:
        done = 0

        def on_progress(total: int) -> None:
            nonlocal done
            advance(total - done)
            done = total

        real = (
            images
            for images, _ in reference_batches(
                IMAGES, split="val", image_size=size, batch_size=batch_size
            )
        )
        real_statistics, _ = score_images(
            real, extractor, reference=reference, on_progress=on_progress
        )
        done = 0
        statistics, probabilities = score_images(
            generated_batches(SAMPLES, batch_size=batch_size),
            extractor,
            reference=f"{num_samples} samples",
            on_progress=on_progress,
        )
    mean, std = inception_score(probabilities, splits=params.score.splits)
    fid = frechet_distance(statistics, real_statistics)
    run.log(f"FID ({extractor.name}) {fid:.2f}, IS {mean:.2f} ± {std:.2f}")
    run.write_json(
        Path("metrics/score.json"),
        {
            "score": {
                "fid": fid,
                "inception_score": mean,
                "inception_score_std": std,
                "num_samples": num_samples,
                "condition": samples.facts["condition"],
                "guidance": samples.facts["guidance"],
                "num_reference": num_reference,
                "reference": reference,
                "extractor": extractor.name,
                "extractor_accuracy": extractor.card.val_accuracy,
                "resizer": extractor.resizer,
                "seed": params.seed,
            }
        },
    )


if __name__ == "__main__":
    execute(Params, main)
