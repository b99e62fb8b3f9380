"""The report says how each score was measured, loads nothing, and refuses missing files."""

from stages.runtime.run import Run, RuntimeParams

import base64
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from contradiff.report.page import feature_rows, render, result_rows
from contradiff.report.paper import paper_tables
from contradiff.report.results import read_results
from stages import report
from tests.report.conftest import (
    LOSS,
    LOSS_DARK,
    RECORDS,
    SAMPLES,
    STAGES,
    TSNE,
    TSNE_DARK,
    write_json,
)

NAMES = "score", "probe", "transfer", "pretrain"
SCORE, PROBE, TRANSFER, PRETRAIN = (RECORDS[name] for name in NAMES)
SPLIT = {"ridge": {"mean": 0.8, "std": None}, "sgd": {"mean": 0.7, "std": None}, "num_splits": 1}
HALF = {"ridge": {"mean": 1}}
ONCE = SPLIT | {"shots": 1, "by_shots": {"1": SPLIT}, "protocol": "ridge", "top1": SPLIT["ridge"]}
WITHHELD = dict.fromkeys(RECORDS["by_resizer"]) | {"withheld": "near chance"}


def rows_of(root: Path) -> dict[str, tuple[str, str]]:
    results = read_results(root, seed=3)
    rows = [*result_rows(results), *feature_rows(results)]
    return {row.name: (row.value, row.detail) for row in rows}


def page_of(root: Path) -> str:
    return render("report.html", read_results(root, seed=3), loss=LOSS, loss_dark=LOSS_DARK)


def markdown_of(root: Path) -> str:
    return render("report.md", read_results(root, seed=3))


def test_an_empty_curve_is_refused(root: Path):
    (root / "metrics/pretrain.csv").write_bytes(b"")
    with pytest.raises(ValueError, match=r"^metrics/pretrain\.csv: the file is empty; the stage"):
        read_results(root, seed=3)


def test_empty_cells_of_the_curve_are_nan(root: Path):
    np.testing.assert_equal(read_results(root, seed=3).curve["contrastive"], [np.nan, 0.67])


