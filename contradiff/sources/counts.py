"""What the numbers of images decide. The stage `prepare` checks it, hours before it matters.

Images that turn out to be unreadable later lower the numbers. The stages then refuse them too.
"""

from collections.abc import Iterator, Mapping
from typing import Literal

from pydantic import Field

from contradiff.config import Section
from contradiff.data.subsets import is_dev
from contradiff.sources.listing import ImageFile

MIN_SEPARABLE = 4
"""The stage `separability` needs as many validation images."""


class CountParams(Section):
    """The parameters that the numbers of images limit. Some stages use them much later."""

    epochs: int = Field(alias="pretrain.epochs")
    batch_size: int = Field(alias="pretrain.batch_size")
    class_epochs: int = Field(alias="class_condition.epochs")
    class_batch_size: int = Field(alias="class_condition.batch_size")
    max_quarantined: float = Field(alias="ingest.max_quarantined")
    probe_split: Literal["val", "dev"] = Field(alias="probe.split")
    probe_batch_size: int = Field(alias="probe.batch_size")
    probe_cs: list[float] = Field(alias="probe.cs")
    extractor_kind: Literal["classifier", "inception"] = Field(alias="extractor.kind")
    extractor_width: int = Field(alias="extractor.width")
    extractor_batch_size: int = Field(alias="extractor.batch_size")
    reference_split: Literal["val", "train"] = Field(alias="reference.split")
    kid_subset_size: int = Field(alias="score.kid_subset_size")
    transfer_batch_size: int = Field(alias="transfer.batch_size")
    transfer_cs: list[float] = Field(alias="transfer.cs")
    shots: list[int | Literal["full"]] = Field(alias="transfer.shots")


Fault = tuple[str, str]
"""A dotted key, and what is wrong."""
Splits = Mapping[str, tuple[ImageFile, ...]]
"""The splits of a `Listing`."""


def count_faults(params: CountParams, splits: Splits) -> Iterator[Fault]:
    """Yield each fault of the images that train, test and judge the model."""
    for split, files in splits.items():
        empty = [file.path for file in files if file.num_bytes == 0 and not file.is_estimate]
        if len(empty) > params.max_quarantined * len(files):
            which = f"{len(empty)} of {len(files)} {split} images are empty files, such as"
            yield "ingest.max_quarantined", f"{which} {empty[0]}; repair or delete them"
    yield from _training_faults(params, len(splits["train"]))
    yield from _probe_faults(params, splits["train"])
    yield from _score_faults(params, len(splits[params.reference_split]))
    if (num_val := len(splits["val"])) < MIN_SEPARABLE:
        few = f"{num_val} validation images are too few for the stage `separability`"
        yield "data.root", f"{few}; provide at least {MIN_SEPARABLE}"


def _training_faults(params: CountParams, num_train: int) -> Iterator[Fault]:
    more = f"is more than the {num_train} training images; lower it"
    if params.epochs and params.batch_size > num_train:
        yield "pretrain.batch_size", f"{params.batch_size} {more}"
    if params.class_epochs and params.class_batch_size > num_train:
        yield "class_condition.batch_size", f"{params.class_batch_size} {more}"
    if params.extractor_kind == "classifier" and params.extractor_batch_size > num_train:
        yield "extractor.batch_size", f"{params.extractor_batch_size} {more}"


def _probe_faults(params: CountParams, train: tuple[ImageFile, ...]) -> Iterator[Fault]:
    is_tested_on_dev, num_train = params.probe_split == "dev", len(train)
    num_dev = sum(is_dev(file.key) for file in train)
    if num_dev in {0, num_train} and (is_tested_on_dev or params.probe_cs):
        held_out = f"{num_dev} of {num_train} training images are in the dev split"
        if is_tested_on_dev:
            yield "probe.split", f"{held_out}; use more images, or set it to val"
        else:
            remedy = "use more images, or set probe.headline to sgd, probe.cs and few_labels to []"
            yield "probe.cs", f"C is chosen on held-out images, but {held_out}; {remedy}"
    elif params.probe_cs and len({file.label for file in train}) < 2:
        yield "probe.cs", "logistic regression needs two classes, but data.root has one"
    num_probed = num_train - num_dev if is_tested_on_dev else num_train
    if fault := _batch_of_one(num_probed, params.probe_batch_size):
        yield "probe.batch_size", fault


def _score_faults(params: CountParams, reference: int) -> Iterator[Fault]:
    is_classifier = params.extractor_kind == "classifier"
    num_features = 2 * params.extractor_width if is_classifier else 2048
    if reference < num_features:
        few = f"FID needs {num_features} images of split {params.reference_split}, as many as the"
        remedy = "use the larger split, add images, or lower extractor.width"
        yield (
            "reference.split",
            f"{few} extractor has features, but there are {reference}; {remedy}",
        )
    if params.kid_subset_size > reference:
        which = f"is more than the {reference} images of reference.split ({params.reference_split})"
        yield "score.kid_subset_size", f"{params.kid_subset_size} {which}; lower it"


def transfer_faults(params: CountParams, class_counts: Mapping[int, int]) -> Iterator[Fault]:
    """Yield each fault of transfer's training images. `class_counts`: label => their number."""
    counts = [number for number in params.shots if number != "full"]
    smallest = min(class_counts, key=lambda label: class_counts[label])
    if counts and max(counts) > class_counts[smallest]:
        has = f"class {smallest} has only {class_counts[smallest]} images"
        yield "transfer.shots", f"{max(counts)} is too large: {has}; lower transfer.shots"
    for shots in params.shots:
        total = sum(class_counts.values()) if shots == "full" else shots * len(class_counts)
        if fault := _batch_of_one(total, params.transfer_batch_size):
            yield "transfer.batch_size", f"{fault} (transfer.shots: {shots})"
    if params.transfer_cs and len(class_counts) < 2:
        yield "transfer.cs", "logistic regression needs two classes, but transfer_data.root has one"


def _batch_of_one(num_images: int, batch_size: int) -> str | None:
    """Say that a batch would have one image, if the images are divided evenly among batches."""
    num_batches = -(-num_images // batch_size)
    if num_images // max(1, num_batches) >= 2:
        return None
    left = f"{num_images} training images in batches of {batch_size} leave a batch of one image"
    return f"{left}, which BatchNorm cannot normalise; raise it"
