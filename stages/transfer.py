"""transfer: few-shot classification of another data set, by default from frozen features (Table 6).

Runs on as many processes as `python -m stages.transfer` starts; the result is the same.
"""

from stages.runtime.run import Run, execute

from pathlib import Path

from contradiff.config import Section, Seed
from contradiff.data.params import DataParams
from contradiff.downstream.transfer import (
    Shots,
    TransferParams,
    TransferScores,
    TransferTask,
    describe_splits,
    encoder_of,
    features_of_rows,
    finetune_splits,
    score_splits,
    transfer_metrics,
)
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
    model = load_feature_model(
        features,
        checkpoint=CHECKPOINT,
        base=BASE,
        seed=params.seed,
        device=run.device,
        root=run.root,
    )
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
                images,
                rows,
                batch_size=features.batch_size,
                processes=processes,
                on_progress=advance,
            )
            for images, rows in ((task.pool, task.used), (task.test, test_rows))
        )
    finetuned: dict[Shots, TransferScores] = {}
    if settings.finetune_epochs:
        num_own = settings.finetune_epochs * sum(map(len, task.splits.values())) // processes.size
        with run.progress("fine-tune", num_own, "epoch") as advance:
            finetuned = finetune_splits(
                task,
                load_checkpoint(CHECKPOINT, base=BASE).to(run.device),
                encode,
                features=features,
                params=settings,
                device=run.device,
                processes=processes,
                on_epoch=lambda _, row: advance(1, loss=f"{row['loss']:.3f}"),
            )
    if not run.is_main:
        return
    scores = score_splits(task, train, test, params=settings)
    for shots, kinds in scores.items():
        if shots in finetuned:
            kinds["finetuned"] = finetuned[shots]
        shown = ", ".join(f"{name} {kind.mean:.1%}" for name, kind in kinds.items())
        run.log(f"{shots} shots: top-1 {shown} on {len(test_rows)} test images")
    run.write_json(Path("build/transfer/splits.json"), {"splits": describe_splits(task, scores)})
    metrics = transfer_metrics(scores, total=len(test_rows), source=images.source)
    run.write_json(Path("metrics/transfer.json"), {"transfer": metrics})


if __name__ == "__main__":
    execute(Params, main, parallel=True)
