"""transfer: few-shot classification of another data set, by default from frozen features (Table 6).

Runs on as many processes as `python -m stages.transfer` starts; the result is
the same.
"""

from stages.runtime.run import Run, execute

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from contradiff.base.loading import load_vae
from contradiff.config import Section, Seed
from contradiff.data.params import DataParams
from contradiff.downstream.finetuning import EncodedImages, finetune, finetuned_top1, weights_kept
from contradiff.downstream.transfer import (
    Shots,
    TransferParams,
    TransferScores,
    compact_splits,
    draw_splits,
    summarise,
    transfer,
    transfer_metrics,
)
from contradiff.downstream.transfer_features import (
    Encode,
    batch_share_of,
    gather_features,
    transfer_batches,
)
from contradiff.features.choice import features_of_all, load_feature_model
from contradiff.features.extraction import CleanBatch, FeatureSet, encoded_batches
from contradiff.features.models import FeatureModel
from contradiff.features.params import FeaturesParams
from contradiff.features.timm_backbone import TimmFeatures
from contradiff.method.checkpoint import load_checkpoint
from contradiff.method.model import ContraDiff
from contradiff.sources.raw import ensure_transfer_archive, read_manifest, transfer_manifest
from contradiff.sources.transfer_set import TransferDataParams, TransferSplit, read_transfer_split

MANIFEST = Path("build/manifest/transfer.json")
BASE, CHECKPOINT = Path("build/base"), Path("build/pretrain")


class Params(Section):
    seed: Seed
    data: DataParams
    features: FeaturesParams
    transfer_data: TransferDataParams
    transfer: TransferParams


def main(params: Params, run: Run) -> None:
    accelerator = run.accelerator()
    featured = load_feature_model(
        params.features.model_copy(update={"more_triples": [], "more_blocks": []}),
        checkpoint=CHECKPOINT,
        base=BASE,
        keep_maps=False,
        seed=params.seed,
        device=run.device,
        root=run.root,
    )
    image_size = params.data.image_size
    if isinstance(featured, TimmFeatures):
        image_size = featured.uncropped_size
    pool, test = open_splits(params, run, image_size=image_size)
    settings = params.transfer
    splits: dict[Shots, list[list[int]]] = {
        shots: draw_splits(
            pool.labels.tolist(), shots=shots, num_splits=settings.num_splits, seed=params.seed
        )
        for shots in settings.shots
    }
    used, rows = compact_splits(splits)
    encode = encoder_of(featured, params, run)

    def batches(images: TransferSplit, chosen: Sequence[int], share: range) -> Iterator[CleanBatch]:
        return transfer_batches(
            encode, images, chosen, share=share, batch_size=params.features.batch_size
        )

    def features_of(images: TransferSplit, chosen: Sequence[int], name: str) -> FeatureSet:
        share = batch_share_of(
            len(chosen),
            batch_size=params.features.batch_size,
            rank=accelerator.process_index,
            num_processes=accelerator.num_processes,
        )
        with run.progress(f"{name} features", len(share)) as advance:
            part = (
                features_of_all(featured, batches(images, chosen, share), on_progress=advance)
                if share
                else None
            )
        return gather_features(part)

    everything = range(len(test.labels))
    train_features = features_of(pool, used, "train")
    test_features = features_of(test, everything, "test")
    finetuned: Mapping[Shots, list[float]] = {}
    if settings.finetune_epochs:
        finetuned = finetune_all(
            load_checkpoint(CHECKPOINT, base=BASE).to(run.device),
            EncodedImages.of(batches(pool, used, range(len(used)))),
            EncodedImages.of(batches(test, everything, everything)),
            rows=rows,
            num_classes=len(pool.class_names),
            params=params,
            run=run,
            processes=(accelerator.process_index, accelerator.num_processes),
        )
    if not accelerator.is_main_process:
        return
    scores: dict[Shots, dict[str, TransferScores]] = {}
    for shots in settings.shots:
        result = transfer(
            train_features.features,
            train_features.labels,
            test_features.features,
            test_features.labels,
            splits=rows[shots],
            num_classes=len(pool.class_names),
            params=settings,
            seed=params.seed,
        )
        scores[shots] = {"ridge": result.ridge, "sgd": result.probe}
        if shots in finetuned:
            scores[shots]["finetuned"] = summarise(finetuned[shots])
        shown = ", ".join(f"{name} {kind.mean:.1%}" for name, kind in scores[shots].items())
        run.log(f"{shots} shots: top-1 {shown} on {result.total} test images")
    drawn = {
        str(shots): [
            {
                "seed": params.seed + index,
                "indices": split,
                "keys": [pool.keys[row] for row in split],
                "top1": {name: kind.top1[index] for name, kind in scores[shots].items()},
            }
            for index, split in enumerate(group)
        ]
        for shots, group in splits.items()
    }
    run.write_json(Path("build/transfer/splits.json"), {"splits": drawn})
    metrics = transfer_metrics(scores, total=len(test.labels), source=params.transfer_data.source)
    run.write_json(Path("metrics/transfer.json"), {"transfer": metrics})


