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
    data = params.data
    total = (data.num_train or 0) + (data.num_val or 0)
    with run.progress("render images", total) as advance:
        root = ensure_images(run.resolve(data.root), data, seed=params.seed, on_progress=advance)
    archive = ensure_transfer_archive(
        run.resolve(params.transfer_data.root), params.transfer_data, seed=params.seed
    )
    manifest = Manifest.scan(
        root,
        shown_root=data.root,
        layout=data.layout,
        cache=run.root / ".work/archives",
        verify=params.raw.verify,
        on_message=run.log,
    )
    for split, files in manifest.splits.items():
        run.log(f"{len(files)} {split} images of {len(manifest.class_ids)} classes in {data.root}")
    manifest.write(Path("build/manifest/images.json"))
    run.write_json(
        Path("build/manifest/transfer.json"),
        transfer_manifest(
            archive, source=params.transfer_data.source, shown_root=params.transfer_data.root
        ),
    )


if __name__ == "__main__":
    execute(Params, main)
