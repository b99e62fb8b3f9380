"""bench.experiments: rows are named by what differs from their commit."""

from typing import Any

from bench.experiments import table


def data(*, weight: float, top1: float | None) -> dict[str, Any]:
    error = {"separability": {"denoising_error": {"contradiff": 0.10648}}}
    metrics: dict[str, Any] = {"metrics/score.json": {"data": {"score": {"fid": 9.216}}}}
    metrics["metrics/separability.json"] = {"data": error}
    if top1 is not None:
        metrics["metrics/probe.json"] = {"data": {"probe": {"top1": top1}}}
    params = {"seed": 0, "loss": {"lambda": weight}, "lora": {"targets": ["a", "b"]}}
    return {"params": {"params.yaml": {"data": params}}, "metrics": metrics}


def test_rows_are_named_by_their_changes():
    experiments = [{"revs": [{"data": run}]} for run in (data(weight=0.01, top1=None), None)]
    own = {"data": data(weight=0.1, top1=0.695), "experiments": experiments}
    commit = {"rev": "0123456789", **own}
    lines = list(table([{"rev": "workspace", "data": data(weight=9.0, top1=1.0)}, commit]))
    assert lines[0].startswith(
        "| commit | parameters | probe top-1 | FID | KID | denoising error |"
    )
    assert lines[2:] == [
        "| 0123456 | as committed | 69.5% | 9.22 |  | 0.1065 |  |  |  |",
        "| 0123456 | loss.lambda=0.01 |  | 9.22 |  | 0.1065 |  |  |  |",
    ]
    assert len({line.count("|") for line in lines}) == 1