def encoder_of(featured: FeatureModel, params: Params, run: Run) -> Encode:
    """What a feature model sees of an image: its latent, or pixels at the backbone's own size."""
    if isinstance(featured, TimmFeatures):
        return featured.show
    return partial(
        encoded_batches,
        load_vae(BASE).to(run.device),  # pyright: ignore[reportArgumentType]
        image_size=params.data.image_size,
        batch_size=params.features.batch_size,
        device=run.device,
    )


def open_splits(
    params: Params, run: Run, *, image_size: int
) -> tuple[TransferSplit, TransferSplit]:
    """The training pool and the test set, if they are what `prepare` has seen."""
    data = params.transfer_data
    root = ensure_transfer_archive(run.resolve(data.root), data, seed=params.seed)
    if transfer_manifest(root, source=data.source, shown_root=data.root) != read_manifest(MANIFEST):
        raise ValueError(
            f"transfer_data.root: {data.root} has changed since {MANIFEST}; "
            "run `dvc repro -f prepare`"
        )
    read = partial(
        read_transfer_split,
        root,
        source=data.source,
        image_size=image_size,
        shown_root=data.root,
    )
    return read(split="train"), read(split="test")


def finetune_all(
    model: ContraDiff,
    train: EncodedImages,
    test: EncodedImages,
    *,
    rows: Mapping[Shots, Sequence[Sequence[int]]],
    num_classes: int,
    params: Params,
    run: Run,
    processes: tuple[int, int],
) -> dict[Shots, list[float]]:
    """Test accuracy of each split's own copy of the model; the processes take turns with splits."""
    from accelerate.utils import gather_object

    settings = params.transfer
    jobs: list[tuple[Shots, int]] = [
        (shots, index) for shots, group in rows.items() for index in range(len(group))
    ]
    rank, num_processes = processes
    mine = jobs[rank::num_processes]
    done: list[tuple[Shots, int, float]] = []
    with run.progress("fine-tune", len(mine) * settings.finetune_epochs, "epoch") as advance:
        for shots, index in mine:
            with weights_kept(model):
                classifier = finetune(
                    model,
                    train[torch.tensor(rows[shots][index])],
                    num_classes=num_classes,
                    features=params.features,
                    epochs=settings.finetune_epochs,
                    lr=settings.finetune_lr,
                    weight_decay=settings.finetune_weight_decay,
                    batch_size=settings.finetune_batch_size,
                    seed=params.seed + index,
                    device=run.device,
                    on_epoch=lambda _, losses: advance(1, loss=f"{losses['loss']:.3f}"),
                )
                score = finetuned_top1(
                    model,
                    classifier,
                    test,
                    features=params.features,
                    seed=params.seed,
                    device=run.device,
                )
            done.append((shots, index, score))
    found = {(shots, index): score for shots, index, score in gather_object(done)}
    return {
        shots: [found[shots, index] for index in range(len(group))] for shots, group in rows.items()
    }


if __name__ == "__main__":
    execute(Params, main, parallel=True)
