"""transfer: few-shot classification of another data set, by default from frozen features (Table 6).

Runs on as many processes as `python -m stages.transfer` starts; the result is the same.
"""

from stages.runtime.run import Run, execute

from functools import partial
from pathlib import Path

from contradiff.base.loading import load_vae
from contradiff.config import Section, Seed
from contradiff.data.params import DataParams
from contradiff.downstream import transfer as few_shot
from contradiff.features.batches import encode_images
from contradiff.features.cache import ModelFolders
from contradiff.features.models import load_feature_model
from contradiff.features.params import FeaturesParams
from contradiff.features.timm_backbone import TimmFeatures
from contradiff.method.checkpoint import load_checkpoint
from contradiff.sources.transfer_set import TransferSet

MANIFEST = Path("build/manifest/transfer.json")
BASE, CHECKPOINT = Path("build/base"), Path("build/pretrain")


class Params(Section):
    seed: Seed
    data: DataParams
    features: FeaturesParams
    transfer: few_shot.TransferParams


def main(params: Params, run: Run) -> None:
    processes, settings, device = run.processes(run.accelerator()), params.transfer, run.device
    features = params.features.model_copy(update={"more_triples": [], "more_blocks": []})
    models = ModelFolders(CHECKPOINT, BASE, run.root)
    model = load_feature_model(features, models, seed=params.seed, device=device)
    if isinstance(model, TimmFeatures):
        encode, size = model.show, model.uncropped_size
    else:
        size = params.data.image_size
        vae = load_vae(BASE).to(device)  # pyright: ignore[reportArgumentType]
        encode = partial(encode_images, vae, image_size=size, device=device)
    images = TransferSet.reopen(MANIFEST, project=run.root)
    pool, judged = (images.split(name, image_size=size) for name in ("train", "test"))
    splits = few_shot.draw_splits(pool.labels.tolist(), settings, seed=params.seed)
    task = few_shot.TransferTask(pool, judged, splits)
    total = len(judged.labels)
    with run.progress("features", (len(task.used) + total) // processes.size) as advance:
        train, test = (
            few_shot.features_of_rows(
                model,
                encode,
                split,
                rows,
                batch_size=features.batch_size,
                processes=processes,
                on_progress=advance,
            )
            for split, rows in ((pool, task.used), (judged, range(total)))
        )
    finetuned: list[float] = []
    if settings.finetune_epochs:
        num_own = settings.finetune_epochs * len(splits) // processes.size
        with run.progress("fine-tune", num_own, "epoch") as advance:
            finetuned = few_shot.finetune_splits(
                task,
                load_checkpoint(CHECKPOINT, base=BASE).to(device),
                encode,
                features=features,
                params=settings,
                seed=params.seed,
                device=device,
                processes=processes,
                on_epoch=lambda _, row: advance(1, loss=f"{row['loss']:.3f}"),
            )
    if not run.is_main:
        return
    scores = few_shot.score_splits(task, train, test, params=settings)
    for top1, tuned in zip(scores, finetuned, strict=False):
        top1["finetuned"] = tuned
    described = few_shot.describe_splits(task, scores)
    run.write_json(Path("build/transfer/splits.json"), {"splits": described})
    by_shots = few_shot.transfer_metrics(splits, scores)
    for shots, kinds in by_shots.items():
        shown = ", ".join(f"{name} {kinds[name]['mean']:.1%}" for name in scores[0])
        run.log(f"{shots} shots: top-1 {shown} on {total} test images")
    headline = {"shots": splits[0].shots, "total": total, "source": images.source}
    metrics = by_shots[str(splits[0].shots)] | headline | {"by_shots": by_shots}
    run.write_json(Path("metrics/transfer.json"), {"transfer": metrics})


if __name__ == "__main__":
    execute(Params, main, parallel=True)
