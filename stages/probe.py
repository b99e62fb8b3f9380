"""probe: cached features => linear or attentive classifiers, a grid in one pass; top-1 and top-5.

The headline, metrics/probe.json, is the configured setting's last epoch over every image of the
split, whatever the grid shows. build/probe/grid.csv lists the grid, Table 2's literal setting among
it. To choose from it, judge with probe.split: dev, a tenth of the training images: the best of many
by the validation images would not be an honest figure of them.
"""

from stages.runtime.run import Run, execute

import csv
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from safetensors.torch import load_file, save_file

from contradiff.config import Section, Seed
from contradiff.downstream.probe_data import ProbeData
from contradiff.downstream.probe_grid import Judged, grid_rows, judge_columns, judge_maps
from contradiff.downstream.probing import TABLE_2, ProbeParams
from contradiff.features.cache import HEAD_NAME, CacheIndex, FeatureCache, checkpoint_fingerprint
from contradiff.files import replace_dir, sha256_of
from contradiff.method.attention import TriTimestepAttention
from contradiff.method.checkpoint import base_digest

BASE, PRETRAIN = Path("build/base"), Path("build/pretrain")
FEATURES, PROBE = Path("build/features"), Path("build/probe")
GRID_COLUMNS = (
    *("name", "model", "head", "triple", "block", "pool", "lr", "momentum", "weight_decay"),
    *("split", "total", "top1", "top5", "low", "high"),
)


class Params(Section):
    seed: Seed
    probe: ProbeParams


def main(params: Params, run: Run) -> None:
    data = ProbeData(
        FeatureCache.open(FEATURES, fingerprint_of=partial(fingerprint_now, run=run)),
        dev=params.probe.split == "dev",
    )
    grid = train(params, data, run)
    result = grid[0].result
    if result is None:
        raise ValueError(f"probe.lr: the probe diverges (got {params.probe.lr}); lower it")
    run.log(f"top-1 {result.top1:.1%} on {result.total} {params.probe.split} images")
    index = data.cache.index
    with replace_dir(PROBE) as folder:
        state = grid[0].probe.state_dict()
        save_file({k: v.cpu().contiguous() for k, v in state.items()}, folder / "head.safetensors")
        with (folder / "grid.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, GRID_COLUMNS, restval="", lineterminator="\n")
            writer.writeheader()
            facts = {"model": index.model, "head": params.probe.head, "split": params.probe.split}
            writer.writerows(row | facts for row in grid_rows(grid))
    table_2 = next(head for head in grid if head.setting == TABLE_2).result
    scores = {} if table_2 is None else {"top1": table_2.top1, "top5": table_2.top5}
    run.write_json(
        Path("metrics/probe.json"),
        {
            "probe": {
                "top1": result.top1,
                "top5": result.top5,
                "interval": list(result.interval),
                "total": result.total,
                "split": params.probe.split,
                "head": params.probe.head,
                "pool": index.columns[0].pool,
                "model": index.model,
                # literal: the epochs, warm-up and batch, which the grid shares, are Table 2's too
                "table2": {**scores, "literal": params.probe.is_table_2},
            }
        },
    )


def fingerprint_now(index: CacheIndex, run: Run) -> str | None:
    """Of the weights that the index's model has now; None of timm's, whose file is checked here.

    A file that is not there is not missed: the cache may have come by `dvc pull`.
    """
    if index.model == "contradiff":
        return checkpoint_fingerprint(PRETRAIN)
    if index.model != "timm":
        return base_digest(BASE)
    digest = index.facts.get("timm_weights_sha256")
    if digest is not None:
        shown = index.facts["timm_weights"]
        path = run.resolve(shown)
        if path.is_file() and sha256_of(path) != digest:
            raise ValueError(
                f"features.timm_weights: {shown} has changed since {FEATURES} was made; run "
                "`dvc repro -f features`"
            )
    return None


def train(params: Params, data: ProbeData, run: Run) -> list[Judged]:
    index = data.cache.index
    attentive = params.probe.head == "attentive"
    num_passes = 1 if attentive else len(index.columns)
    with run.progress("train", params.probe.epochs * num_passes, "epoch") as advance:

        def on_progress(_epoch: int, losses: Mapping[str, float]) -> None:
            advance(1, loss=f"{losses['loss']:.3f}")

        if not attentive:
            return judge_columns(
                data,
                params=params.probe,
                seed=params.seed,
                device=run.device,
                on_progress=on_progress,
            )
        data.maps()  # refused here if there are none
        assert index.head is not None, "it lies beside maps"
        head = TriTimestepAttention(**index.head)
        head.load_state_dict(load_file(FEATURES / HEAD_NAME))
        return judge_maps(
            data,
            attention_head=head.to(run.device),
            params=params.probe,
            seed=params.seed,
            on_progress=on_progress,
        )


if __name__ == "__main__":
    execute(Params, main)
