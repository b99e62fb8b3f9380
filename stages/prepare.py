"""prepare: all that is given => manifests. Renders the embedded default's images; checks the rest.

Raw data and given weights lie under the project's root, outside DVC: a manifest stands for each.
"""

from stages.runtime.run import Run, execute

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from contradiff.base.config import BaseParams, base_manifest
from contradiff.config import Section, Seed
from contradiff.data.params import DataParams, RawParams
from contradiff.data.subsets import k_shot_split
from contradiff.files import file_manifest
from contradiff.sources.imagenet import Manifest
from contradiff.sources.raw import ensure_images, ensure_transfer_archive, transfer_manifest
from contradiff.sources.transfer_set import TransferDataParams, TransferSplit, read_transfer_split


class Params(Section):
    seed: Seed
    data: DataParams
    raw: RawParams
    transfer_data: TransferDataParams
    base: BaseParams
    inception_weights: str | None = Field(alias="extractor.weights")
    inception_download: bool = Field(alias="extractor.download")
    timm_name: str | None = Field(alias="features.timm_name")
    timm_weights: str | None = Field(alias="features.timm_weights")
    # checked against what there is, days before they are used
    epochs: int = Field(alias="pretrain.epochs")
    batch_size: int = Field(alias="pretrain.batch_size")
    class_epochs: int = Field(alias="class_condition.epochs")
    class_batch_size: int = Field(alias="class_condition.batch_size")
    shots: list[int | Literal["full"]] = Field(alias="transfer.shots")


def main(params: Params, run: Run) -> None:
    weights, faults = scan_weights(params, run)
    manifest: Manifest | None = None
    archive: Path | None = None
    try:
        manifest = scan_images(params, run)
        check_batch_sizes(params, num_train=len(manifest.splits["train"]))
    except ValueError as error:
        faults.append(str(error))
    try:
        archive = scan_transfer(params, run)
    except ValueError as error:
        faults.append(str(error))
    if manifest is None or archive is None or faults:
        raise ValueError("\n".join(faults))  # all that is missing, at once
    for split, files in manifest.splits.items():
        number, place = len(manifest.class_ids), params.data.root
        run.log(f"{len(files)} {split} images of {number} classes in {place}")
    manifest.write(Path("build/manifest/images.json"))
    for name, found in weights.items():
        run.write_json(Path(f"build/manifest/{name}.json"), found)
    run.write_json(
        Path("build/manifest/transfer.json"),
        transfer_manifest(
            archive, source=params.transfer_data.source, shown_root=params.transfer_data.root
        ),
    )


def scan_weights(params: Params, run: Run) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Manifests of the base, Inception and the timm backbone, as far as they are given; faults."""
    found: dict[str, dict[str, Any]] = {"base": {}, "extractor": {}, "timm": {}}
    faults: list[str] = []
    try:
        found["base"] = base_manifest(params.base, root=run.root)
    except ValueError as error:
        faults.append(str(error))
    given = {"timm": ("features.timm_weights", params.timm_weights)}
    if not params.inception_download:
        given["extractor"] = ("extractor.weights", params.inception_weights)
    for name, (key, shown) in given.items():
        if shown is None:
            continue
        path = run.resolve(shown)
        if path.is_file():
            found[name] = {"path": shown, "files": file_manifest(path.parent, [path.name])}
        elif name == "extractor":
            from contradiff.evaluation.inception import no_weights

            faults.append(no_weights(f"{key}: no file {shown}"))
        else:
            faults.append(
                f"{key}: no file {shown}; fetch it, or set features.timm_pretrained: true"
            )
    if params.timm_name is not None:
        import timm

        if not timm.is_model(params.timm_name):
            name = params.timm_name
            faults.append(f"features.timm_name: timm {timm.__version__} knows no {name!r}")
    return found, faults


def scan_images(params: Params, run: Run) -> Manifest:
    data = params.data
    total = (data.num_train or 0) + (data.num_val or 0)
    with run.progress("render images", total) as advance:
        root = ensure_images(run.resolve(data.root), data, seed=params.seed, on_progress=advance)
    return Manifest.scan(
        root,
        shown_root=data.root,
        layout=data.layout,
        cache=run.root / ".work/archives",
        verify=params.raw.verify,
        on_message=run.log,
    )


def check_batch_sizes(params: Params, *, num_train: int) -> None:
    """Refuse a batch of more images than there are."""
    settings = {
        "pretrain": (params.epochs, params.batch_size),
        "class_condition": (params.class_epochs, params.class_batch_size),
    }
    faults = [
        f"{section}.batch_size: {batch_size} is more than the {num_train} training images in "
        f"{params.data.root}; lower it"
        for section, (epochs, batch_size) in settings.items()
        if epochs and batch_size > num_train
    ]
    if faults:
        raise ValueError("\n".join(faults))


def scan_transfer(params: Params, run: Run) -> Path:
    """Where the transfer set is, once it is known to be whole and of enough images."""
    data = params.transfer_data
    root = ensure_transfer_archive(run.resolve(data.root), data, seed=params.seed)
    splits: dict[str, TransferSplit] = {
        split: read_transfer_split(
            root,
            source=data.source,
            split=split,
            image_size=params.data.image_size,
            shown_root=data.root,
        )
        for split in ("train", "test")
    }
    labels = splits["train"].labels.tolist()
    for shots in sorted(shots for shots in params.shots if shots != "full"):
        k_shot_split(labels, shots=shots, seed=params.seed)
    for split, content in splits.items():
        number = len(content.class_names)
        run.log(f"{len(content.labels)} {split} images of {number} classes in {data.root}")
    return root


if __name__ == "__main__":
    execute(Params, main)
