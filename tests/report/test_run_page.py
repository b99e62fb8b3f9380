"""The page of a run: costs, command, machine and other λ; all texts are escaped."""

import re
from pathlib import Path
from typing import Any

from contradiff.report.results import read_results
from contradiff.report.run_page import render_run

COSTS: dict[str, Any] = {
    "generate": {"seconds": 3725.0, "memory_mb": 900, "gpu_memory_mb": 20_000, "ended": 7200.0},
    "pretrain": {"seconds": 372.0, "memory_mb": 1234, "ended": 60.0},
    "probe": {"seconds": 0.4, "memory_mb": 500, "ended": 7300.0},
}
OTHERS = [
    (0.1, "b2", {"probe.top1": 0.82, "score.fid": 11.84, "score.kid": 0.375}),
    (0.0, "a1", {"probe.top1": 0.7, "score.fid": None}),
]


def page_of(root: Path, **changes: Any) -> str:
    content: dict[str, Any] = {"command": "dvc repro", "origin": "The code was <new>."}
    content |= {"costs": COSTS, "others": OTHERS, "machine": {"system": "A & B"}, "now": 8000.0}
    results = read_results(root, seed=0)
    results.pretrain.params["pretrain"]["batch_size"] = 64
    return render_run(results, **(content | changes))


def cells(page: str) -> list[list[str]]:
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]


def test_each_stage_has_its_costs_in_the_order_of_their_ends(root: Path):
    rows = cells(page_of(root))
    assert rows[1:5] == [
        ["pretrain", "6 min 12 s", "1,234 MB", "–", "64.0 images/s", "1970-01-01 00:01 UTC"],
        ["generate", "1 h 02 min", "900 MB", "20,000 MB", "0.3 samples/s", "1970-01-01 02:00 UTC"],
        ["probe", "0.4 s", "500 MB", "–", "–", "1970-01-01 02:01 UTC"],
        ["all", "1 h 08 min", "", "", "", ""],
    ]
    assert ["0", "70.0%", "–", "–", "–", "–", "a1"] in rows
    assert ["0.1", "82.0%", "11.84", "0.3750", "–", "–", "b2"] in rows
    assert ["system", "A &amp; B"] in rows


def test_the_page_is_escaped_and_links_only_the_report(root: Path):
    page = page_of(root, command="dvc exp run -S 'data.root=<b>'")
    assert "The code was &lt;new&gt;." in page
    assert "data.root=&lt;b&gt;" in page
    assert re.findall(r'(?:href|src)="(.*?)"', page) == ["../report/index.html"]
    assert "default-src 'none'" in page
    assert "1970-01-01 02:13 UTC" in page


def test_a_run_without_costs_or_other_weights_says_so(root: Path):
    page = page_of(root, costs={}, others=[])
    assert "dvc exp run -S loss.lambda=0" in page
    assert "<tfoot>" not in page
