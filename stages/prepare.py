"""prepare: all that is given => manifests. Renders the embedded default's images; checks the rest.

Raw data and given weights lie outside DVC: a manifest in build/manifest stands for each.
"""

from stages.runtime.run import Run, execute

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from contradiff.base.config import BaseParams, base_manifest
from contradiff.config import Section, Seed
from contradiff.data.params import DataParams, RawParams
from contradiff.files import file_manifest
from contradiff.sources.imagenet import RawImages, check_batch_sizes, scan_images
from contradiff.sources.transfer_set import TransferDataParams, TransferSet
from contradiff.toy.rendered import ensure_digits, ensure_images


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
    manifests: dict[str, dict[str, Any]] = {}
    faults: list[str] = []

    @contextmanager
    def noting_faults() -> Generator[None]:
        try:
            yield
        except ValueError as error:
            faults.append(str(error))

    with noting_faults():
        manifests["base"] = base_manifest(params.base, root=run.root)
    with noting_faults():
        manifests["extractor"] = weights_manifest(
            "extractor.weights",
            None if params.inception_download else params.inception_weights,
            run,
            remedy="docs/scores.md says where to fetch it; or set extractor.download: true where "
            "there is a network, or extractor.kind: classifier",
        )
    with noting_faults():
        remedy = "fetch it, or set features.timm_pretrained: true"
        key = "features.timm_weights"
        manifests["timm"] = weights_manifest(key, params.timm_weights, run, remedy=remedy)
    with noting_faults():
        check_timm_name(params.timm_name)
    with noting_faults():
        manifests["images"] = find_images(params, run).manifest(project=run.root)
    with noting_faults():
        manifests["transfer"] = find_transfer_set(params, run).manifest(project=run.root)
    if faults:
        raise ValueError("\n".join(faults))  # all of them at once
    for name, manifest in manifests.items():
        run.write_json(Path(f"build/manifest/{name}.json"), manifest)


def weights_manifest(key: str, given: str | None, run: Run, *, remedy: str) -> dict[str, Any]:
    if given is None:
        return {}
    path = run.resolve(given)
    if not path.is_file():
        raise ValueError(f"{key}: no file {given}; {remedy}")
    return {"path": given, "files": file_manifest(path.parent, [path.name])}


def check_timm_name(name: str | None) -> None:
    if name is not None:
        import timm

        if not timm.is_model(name):
            raise ValueError(f"features.timm_name: timm {timm.__version__} knows no {name!r}")


def find_images(params: Params, run: Run) -> RawImages:
    data, root = params.data, run.resolve(params.data.root)
    if data.source == "toy":
        total = (data.num_train or 0) + (data.num_val or 0)
        with run.progress("render images", total) as advance:
            root = ensure_images(root, data, seed=params.seed, on_progress=advance)
    images = scan_images(
        root,
        layout=data.layout,
        cache=run.root / ".work/archives",
        verify=params.raw.verify,
        on_message=run.log,
    )
    check_batch_sizes(
        {
            "pretrain.batch_size": params.batch_size if params.epochs else 0,
            "class_condition.batch_size": params.class_batch_size if params.class_epochs else 0,
        },
        images,
    )
    for line in images.describe():
        run.log(line)
    return images


def find_transfer_set(params: Params, run: Run) -> TransferSet:
    data, root = params.transfer_data, run.resolve(params.transfer_data.root)
    if data.source == "digits":
        root = ensure_digits(root, seed=params.seed)
    images = TransferSet(root, data.source)
    for line in images.check(params.shots, verify=data.verify):
        run.log(line)
    return images


if __name__ == "__main__":
    execute(Params, main)
