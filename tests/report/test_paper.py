"""The paper's tables agree with each other, and a run stands below those of equal data."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from contradiff.report.paper import PAPER_UNET_SIZE, paper_tables
from contradiff.report.results import RunResults, read_results

PRINTED = {
    "3 DINO, ViT-B/16": "86M – 78.0",
    "4 MAGE, ViT-L": "7.04 123.5",
    "5 ContraDiff": "5.16 189.7",
    "6 MAGE, ViT-L/16": "304M 24M 72.0",
}


def test_the_papers_tables_agree_where_they_print_the_same_number(root: Path):
    found = {
        f"{table.number} {row[0]}": row[1:]
        for table in paper_tables(read_results(root, seed=0))
        for row in table.rows
    }
    assert len(found) == 9 + 5 + 5 + 4 + 4 + 5 + 4
    assert {name: " ".join(found[name]) for name in PRINTED} == PRINTED
    # Tables 3, 7 and 8 have the same accuracies, Tables 4 and 8 the same FID.
    assert found["3 ContraDiff"][-1] == found["8 0.1"][-1] == "80.1"
    assert found["7 + contrastive loss (ContraDiff)"][-1] == "80.1"
    assert found["7 + LoRA training"][-1] == found["8 0"][-1]
    assert found["7 SD-v1.4"][-1] == found["3 SD features"][-1]
    assert found["4 ContraDiff"][0] == found["8 0.1"][0]
    # Table 7 prints these differences; Table 9's total is Table 3's trainable + frozen.
    steps = [float(row[-1]) for name, row in found.items() if name.startswith("7 ")]
    assert [round(b - a, 1) for a, b in itertools.pairwise(steps)] == [2.5, 3.7, 2.1]
    for name, nine in (("MAGE, ViT-L/16", "MAGE"), ("DifFeed",) * 2, ("ContraDiff",) * 2):
        trainable, frozen = (int(text[:-1]) for text in found[f"3 {name}"][:2])
        assert found[f"9 {nine}"] == [f"{trainable + frozen}M", f"{trainable}M"]


def like_the_paper(root: Path, **changes: dict[str, Any]) -> RunResults:
    """Return the results as if the data, the base and the protocols were the paper's."""
    results = read_results(root, seed=0)
    content = {name: getattr(results, name) for name in type(results).model_fields}
    images = results.images.model_copy(deep=True)
    images.facts.class_ids = [str(number) for number in range(1000)]
    images.splits["val"] = [images.splits["val"][0].model_copy(update={"num_samples": 50_000})]
    pretrain = results.pretrain.model_copy(deep=True)
    pretrain.params["data"] = {"image_size": 256}
    pretrain.parameters.modules["unet"] = (0, PAPER_UNET_SIZE)
    content |= {"images": images, "pretrain": pretrain}
    wanted = {"score": {"extractor": "inception-2015-12-05"}, "transfer": {"source": "cifar100"}}
    for name in wanted | changes:
        content[name] = content[name].model_copy(
            update=wanted.get(name, {}) | changes.get(name, {})
        )
    return RunResults.model_construct(**content)


OWN = """
3 | this run: base's means of three maps, logistic | – | 1M | 81.0
3 | this run, 372 steps, logistic | 0M | 1M | 73.4
3 | this run, 372 steps, SGD as in Table 2 | 0M | 1M | 62.0
4 | this run, 372 steps, guidance 1, 1,000 samples | 31.42 | 6.28
6 | this run, 372 steps, logistic | 0M | 1M | 83.5
6 | this run, 372 steps, ridge | 0M | 1M | 81.2
6 | this run, 372 steps, sgd | 0M | 1M | 78.9
7 | this run: base's means of three maps | – | 81.0
7 | this run, λ = 0.1 | 0M | 73.4
8 | 0.1, this run, 372 steps, 1,000 samples | 31.42 | 73.4
9 | this run, without linear classifier and text encoder | 1M | 0M
"""


def test_a_run_on_the_papers_data_stands_below_the_papers_rows(root: Path):
    tables = list(paper_tables(like_the_paper(root)))
    own = [[str(table.number), *row] for table in tables for row in table.own_rows]
    assert own == [line.split(" | ") for line in OWN.strip().splitlines()]
    assert all(len(row) == len(t.columns) for t in tables for row in t.rows + t.own_rows)
    assert [t.number for t in tables if t.obstacle] == [5]


@pytest.mark.parametrize(
    ("changes", "obstacles"),
    [
        ({"score": {"extractor": "mine"}}, dict.fromkeys((4, 5, 8), "other extractor (mine)")),
        (
            {"score": {"condition": "class-conditional: balanced labels"}},
            dict.fromkeys((4, 8), "other condition (class-conditional: balanced labels)"),
        ),
        ({"transfer": {"source": "digits"}}, {6: "other data (digits, 25, full images a class)"}),
    ],
)
def test_a_run_with_another_protocol_is_not_compared(
    root: Path, changes: dict[str, dict[str, Any]], obstacles: dict[int, str]
):
    tables = list(paper_tables(like_the_paper(root, **changes)))
    # The samples of the other cases are unconditional, which Table 5's are not.
    own = {5: "other condition (unconditional: c(noise))"} if "transfer" in changes else {}
    assert {t.number: t.obstacle for t in tables if t.obstacle} == own | obstacles
    assert all(bool(t.own_rows) != bool(t.obstacle) for t in tables)


def test_a_run_on_other_data_is_not_compared(root: Path):
    tables = list(paper_tables(read_results(root, seed=0)))
    reasons = {table.obstacle for table in tables}
    data = "other data (2 classes, 900 validation images, None pixels)"
    assert reasons == {data, "other base than Stable Diffusion v1.4"}
    assert not any(table.own_rows for table in tables)
