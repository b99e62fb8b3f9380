"""prepare: raw data and weights => a manifest of each in build/manifest, which DVC tracks.

It renders the embedded default's images. Everything else is only checked.
"""

from stages.runtime.run import Run, execute

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from contradiff.base.config import BaseParams, base_manifest
from contradiff.config import Section, Seed
from contradiff.data.params import DataParams, RawParams
from contradiff.files import file_manifest
from contradiff.sources.imagenet import scan_images
from contradiff.sources.transfer_set import TransferDataParams, TransferSet
from contradiff.toy.rendered import ensure_digits, ensure_images

HOW_TO_GET = {
    "extractor.weights": "fetch it (docs/scores.md says where), or set extractor.download: true "
    "where there is a network, or extractor.kind: classifier",
    "features.timm_weights": "fetch it, or set features.timm_pretrained: true",
}


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
    # checked against the data, days before they are used
    epochs: int = Field(alias="pretrain.epochs")
    batch_size: int = Field(alias="pretrain.batch_size")
    class_epochs: int = Field(alias="class_condition.epochs")
    class_batch_size: int = Field(alias="class_condition.batch_size")
    shots: list[int | Literal["full"]] = Field(alias="transfer.shots")


def main(params: Params, run: Run) -> None:
    faults: list[str] = []
    if params.timm_name is not None:
        import timm

        if not timm.is_model(params.timm_name):
            version = timm.__version__
            faults.append(f"features.timm_name: timm {version} knows no {params.timm_name!r}")
    inception = None if params.inception_download else params.inception_weights
    makers: dict[str, Callable[[], dict[str, Any]]] = {
        "base": partial(base_manifest, params.base, root=run.root),
        "extractor": partial(weights_manifest, "extractor.weights", inception, run),
        "timm": partial(weights_manifest, "features.timm_weights", params.timm_weights, run),
        "images": partial(images_manifest, params, run),
        "transfer": partial(transfer_manifest, params, run),
    }
    manifests: dict[str, dict[str, Any]] = {}
    for name, make in makers.items():
        try:
            manifests[name] = make()
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise ValueError("\n".join(faults))  # all of them at once
    for name, manifest in manifests.items():
        run.write_json(Path(f"build/manifest/{name}.json"), manifest)


def weights_manifest(key: str, given: str | None, run: Run) -> dict[str, Any]:
    if given is None:
        return {}
    path = run.resolve(given)
    if not path.is_file():
        raise ValueError(f"{key}: no file {given}; {HOW_TO_GET[key]}")
    return {"path": given, "files": file_manifest(path.parent, [path.name])}


def images_manifest(params: Params, run: Run) -> dict[str, Any]:
    data, root = params.data, run.resolve(params.data.root)
    if data.source == "toy":
        total = (data.num_train or 0) + (data.num_val or 0)
        with run.progress("render images", total) as advance:
            root = ensure_images(root, data, seed=params.seed, on_progress=advance)
    index, verify = run.root / ".work/archives", params.raw.verify
    images = scan_images(
        root, layout=data.layout, index_folder=index, verify=verify, on_message=run.log
    )
    manifest = images.manifest(project=run.root)
    num_train = manifest["num_images"]["train"]
    sizes = {
        "pretrain.batch_size": params.batch_size if params.epochs else 0,
        "class_condition.batch_size": params.class_batch_size if params.class_epochs else 0,
    }
    fault = f"is more than the {num_train} training images in {root}; lower it"
    if faults := [f"{key}: {size} {fault}" for key, size in sizes.items() if size > num_train]:
        raise ValueError("\n".join(faults))
    for split, number in manifest["num_images"].items():
        run.log(f"{number} {split} images of {len(manifest['classes'])} classes in {root}")
    return manifest


def transfer_manifest(params: Params, run: Run) -> dict[str, Any]:
    data, root = params.transfer_data, run.resolve(params.transfer_data.root)
    if data.source == "digits":
        root = ensure_digits(root, seed=params.seed)
    images = TransferSet(root, data.source)
    for line in images.check(params.shots, verify=data.verify):
        run.log(line)
    return images.manifest(project=run.root)


if __name__ == "__main__":
    execute(Params, main)
