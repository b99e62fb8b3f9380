"""extractor: train a classifier or copy Inception; the scores use the features of this network."""

from stages.runtime.run import Run, execute

from pathlib import Path

from contradiff.config import Section, Seed
from contradiff.data.params import DataParams
from contradiff.data.shard_info import ImageInfo
from contradiff.data.shards import ShardIndex
from contradiff.evaluation.classifier import train_classifier
from contradiff.evaluation.extractors import read_extractor_card, save_classifier, save_inception
from contradiff.evaluation.inception_files import download_inception
from contradiff.evaluation.measuring import real_images
from contradiff.evaluation.params import ExtractorParams

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
    size, num_workers = params.data.image_size, run.runtime.num_workers
    images_and_labels = [
        tensor.to(run.device)
        for split in ("train", "val")
        for tensor in real_images(IMAGES, split, image_size=size, num_workers=num_workers)
    ]
    val_count = index.num_samples("val")
    epoch_steps = index.num_samples("train") // settings.batch_size
    with run.progress("train the classifier", settings.epochs * epoch_steps, "step") as advance:
        classifier, accuracy = train_classifier(
            *images_and_labels,
            num_classes=len(index.info.class_ids),
            seed=params.seed,
            on_epoch=lambda loss: advance(epoch_steps, loss=f"{loss:.3f}"),
            **settings.model_dump(include={"width", "epochs", "batch_size", "lr"}),
        )
    run.log(f"the classifier's accuracy is {accuracy:.1%} on {val_count} val images")
    save_classifier(
        EXTRACTOR,
        classifier,
        image_size=size,
        val_accuracy=accuracy,
        val_count=val_count,
        val_chance=images_and_labels[3].bincount().max().item() / val_count,
    )
    if weakness := read_extractor_card(EXTRACTOR).weakness:
        run.log(f"the stage `score` will give no scores: {weakness}")


if __name__ == "__main__":
    execute(Params, main)
