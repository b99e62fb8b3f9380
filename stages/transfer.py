"""transfer: few-shot classification of another data set, by default from frozen features (Table 6).

Runs on as many processes as `python -m stages.transfer` starts; the result is the same.
"""

from stages.runtime.run import Run, execute

from pathlib import Path

from contradiff.config import Section, Seed
from contradiff.data.params import DataParams
from contradiff.downstream.transfer import (
    TransferParams,
    TransferTask,
    describe_splits,
    encoder_of,
    features_of_rows,
    finetune_splits,
    score_splits,
    transfer_metrics,
)
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
    transfer: TransferParams


def main(params: Params, run: Run) -> None:
    processes, settings = run.processes(run.accelerator()), params.transfer
    features = params.features.model_copy(update={"more_triples": [], "more_blocks": []})
    models = ModelFolders(CHECKPOINT, BASE, run.root)
    model = load_feature_model(features, models, seed=params.seed, device=run.device)
    size = params.data.image_size
    encode = encoder_of(model, base=BASE, image_size=size, device=run.device)
    images = TransferSet.reopen(MANIFEST, project=run.root)
    task = TransferTask.open(
        images,
        settings,
        image_size=model.uncropped_size if isinstance(model, TimmFeatures) else size,
        seed=params.seed,
    )
    test_rows = range(len(task.test.labels))
    num_own = (len(task.used) + len(test_rows)) // processes.size
    with run.progress("features", num_own) as advance:
        train, test = (
            features_of_rows(
                model,
                encode,
                split,
                rows,
                batch_size=features.batch_size,
                processes=processes,
                on_progress=advance,
            )
            for split, rows in ((task.pool, task.used), (task.test, test_rows))
        )
    finetuned: list[float] = []
    if settings.finetune_epochs:
        num_own = settings.finetune_epochs * len(task.splits) // processes.size
        with run.progress("fine-tune", num_own, "epoch") as advance:
            finetuned = finetune_splits(
                task,
                load_checkpoint(CHECKPOINT, base=BASE).to(run.device),
                encode,
                features=features,
                params=settings,
                seed=params.seed,
                device=run.device,
                processes=processes,
                on_epoch=lambda _, row: advance(1, loss=f"{row['loss']:.3f}"),
            )
    if not run.is_main:
        return
    scores = score_splits(task, train, test, params=settings)
    for top1, tuned in zip(scores, finetuned, strict=False):
        top1["finetuned"] = tuned
    run.write_json(Path("build/transfer/splits.json"), {"splits": describe_splits(task, scores)})
    total = len(test_rows)
    metrics = transfer_metrics(task.splits, scores, total=total, source=images.source)
    for shots, kinds in metrics["by_shots"].items():
        shown = ", ".join(f"{name} {kinds[name]['mean']:.1%}" for name in scores[0])
        run.log(f"{shots} shots: top-1 {shown} on {total} test images")
    run.write_json(Path("metrics/transfer.json"), {"transfer": metrics})


if __name__ == "__main__":
    execute(Params, main, parallel=True)
