"""probe: train linear or attentive classifiers on stored features; report top-1 and top-5.

A grid of settings is trained in one pass. metrics/probe.json has the accuracy of the setting in
params.yaml after the last epoch. build/probe/grid.csv lists all settings, also that of Table 2.
"""

from stages.runtime.run import Run, execute

from pathlib import Path

from safetensors.torch import save_file

from contradiff.config import Section, Seed
from contradiff.downstream.probe import ProbeParams
from contradiff.downstream.probe_grid import probe_metrics, train_grid, write_grid
from contradiff.features.cache import FeatureCache, ModelFolders
from contradiff.files import replace_dir

BASE, PRETRAIN = Path("build/base"), Path("build/pretrain")
FEATURES, PROBE = Path("build/features"), Path("build/probe")


class Params(Section):
    seed: Seed
    probe: ProbeParams


def main(params: Params, run: Run) -> None:
    settings, seed, device = params.probe, params.seed, run.device
    cache = FeatureCache.open(FEATURES, ModelFolders(PRETRAIN, BASE, run.root))
    index = cache.index
    num_passes = 1 if settings.head == "attentive" else len(index.columns)
    with run.progress("train", settings.epochs * num_passes, "epoch") as advance:
        grid = train_grid(
            cache, settings, seed, device, lambda _, row: advance(1, loss=f"{row['loss']:.3f}")
        )
    metrics = probe_metrics(grid, params=settings, index=index)
    run.log(f"top-1 {metrics['top1']:.1%} on {metrics['total']} {settings.split} images")
    with replace_dir(PROBE) as folder:
        state = grid[0].probe.state_dict()
        save_file({k: v.cpu().contiguous() for k, v in state.items()}, folder / "head.safetensors")
        write_grid(folder / "grid.csv", grid, params=settings, index=index)
    run.write_json(Path("metrics/probe.json"), {"probe": metrics})


if __name__ == "__main__":
    execute(Params, main)
