"""prepare: raw data => manifests. Renders the embedded default's images; checks what is there.

The raw trees lie under the project's root, outside DVC: a manifest stands for each.
"""

from stages._runtime import Run, execute

from pathlib import Path

from contradiff.config import Section, Seed
from contradiff.data.imagenet import Manifest
from contradiff.data.params import DataParams, RawParams
from contradiff.data.raw import ensure_images, ensure_transfer_archive, transfer_manifest
from contradiff.data.transfer_set import TransferDataParams


class Params(Section):
    seed: Seed
    data: DataParams
    raw: RawParams
    transfer_data: TransferDataParams


def main(params: Params, run: Run) -> None:
    faults: list[str] = []
    manifest: Manifest | None = None
    archive: Path | None = None
    try:
        manifest = scan_images(params, run)
    except ValueError as error:
        faults.append(str(error))
    try:
        archive = ensure_transfer_archive(
            run.resolve(params.transfer_data.root), params.transfer_data, seed=params.seed
        )
    except ValueError as error:
        faults.append(str(error))
    if manifest is None or archive is None:
        raise ValueError("\n".join(faults))  # all that is missing, at once
    for split, files in manifest.splits.items():
        number, place = len(manifest.class_ids), params.data.root
        run.log(f"{len(files)} {split} images of {number} classes in {place}")
    manifest.write(Path("build/manifest/images.json"))
    run.write_json(
        Path("build/manifest/transfer.json"),
        transfer_manifest(
            archive, source=params.transfer_data.source, shown_root=params.transfer_data.root
        ),
    )


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


if __name__ == "__main__":
    execute(Params, main)
