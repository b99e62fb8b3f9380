"""transfer: 25-shot classification of another data set from frozen features (Table 6)."""

from stages._runtime import Run, execute

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from contradiff.backbone import load_vae
from contradiff.checkpoint import load_checkpoint
from contradiff.config import Section, Seed
from contradiff.data.cifar import TransferDataParams, read_cifar100
from contradiff.data.imagenet import DataParams, read_manifest
from contradiff.data.raw import ensure_transfer_archive, transfer_manifest
from contradiff.extraction import CleanBatch, encoded_batches, extract
from contradiff.features import FeaturesParams
from contradiff.probing import train_linear_probe
from contradiff.transfer import TransferParams, compact_splits, draw_splits, transfer

MANIFEST = Path("build/manifest/transfer.json")


class Params(Section):
    seed: Seed
    data: DataParams
    features: FeaturesParams
    transfer_data: TransferDataParams
    transfer: TransferParams


def main(params: Params, run: Run) -> None:
    root = ensure_transfer_archive(
        run.resolve(params.transfer_data.root), params.transfer_data, seed=params.seed
    )
    if transfer_manifest(root, shown_root=params.transfer_data.root) != read_manifest(MANIFEST):
        msg = (
            f"transfer_data.root: {params.transfer_data.root} has changed since {MANIFEST}; "
            "run `dvc repro -f prepare`"
        )
        raise ValueError(msg)
    pool, test = read_cifar100(root, split="train"), read_cifar100(root, split="test")
    splits = draw_splits(
        pool.labels.tolist(),
        shots=params.transfer.shots,
        num_splits=params.transfer.num_splits,
        seed=params.seed,
    )
    used, rows = compact_splits(splits)

    vae = load_vae(Path("build/base")).to(run.device)  # pyright: ignore[reportArgumentType]
    model = load_checkpoint(Path("build/pretrain"), base=Path("build/base")).to(run.device)

    def batches(images: np.ndarray, labels: np.ndarray) -> Iterator[CleanBatch]:
        return encoded_batches(
            vae,
            torch.from_numpy(images),
            torch.from_numpy(labels),
            image_size=params.data.image_size,
            batch_size=params.features.batch_size,
            device=run.device,
        )

    with run.progress("features", len(used) + len(test.labels)) as advance:
        featured = partial(
            extract,
            model,
            params=params.features,
            pool=params.features.pool,
            seed=params.seed,
            device=run.device,
            on_progress=advance,
        )
        train_features = featured(batches(pool.images[used], pool.labels[used]))
        test_features = featured(batches(test.images, test.labels))
    result = transfer(
        train_features.features,
        train_features.labels,
        test_features.features,
        test_features.labels,
        splits=rows,
        num_classes=len(pool.class_names),
        ridge=params.transfer.ridge,
        train_probe=partial(train_linear_probe, **params.transfer.sgd_settings()),
        seed=params.seed,
    )
    run.write_json(Path("build/transfer/splits.json"), {"splits": splits})
    run.write_json(
        Path("metrics/transfer.json"),
        {
            "transfer": {
                "ridge": {"mean": result.ridge.mean, "std": result.ridge.std},
                "sgd": {"mean": result.probe.mean, "std": result.probe.std},
                "num_splits": params.transfer.num_splits,
                "shots": params.transfer.shots,
                "total": result.total,
                "source": params.transfer_data.source,
            }
        },
    )


if __name__ == "__main__":
    execute(Params, main)