class PageParser(HTMLParser):
    """All that a page could load, its unclosed tags, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.links: list[str] = []
        self.unclosed: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in {"meta", "img", "source"}:
            self.unclosed.append(tag)
        self.urls += [value or "" for name, value in attrs if name in {"src", "srcset"}]
        self.links += [value or "" for name, value in attrs if name == "href"]

    def handle_endtag(self, tag: str) -> None:
        assert self.unclosed.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


ROWS = """
λ | 0.1 | Weight of the contrastive loss
LoRA rank | 16
Images | 1,234 train, 900 val | 2 classes. | 3 .gif (train), 1 hidden (train). | 2 unreadable (val).
FID ↓ | 31.42 (biased) | bias the FID | 1,000 samples | 900 reference | val images, crop | seed 7
KID ↓ | 0.0123 ± 0.0020 | 500 images of each set; otherwise measured as the FID
Precision, recall ↑ | 0.700, 0.650 | 500 images of each set
Density, coverage ↑ | 0.604, 0.800 | 500 images of each set
Inception score ↑ | 6.28 ± 0.17 | 1,000 samples | domain-classifier | resizer none | seed 7
Denoising error ↓ | 0.1065 | null condition, 250 validation images | base alone has 0.1061
Probe top-1 ↑ | 73.4% [70.6%, 76.0%] | 95% interval; logistic regression | seed 3. | maps 81.0%.
Probe top-5 ↑ | 95.1% | 1,000 images | split val | linear head | attention | seed 3
Transfer top-1 ↑ | 83.5% ± 1.0% | logistic regression | 25 images a class | 797 test | seed 3
Separability, features ↑ | kNN 62.5%, silhouette 0.071 | 900 validation images | 12 classes
Separability, base alone ↑ | kNN 50.0%, silhouette not defined | 10 neighbours
Image found by h in another view | 85.0% | 256 dev | null conditions 60.0% | 31.0% find | 3.0% the
Trainable parameters | 250,000 | 25.0% of 1,000,000 in all; 750,000 are frozen.
Pretraining steps | 372 | Seed 3.
Chance | 8.3%
Base, means of three maps | 81.0% [78.4%, 83.3%] | 1,288 values; logistic regression, C = 0.1.
h, logistic regression | 73.4% [70.6%, 76.0%] | C = 0.1, chosen on held-out training images.
h, SGD | 70.1% [67.2%, 72.9%] | Not converged: more than one point below logistic regression.
h, SGD as in the paper's Table 2 | 62.0% | and its epochs and batch size.
h, 1% of the labels | 40.0% | C = 0.001;
h, 10% of the labels | 60.0% | C = 1 (not converged)
Transfer, 25 shots, logistic regression | 83.5% ± 1.0% | 3 random sets of digits, 25 images
Transfer, 25 shots, ridge regression | 81.2% ± 1.0% | 3 random sets of digits, 25 images
Transfer, 25 shots, SGD | 78.9% ± 1.2% | 3 random sets of digits | Not converged: more than one
Transfer, all images, ridge regression | 95.0% | Trained on all training images of digits, 797 test
Transfer, all images, SGD | 96.0% | 797 test images, seed 3.
Transfer, all images, fine-tuned | 99.0%
"""
"""Name, value, and facts in the detail."""


def test_every_score_stands_beside_the_way_it_was_measured(root: Path):
    rows, expected = rows_of(root), ROWS.strip().splitlines()
    for (name, (value, detail)), line in zip(rows.items(), expected, strict=True):
        assert line.split(" | ")[:2] == [name, value]
        assert [fact for fact in line.split(" | ")[2:] if fact not in detail] == []
    assert "extractor domain-classifier (its accuracy: 95.0%)" in rows["FID ↓"][1]


@pytest.mark.parametrize(
    ("stage", "changes", "name", "row"),
    [
        ("score", {"biased": False}, "FID ↓", r"31\.42, 1,000 samples"),
        ("score", WITHHELD, "FID ↓", "–, No score: near chance. .* seed 7"),
        ("score", WITHHELD, "KID ↓", "–, No score, for the same reason.$"),
        ("score", WITHHELD, "Inception score ↑", "–, No score, for the same reason. 1,000 samples"),
        ("score", {"extractor_accuracy": None}, "FID ↓", "31.*extractor domain-classifier, seed 7"),
        ("score", {"resizer": "clean"}, "FID ↓", "31.*resizer clean"),
        ("score", {"old": RECORDS["by_resizer"] | {"fid": 3}}, "FID, old ↓", "3.00.*resizer old"),
        (
            "transfer",
            {"ignored": {"test": {".gif": 2}}},
            "Transfer top-1 ↑",
            r".* 2 \.gif \(test\)",
        ),
        ("transfer", ONCE, "Transfer top-1 ↑", "80.0%, ridge regression; One set of digits, "),
        ("separability", {"diagnostics": None}, "Separability, features ↑", "kNN 62.5%"),
    ],
)
def test_other_measurements(root: Path, stage: str, changes: dict[str, Any], name: str, row: str):
    write_json(root / f"metrics/{stage}.json", {stage: RECORDS[stage] | changes})
    assert re.match(row, ", ".join(rows_of(root)[name]))


MAKERS = {
    **{f"metrics/{stage}.json": stage for stage in STAGES},
    **dict.fromkeys(("metrics/pretrain.csv", "build/pretrain/config.json"), "pretrain"),
    **dict.fromkeys(("build/figures/tsne.png", "build/figures/tsne_dark.png"), "separability"),
    "build/figures/samples.png": "generate",
    "build/shards/index.json": "shard",
}


@pytest.mark.parametrize(("name", "stage"), MAKERS.items())
def test_missing_and_broken_files_are_named_with_their_stage(root: Path, name: str, stage: str):
    for broken in (b"", b"{]", b"[]", (root / name).read_bytes()[:60]):
        (root / name).write_bytes(broken)
        with pytest.raises(ValueError, match=rf"^{name}: .*dvc repro {stage}"):
            read_results(root, seed=3)
    (root / name).unlink()
    with pytest.raises(ValueError, match=rf"^{name}: no such file; the stage {stage}"):
        read_results(root, seed=3)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("metrics/score.json", {"score": SCORE | {"fid": float("nan")}}, "score.fid"),
        ("metrics/probe.json", {"probe": PROBE | {"top1": 73.4}}, "probe.top1"),
        ("metrics/probe.json", {"probe": {**PROBE, "head": None}}, "probe.head"),
        ("metrics/baselines.json", {"baselines": {"split": "val"}}, "baselines.rows"),
        ("metrics/separability.json", {}, "separability"),
        ("metrics/transfer.json", {"transfer": TRANSFER | HALF}, "transfer.ridge.std"),
        ("build/pretrain/config.json", PRETRAIN | {"num_steps": -1}, "num_steps"),
        ("build/shards/index.json", {"splits": {}}, "facts"),
        ("build/pretrain/config.json", PRETRAIN | {"params": {}}, "params.loss.lambda"),
    ],
)
def test_wrong_values_are_named(root: Path, name: str, content: dict[str, Any], match: str):
    write_json(root / name, content)
    with pytest.raises(ValueError, match=rf"^{name}: {match}: "):
        page_of(root)


def test_page_is_one_file_that_loads_nothing(root: Path):
    page = page_of(root)
    parsed = PageParser(page)
    assert parsed.unclosed == []
    assert "default-src 'none'" in page
    assert not re.search(r"<(script|link|iframe)|https?://|@import|url\(", page)
    kinds, pngs = zip(*(url.split(",") for url in parsed.urls), strict=True)
    assert set(kinds) == {"data:image/png;base64"}
    assert parsed.links == ["../run/index.html"]
    assert [base64.b64decode(png) for png in pngs] == [SAMPLES, LOSS_DARK, LOSS, TSNE_DARK, TSNE]


def test_all_rows_and_parameters_are_in_both_reports(root: Path):
    texts = [PageParser(page_of(root)).text, markdown_of(root)]
    facts = [text for name, row in rows_of(root).items() for text in (name, *row)]
    facts += ["temperature", "attn2.to_q, attn2.to_k", "0.0005", "false", "700,000", "sgd.std"]
    assert [fact for text in texts for fact in facts if fact not in text] == []


def test_text_is_escaped(root: Path):
    write_json(root / "metrics/score.json", {"score": SCORE | {"reference": "<b>a|b</b>"}})
    assert "&lt;b&gt;a|b" in page_of(root)
    assert "<b>" not in page_of(root)
    assert r"a\|b" in markdown_of(root)


def test_tables_of_markdown_have_even_rows_and_list_unknown_keys(root: Path):
    write_json(root / "metrics/probe.json", {"probe": PROBE | {"novel": {"key": [1, "two"]}}})
    lines = markdown_of(root).splitlines()
    assert "| metrics/probe.json | novel.key | 1, two |" in lines
    for before, line in itertools.pairwise(lines):
        if before.startswith("|") and line.startswith("|"):
            assert before.count("|") == line.count("|")
    assert sum(line.startswith("|--") for line in lines) == 5 + len(
        list(paper_tables(read_results(root, seed=3)))
    )


def test_stage_writes_its_outs(root: Path, monkeypatch: pytest.MonkeyPatch):
    runtime = RuntimeParams(device="cpu", num_workers=0, log_every=1, checkpoint_every=1)
    monkeypatch.chdir(root)
    report.main(report.Params(seed=3), Run(stage="report", root=root, runtime=runtime))
    for link in re.findall(r"\]\((.*?)\)", (root / "build/report/report.md").read_text("utf-8")):
        assert (root / "build/report" / link).is_file()
    numbers = json.loads((root / "metrics/headline.json").read_text("utf-8"))
    assert numbers["top1"] == read_results(root, seed=3).probe.top1
    names = ["error", "fid", "kid", "precision", "recall", "top1", "transfer"]
    assert sorted(numbers) == names  # `dvc exp show` has a column for each
    summary = json.loads((root / "build/report/summary.json").read_text("utf-8"))
    assert (root / summary["report"]).is_file()
    assert ["λ", "0.1 — Weight of the contrastive loss"] in summary["rows"]
    assert ["LoRA rank", "16"] in summary["rows"]
