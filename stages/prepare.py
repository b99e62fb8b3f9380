"""prepare: check raw data and weights, and list the sizes and hashes of files in build/manifest.

DVC tracks these small lists (manifests) instead of the data. If data.source is "toy", the stage
also renders the images.
"""

from stages.runtime.run import Run, execute, say_how_to_restore_params
from stages.runtime.work_dir import code_digest

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import Field

from contradiff.base.config import BaseParams, base_manifest, local_base
from contradiff.config import Seed
from contradiff.data.params import DataParams, RawParams
from contradiff.files import replace_file, weights_manifest
from contradiff.imports import slow_import
from contradiff.sources.cifar import SIDE
from contradiff.sources.counts import CountParams, count_faults, transfer_faults
from contradiff.sources.imagenet import scan_images
from contradiff.sources.listing import collect
from contradiff.sources.transfer_set import TransferDataParams, TransferSet
from contradiff.toy.rendered import ensure_digits, ensure_images

GET_EXTRACTOR = (
    "download it (docs/scores.md has the address); or set extractor.download to true, which needs "
    'a network; or set extractor.kind to "classifier"'
)
GET_TIMM = "download it, or set features.timm_weights to null and features.timm_pretrained to true"


class Params(CountParams):
    seed: Seed
    data: DataParams
    raw: RawParams
    transfer_data: TransferDataParams
    base: BaseParams
    inception_weights: str | None = Field(alias="extractor.weights")
    inception_download: bool = Field(alias="extractor.download")
    timm_name: str | None = Field(alias="features.timm_name")
    timm_weights: str | None = Field(alias="features.timm_weights")


def main(params: Params, run: Run) -> None:
    root, seed, timm_weights = run.root, params.seed, params.timm_weights
    manifests: dict[str, dict[str, Any]] = {}
    faults: list[str] = []
    if (name := params.timm_name) is not None:
        import timm

        if not timm.is_model(name):
            faults.append(f"features.timm_name: timm {timm.__version__} has no model {name!r}")
    with collect(faults):
        manifests["base"] = base_manifest(params.base, root=root)
        if params.base.source == "local":
            check_base_once(params.base, manifests["base"], root)
    with collect(faults):
        given = None if params.inception_download else params.inception_weights
        manifests["extractor"] = weights_manifest("extractor.weights", given, root, GET_EXTRACTOR)
    with collect(faults):
        manifests["timm"] = weights_manifest("features.timm_weights", timm_weights, root, GET_TIMM)
    with collect(faults):
        data, folder = params.data, run.resolve(params.data.root)
        if data.source == "toy":
            total = (data.num_train or 0) + (data.num_val or 0)
            with run.progress("render images", total) as advance:
                folder = ensure_images(folder, data, seed=seed, on_progress=advance)
        index, verify = root / ".work/archives", params.raw.verify
        images = scan_images(
            folder, layout=data.layout, index_folder=index, verify=verify, on_message=run.log
        )
        for line in images.describe():
            run.log(line)
        add(faults, count_faults(params, images.listing.splits))
        manifests["images"] = images.manifest(project=root)
    with collect(faults):
        data, folder = params.transfer_data, run.resolve(params.transfer_data.root)
        if data.source == "digits":
            folder = ensure_digits(folder, seed=seed)
        images = TransferSet(folder, data.source)
        for line in images.check(verify=data.verify):
            run.log(line)
        labels = images.split("train", image_size=SIDE).labels
        add(faults, transfer_faults(params, Counter(labels.tolist())))
        manifests["transfer"] = images.manifest(project=root)
    if faults:
        with say_how_to_restore_params():
            raise ValueError("\n".join(faults))
    for name, manifest in manifests.items():
        run.write_json(Path(f"build/manifest/{name}.json"), manifest)


def check_base_once(base: BaseParams, manifest: Mapping[str, Any], root: Path) -> None:
    """Check the weights of a local base, unless the same code has found the same files good.

    It needs diffusers, whose import would take most of the time of each unchanged `dvc repro`.
    """
    seen = root / ".work/checked_base.json"
    now = json.dumps([manifest, code_digest(), version("diffusers")], sort_keys=True)
    if seen.is_file() and seen.read_bytes() == now.encode():
        return
    with slow_import():
        from contradiff.base.weights import check_weights
    check_weights(local_base(base, root=root))
    with suppress(OSError), replace_file(seen) as temporary:
        temporary.write_text(now, encoding="utf-8")


def add(faults: list[str], found: Iterable[tuple[str, str]]) -> None:
    """Add messages to `faults`, each of a dotted key and a text."""
    faults += [f"{key}: {text}" for key, text in found]


if __name__ == "__main__":
    execute(Params, main)
