"""base: check the pretrained latent diffusion model, and copy it to build/base."""

from stages.runtime.run import Run, execute

import shutil
from pathlib import Path

from contradiff.base import config
from contradiff.base.config import BaseParams, check_base
from contradiff.base.weights import check_values, check_weights
from contradiff.config import Section
from contradiff.files import read_json, replace_dir

MANIFEST = Path("build/manifest/base.json")
REMEDY = "run `dvc repro prepare`"


class Params(Section):
    base: BaseParams


def was_prepared(base: BaseParams, run: Run) -> bool:
    """Return whether the stage `prepare` has checked these files: their hashes are in its list."""
    if not MANIFEST.is_file():
        return False
    return read_json(MANIFEST, remedy=REMEDY) == config.base_manifest(base, root=run.root)


def main(params: Params, run: Run) -> None:
    base = params.base
    with replace_dir(Path("build/base")) as folder:
        if base.source == "hub":
            run.log(f"downloading {base.path} at commit {base.revision}")
            # Check the small configuration first: if the base is unusable, skip the large weights.
            config.fetch_from_hub(base, folder, weights=False)
            check_base(folder, weights=False)
            config.fetch_from_hub(base, folder, weights=True)
            check_weights(folder)
            check_values(folder)
            shutil.rmtree(folder / ".cache", ignore_errors=True)
        else:
            source = config.local_base(base, root=run.root)
            check_base(source)
            if not was_prepared(base, run):
                check_weights(source)
            check_values(source)
            for name in config.COMPONENTS:
                shutil.copytree(source / name, folder / name)
        check_base(folder)


if __name__ == "__main__":
    execute(Params, main)
