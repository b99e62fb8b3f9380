"""A project that the pipeline has finished, with features, probes, classes and samples."""

from stages.runtime.run import Run, RuntimeParams

import shutil
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

from contradiff.config import parse
from contradiff.data.shards import read_split
from contradiff.generation.class_table import ClassTable
from contradiff.generation.class_table_folder import save_class_table
from contradiff.generation.params import ClassConditionParams
from contradiff.pretrained.folder import Parts
from contradiff.pretrained.project import read_project
from stages import conditions, features, generate, probe
from tests.settings import ARCHITECTURE, GENERATE, LATENTS, TINY

CONTENT = TINY | ARCHITECTURE | {"latents": LATENTS, "generate": GENERATE}
CONTENT |= {"features": TINY["features"] | {"batch_size": 8}}
CONTENT |= {"probe": TINY["probe"] | {"epochs": 2, "warmup_epochs": 0, "batch_size": 8, "lrs": []}}
CONTENT |= {"shard": {"samples_per_shard": 4, "compression": "none"}}


def changed_content(changes: dict[str, Any]) -> dict[str, Any]:
    return CONTENT | {key: CONTENT[key] | value for key, value in changes.items()}


def copy_project(project: Path, folder: Path, **changes: Any) -> Path:
    """Copy the project, and change its params.yaml."""
    shutil.copytree(project, folder, symlinks=True)
    YAML().dump(changed_content(changes), folder / "params.yaml")
    return folder


def run_stage(root: Path, stage: Any, **changes: Any) -> None:
    runtime = RuntimeParams(device="cpu", num_workers=0, log_every=1, checkpoint_every=1)
    with chdir(root):
        params = parse(stage.Params, changed_content(changes), source="params.yaml")
        stage.main(params, Run(stage.__name__.rpartition(".")[2], root, runtime))


@pytest.fixture(scope="session")
def project(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_base: Path,
    tiny_data: Path,
    build_tiny: Callable[..., Any],
    save_tiny: Callable[..., None],
) -> Path:
    root = tmp_path_factory.mktemp("project")
    build = root / "build"
    build.mkdir()
    YAML().dump(CONTENT, root / "params.yaml")
    sources = {"base": tiny_base, "shards": tiny_data / "images", "latents": tiny_data / "latents"}
    for name, folder in sources.items():
        (build / name).symlink_to(folder)
    save_tiny(build / "pretrain", build_tiny(), pretrain={"precision": "fp32"}, loss=TINY["loss"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        table = ClassTable(num_classes=3, width=8, cross_attention_dim=16)
        torch.nn.init.normal_(table.to_tokens.weight)
    params = ClassConditionParams(epochs=1, width=8, drop=0.1, batch_size=4, lr=0.01, lora=True)
    save_class_table(
        build / "class_condition",
        table,
        checkpoint=build / "pretrain",
        num_classes=3,
        num_steps=6,
        params=params,
    )
    (root / "metrics").mkdir()
    (root / "metrics/baselines.json").write_text('{"baselines": {"rows": {}}}')
    run_stage(root, features)
    run_stage(root, probe)
    return root


@pytest.fixture(scope="session")
def parts(project: Path) -> Parts:
    return read_project(project)


@pytest.fixture(scope="session")
def samples(project: Path) -> Callable[..., list[dict[str, bytes]]]:
    """Run the pipeline's own generation, and return the records of its shards."""

    def make(**changes: Any) -> list[dict[str, bytes]]:
        run_stage(project, conditions, generate=changes)
        run_stage(project, generate, generate=changes)
        return list(read_split(project / "build/samples", "sample"))

    return make
