"""extractor: the network that scores are made of: a classifier trained here, or given Inception."""

from stages.runtime.run import Run, execute

from collections.abc import Mapping
from pathlib import Path

import torch

from contradiff.config import Section, Seed
from contradiff.data.params import DataParams
from contradiff.data.shard_info import ImageInfo
from contradiff.data.shards import ShardIndex
from contradiff.evaluation.classifier import train_classifier
from contradiff.evaluation.extractors import ExtractorParams, save_classifier, save_inception
from contradiff.evaluation.images import reference_batches
from contradiff.evaluation.inception import download_inception

IMAGES, EXTRACTOR = Path("build/shards"), Path("build/extractor")


class Params(Section):
    seed: Seed
    data: DataParams
    extractor: ExtractorParams


def main(params: Params, run: Run) -> None:
    settings = params.extractor
    if settings.weights is not None:
        weights = run.resolve(settings.weights)
        if settings.download:
            download_inception(weights)
        save_inception(EXTRACTOR, weights, resizers=settings.resizers)
        return
    index = ShardIndex.read(IMAGES, ImageInfo)
    size = params.data.image_size
    loaded: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for split in ("train", "val"):
        batches = list(reference_batches(IMAGES, split=split, image_size=size, batch_size=500))
        images = torch.cat([images for images, _ in batches]).to(run.device)
        loaded[split] = images, torch.cat([labels for _, labels in batches]).to(run.device)
    num_steps = settings.epochs * (index.num_samples("train") // settings.batch_size)
    with run.progress("train the classifier", num_steps, "step") as advance:
        done = 0

        def on_progress(step: int, values: Mapping[str, float]) -> None:
            nonlocal done
            advance(step - done, loss=f"{values['loss']:.3f}")
            done = step

        classifier, accuracy = train_classifier(
            *loaded["train"],
            *loaded["val"],
            num_classes=len(index.info.class_ids),
            width=settings.width,
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            lr=settings.lr,
            seed=params.seed,
            on_progress=on_progress,
        )
    val_count = index.num_samples("val")
    run.log(f"accuracy {accuracy:.1%} on {val_count} val images")
    save_classifier(
        EXTRACTOR, classifier, image_size=size, val_accuracy=accuracy, val_count=val_count
    )


if __name__ == "__main__":
    execute(Params, main)
