"""transfer: classify another data set, with few training images and frozen features (Table 6).

If transfer.finetune_epochs is above 0, the stage also fine-tunes the model. Several processes can
share the work.
"""

from stages.runtime.run import Run, execute

from functools import partial
from pathlib import Path

from contradiff.base.loading import load_vae
from contradiff.config import Seed
from contradiff.data.params import DataParams
from contradiff.downstream.params import TransferParams
from contradiff.downstream.transfer import TransferTask, transfer_metrics
from contradiff.features.batches import encode_images
from contradiff.features.cache import ModelFolders
from contradiff.features.models import load_feature_model
from contradiff.features.params import FeaturesParams
from contradiff.features.spread import check_spread
from contradiff.features.timm_backbone import TimmFeatures
from contradiff.method.checkpoint import load_checkpoint
from contradiff.method.params import Architecture
from contradiff.sources.transfer_set import TransferSet

MANIFEST = Path("build/manifest/transfer.json")
BASE, CHECKPOINT = Path("build/base"), Path("build/pretrain")


class Params(Architecture):
    seed: Seed
    data: DataParams
    features: FeaturesParams
    transfer: TransferParams


def main(params: Params, run: Run) -> None:
    processes, settings, device = run.processes(run.accelerator()), params.transfer, run.device
    features = params.features.model_copy(update={"more_triples": [], "more_blocks": []})
    models = ModelFolders(CHECKPOINT, BASE, run.root, params)
    model = load_feature_model(features, models, params.seed, device)
    if isinstance(model, TimmFeatures):
        encode, size = model.show, model.uncropped_size
    else:
        size = params.data.image_size
        vae = load_vae(BASE).to(device)  # pyright: ignore[reportArgumentType]
        encode = partial(encode_images, vae, size=size)
    images = TransferSet.reopen(MANIFEST, project=run.root)
    pool, judged = (images.split(name, image_size=size) for name in ("train", "test"))
    task = TransferTask(pool, judged, encode, settings, features, params.seed, processes)
    total = len(judged.labels)
    with run.progress("features", (len(task.used) + total) // processes.size) as advance:
        train = task.compute_features(model, pool, task.used, advance)
        test = task.compute_features(model, judged, range(total), advance)
    for own, split in ((train, "training"), (test, "test")):
        check_spread(own.features, name=f"features of the {split} images of {images.root}")
    finetuned: list[float] = []
    if settings.finetune_epochs:
        num_own = settings.finetune_epochs * len(task.splits) // processes.size
        tuned = load_checkpoint(CHECKPOINT, base=BASE, expected=params).to(device)
        with run.progress("fine-tune", num_own, "epoch") as advance:
            finetuned = task.finetune(
                tuned, device, lambda _, row: advance(1, loss=f"{row['loss']:.3f}")
            )
    if not run.is_main:
        return
    scores = task.score(train, test, run.log)
    for top1, score in zip(scores, finetuned, strict=False):
        top1["finetuned"] = score
    run.write_json(Path("build/transfer/splits.json"), {"splits": task.describe(scores)})
    by_shots = transfer_metrics(task.splits, scores)
    for shots, kinds in by_shots.items():
        shown = ", ".join(f"{name} {kinds[name]['mean']:.1%}" for name in scores[0])
        run.log(f"{shots} shots: top-1 {shown} on {total} test images")
        if "logistic" in kinds and kinds["sgd"]["mean"] < kinds["logistic"]["mean"] - 0.01:
            remedy = "raise transfer.epochs or transfer.lr"
            run.log(
                f"{shots} shots: SGD has not converged, as logistic regression is better; {remedy}"
            )
    shots = settings.shots[0]
    facts: dict[str, object] = {
        "shots": shots,
        "total": total,
        "source": images.source,
        "by_shots": by_shots,
    }
    if any(images.ignored.values()):
        facts["ignored"] = images.ignored
    main = by_shots[str(shots)]
    metrics = main | facts | {"protocol": settings.headline, "top1": main[settings.headline]}
    run.write_json(Path("metrics/transfer.json"), {"transfer": metrics})


if __name__ == "__main__":
    execute(Params, main, parallel=True)
