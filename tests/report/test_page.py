"""The report says how each score was measured, needs nothing beside itself, and refuses gaps."""

from stages.runtime.run import Run, RuntimeParams

import base64
import io
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from contradiff.report.figures import plot_losses
from contradiff.report.page import render_html, render_markdown, result_rows, summarise
from contradiff.report.results import read_results
from stages import report

PROBE = {
    "top1": 0.734,
    "top5": 0.951,
    "interval": [0.7058, 0.7605],
    "total": 1000,
    "split": "val",
    "head": "linear",
    "pool": "attention",
}
TRANSFER: dict[str, Any] = {
    "ridge": {"mean": 0.8123, "std": 0.0104},
    "sgd": {"mean": 0.7891, "std": 0.0123},
    "num_splits": 3,
    "shots": 25,
    "total": 797,
    "source": "digits",
}
TRANSFER["by_shots"] = {
    "25": {name: TRANSFER[name] for name in ("ridge", "sgd", "num_splits")},
    "full": {
        "ridge": {"mean": 0.95, "std": None},
        "sgd": {"mean": 0.96, "std": None},
        "finetuned": {"mean": 0.99, "std": None},
        "num_splits": 1,
    },
}
SEPARABILITY = {
    "contradiff": {"knn": 0.625, "silhouette": 0.0712},
    "base": {"knn": 0.5, "silhouette": None},
    "num_images": 900,
    "num_classes": 12,
    "num_neighbours": 10,
}
SAMPLE_SCORES = {
    "fid": 31.4159,
    "kid": 0.01234,
    "kid_std": 0.002,
    "precision": 0.7,
    "recall": 0.65,
    "density": 0.6042,
    "coverage": 0.8,
    "inception_score": 6.28,
    "inception_score_std": 0.17,
}
SCORE: dict[str, Any] = {
    **SAMPLE_SCORES,
    "biased": True,
    "num_kept": 500,
    "reference_sha256": "a191c74b00",
    "num_samples": 1000,
    "num_reference": 900,
    "extractor": "domain-classifier",
    "extractor_accuracy": 0.95,
    "condition": "unconditional: c(noise)",
    "guidance": 1.0,
    "resizer": "none",
    "reference": "val images, centre crop",
    "seed": 7,
}
PRETRAIN = {
    "params": {
        "seed": 3,
        "loss": {"lambda": 0.1, "contrastive": "ntxent", "temperature": 0.1},
        "lora": {"rank": 16, "targets": ["attn2.to_q", "attn2.to_k"]},
        "pretrain": {"lr": 0.0005, "scale_lr": False},
    },
    "parameters": {
        "trainable": 250_000,
        "frozen": 750_000,
        "modules": {"unet": [50_000, 700_000], "vae": [0, 50_000], "head": [200_000, 0]},
    },
    "num_steps": 372,
}


def png_of(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (2, 2), value).save(buffer, "png")
    return buffer.getvalue()


# Distinct pictures in place of figures: drawing is tested by itself.
PICTURES = {"loss": png_of(1), "loss_dark": png_of(2)}
TSNE, TSNE_DARK = png_of(3), png_of(4)


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_curve(root: Path, *, contrastive: bool) -> None:
    lines = ["step,epoch,lr,loss,reconstruction,contrastive,grad_norm"]
    for step in range(10, 380, 10):
        reconstruction = 0.2 + 1 / step
        extra = 3 / step**0.5 if contrastive else 0.0
        shown = extra if contrastive else ""
        total = reconstruction + 0.1 * extra
        lines.append(f"{step},{step // 62},0.0005,{total},{reconstruction},{shown},{1 / step}")
    (root / "metrics/pretrain.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project after all stages but the report."""
    write_json(tmp_path / "metrics/probe.json", {"probe": PROBE})
    write_json(tmp_path / "metrics/transfer.json", {"transfer": TRANSFER})
    write_json(tmp_path / "metrics/score.json", {"score": SCORE})
    write_json(tmp_path / "build/pretrain/config.json", PRETRAIN)
    write_curve(tmp_path, contrastive=True)
    write_json(tmp_path / "metrics/separability.json", {"separability": SEPARABILITY})
    figure = tmp_path / "build/figures/samples.png"
    figure.parent.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(figure)
    figure.with_name("tsne.png").write_bytes(TSNE)
    figure.with_name("tsne_dark.png").write_bytes(TSNE_DARK)
    return tmp_path


def rows_of(root: Path) -> dict[str, tuple[str, str]]:
    return {row.name: (row.value, row.detail) for row in result_rows(read_results(root, seed=3))}


def page_of(root: Path) -> str:
    return render_html(read_results(root, seed=3), **PICTURES)


def markdown_of(root: Path) -> str:
    return render_markdown(read_results(root, seed=3))


@pytest.fixture
def page(root: Path) -> str:
    return page_of(root)


class References(HTMLParser):
    """All that a page could load, its open tags, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.tags: list[str] = []
        self.unclosed: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in {"meta", "img", "source"}:
            self.unclosed.append(tag)
        self.urls += [value or "" for name, value in attrs if name in {"src", "srcset", "href"}]

    def handle_endtag(self, tag: str) -> None:
        assert self.unclosed.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


class TestRows:
    def test_values(self, root: Path) -> None:
        rows = rows_of(root)
        assert rows["λ"][0] == "0.1"
        assert rows["LoRA rank"][0] == "16"
        assert rows["FID ↓"][0] == "31.42 (biased)"
        assert rows["Inception score ↑"][0] == "6.28 ± 0.17"
        assert rows["Probe top-1 ↑"][0] == "73.4% [70.6%, 76.0%]"
        assert rows["Probe top-5 ↑"][0] == "95.1%"
        assert rows["Transfer top-1, ridge ↑"][0] == "81.2% ± 1.0%"
        assert rows["Transfer top-1, SGD ↑"][0] == "78.9% ± 1.2%"
        assert rows["Trainable parameters"] == (
            "250,000",
            "25.0% of 1,000,000 in all; 750,000 are frozen.",
        )
        assert rows["KID ↓"][0] == "0.0123 ± 0.0020"
        assert rows["Precision, recall ↑"][0] == "0.700, 0.650"
        assert rows["Density, coverage ↑"][0] == "0.604, 0.800"
        assert rows["Separability, features ↑"][0] == "kNN 62.5%, silhouette 0.071"
        assert rows["Separability, base alone ↑"][0] == "kNN 50.0%, silhouette not defined"
        assert rows["Transfer top-1, fine-tuned, full shots ↑"][0] == "99.0%"
        assert "all training images" in rows["Transfer top-1, ridge, full shots ↑"][1]

    def test_scores_by_two_resizers_stand_one_under_the_other(self, root: Path) -> None:
        second = SAMPLE_SCORES | {"fid": 30.0}
        score = SCORE | {"resizer": "clean", "legacy_tensorflow": second}
        write_json(root / "metrics/score.json", {"score": score})
        rows = rows_of(root)
        assert rows["FID ↓"][0] == "31.42 (biased)"
        assert "resizer clean" in rows["FID ↓"][1]
        assert rows["FID, legacy_tensorflow ↓"][0] == "30.00 (biased)"
        assert "resizer legacy_tensorflow" in rows["FID, legacy_tensorflow ↓"][1]

    def test_scores_state_reference_extractor_count_and_seed(self, root: Path) -> None:
        rows = rows_of(root)
        for fact in ("1,000 samples", "900 reference", "val images, centre crop", "resizer none"):
            assert fact in rows["FID ↓"][1]
        assert "domain-classifier (its accuracy: 95.0%)" in rows["FID ↓"][1]
        assert "500 features a side; otherwise measured as the FID" in rows["KID ↓"][1]
        for name in ("FID ↓", "Inception score ↑"):
            assert "domain-classifier" in rows[name][1]
            assert "resizer none" in rows[name][1]
            assert "seed 7" in rows[name][1]
        for name in ("Probe top-1 ↑", "Probe top-5 ↑"):
            for fact in ("1,000 images", "split val", "linear head", "attention", "seed 3"):
                assert fact in rows[name][1]
        for fact in ("3 splits of digits", "25 images a class", "797 test images", "seed 3"):
            assert fact in rows["Transfer top-1, ridge ↑"][1]
        how = rows["Transfer top-1, ridge, full shots ↑"][1]
        assert how.startswith("Trained on all training images of digits, 797 test images")

    def test_a_single_split_has_no_deviation(self, root: Path) -> None:
        once = {"ridge": {"mean": 0.8, "std": None}, "sgd": {"mean": 0.7, "std": None}}
        shown = once | {"num_splits": 1, "shots": 1, "total": 9, "source": "digits"}
        content = shown | {"by_shots": {"1": once | {"num_splits": 1}}}
        write_json(root / "metrics/transfer.json", {"transfer": content})
        how = rows_of(root)["Transfer top-1, ridge ↑"][1]
        assert how.startswith("One split of digits, ")

    @pytest.mark.parametrize("biased", [True, False])
    def test_fid_of_few_samples_is_marked(self, root: Path, *, biased: bool) -> None:
        write_json(root / "metrics/score.json", {"score": SCORE | {"biased": biased}})
        value, detail = rows_of(root)["FID ↓"]
        assert ("biased" in value) == ("bias it upwards" in detail) == biased

    def test_unknown_extractor_accuracy(self, root: Path) -> None:
        write_json(root / "metrics/score.json", {"score": SCORE | {"extractor_accuracy": None}})
        assert "accuracy" not in rows_of(root)["FID ↓"][1]


class TestReading:
    @pytest.mark.parametrize(
        ("name", "stage"),
        [
            ("metrics/pretrain.csv", "pretrain"),
            ("metrics/probe.json", "probe"),
            ("metrics/transfer.json", "transfer"),
            ("metrics/score.json", "score"),
            ("build/figures/samples.png", "generate"),
            ("metrics/separability.json", "separability"),
            ("build/figures/tsne.png", "separability"),
            ("build/figures/tsne_dark.png", "separability"),
            ("build/pretrain/config.json", "pretrain"),
        ],
    )
    def test_missing_and_broken_files_are_named_with_their_stage(
        self, root: Path, name: str, stage: str
    ) -> None:
        (root / name).write_text("{]", encoding="utf-8")
        with pytest.raises(ValueError, match=rf"^{name}: .*dvc repro {stage}"):
            page_of(root)
        (root / name).unlink()
        with pytest.raises(ValueError, match=rf"^{name}: no such file; the {stage} stage"):
            read_results(root, seed=3)

    @pytest.mark.parametrize(
        ("name", "content", "match"),
        [
            ("metrics/score.json", {"score": SCORE | {"fid": float("nan")}}, "score.fid"),
            ("metrics/probe.json", {"probe": PROBE | {"top1": 73.4}}, "probe.top1"),
            (
                "metrics/probe.json",
                {"probe": {k: v for k, v in PROBE.items() if k != "head"}},
                "probe.head",
            ),
            (
                "metrics/transfer.json",
                {"transfer": TRANSFER | {"ridge": {"mean": 0.5}}},
                "transfer.ridge.std",
            ),
        ],
    )
    def test_wrong_values_are_named(
        self, root: Path, name: str, content: dict[str, Any], match: str
    ) -> None:
        write_json(root / name, content)
        with pytest.raises(ValueError, match=rf"{name}: {match}: "):
            read_results(root, seed=3)

    def test_pretraining_that_does_not_say_its_lambda(self, root: Path) -> None:
        write_json(root / "build/pretrain/config.json", PRETRAIN | {"params": {"lora": {}}})
        with pytest.raises(ValueError, match=r"params\.loss\.lambda: missing"):
            rows_of(root)

    def test_curve_without_contrastive_loss(self, root: Path) -> None:
        write_curve(root, contrastive=False)
        curve = read_results(root, seed=3).curve
        assert np.isnan(curve["contrastive"]).all()
        assert np.isfinite(curve["loss"]).all()


class TestPage:
    def test_loads_nothing(self, page: str) -> None:
        parsed = References()
        parsed.feed(page)
        assert parsed.unclosed == []
        assert len(parsed.urls) == 5
        assert all(url.startswith("data:image/png;base64,") for url in parsed.urls)
        assert not {"script", "link", "iframe"} & set(parsed.tags)
        assert "default-src 'none'" in page
        assert not re.search(r"https?://|@import|url\(", page)

    def test_images_are_whole(self, page: str, root: Path) -> None:
        parsed = References()
        parsed.feed(page)
        pngs = [base64.b64decode(url.partition(",")[2]) for url in parsed.urls]
        samples = (root / "build/figures/samples.png").read_bytes()
        assert pngs == [samples, PICTURES["loss_dark"], PICTURES["loss"], TSNE_DARK, TSNE]

    def test_all_rows_and_parameters_are_in_both_reports(self, page: str, root: Path) -> None:
        parsed = References()
        parsed.feed(page)
        texts = ["".join(parsed.text), markdown_of(root)]
        rows = rows_of(root)
        for text in texts:
            for name, (value, detail) in rows.items():
                assert name in text
                assert value in text
                assert detail in text
            for fact in ("temperature", "attn2.to_q, attn2.to_k", "0.0005", "false", "700,000"):
                assert fact in text
            assert "whose dvc.lock has these results" in text
            assert "sgd.std" in text

    def test_text_is_escaped(self, root: Path) -> None:
        write_json(root / "metrics/score.json", {"score": SCORE | {"reference": "<b>a|b</b>"}})
        assert "&lt;b&gt;a|b" in page_of(root)
        assert "<b>" not in page_of(root)
        assert r"a\|b" in markdown_of(root)

    def test_tables_of_markdown_have_even_rows(self, root: Path) -> None:
        lines = markdown_of(root).splitlines()
        tables = 0
        for before, line in itertools.pairwise(lines):
            if before.startswith("|") and line.startswith("|"):
                assert before.count("|") == line.count("|")
            tables += line.startswith("|--")
        assert tables == 4

    def test_same_inputs_same_page_and_figures(self, root: Path) -> None:
        assert page_of(root) == page_of(root)
        curve = read_results(root, seed=3).curve
        assert plot_losses(curve, dark=True) == plot_losses(curve, dark=True)


def test_loss_figure_has_no_panel_for_an_empty_column(root: Path) -> None:
    with_contrastive = plot_losses(read_results(root, seed=3).curve, dark=False)
    write_curve(root, contrastive=False)
    without = plot_losses(read_results(root, seed=3).curve, dark=False)
    corner = [
        np.asarray(Image.open(io.BytesIO(png)).convert("L"))[420:700, 760:1400]
        for png in (with_contrastive, without)
    ]
    assert corner[0].min() < 255
    assert corner[1].min() == 255


def test_loss_figure_of_one_step(root: Path) -> None:
    curve = {name: values[:1] for name, values in read_results(root, seed=3).curve.items()}
    assert plot_losses(curve, dark=True).startswith(b"\x89PNG")


def test_summary(root: Path) -> None:
    rows = result_rows(read_results(root, seed=3))
    summary = json.loads(summarise(rows, report="build/report/index.html"))
    assert summary["report"] == "build/report/index.html"
    values = dict(summary["rows"])
    assert values["λ"].startswith("0.1 — ")
    assert values["FID ↓"].startswith("31.42 (biased) — Fewer than")
    assert values["LoRA rank"] == "16"


def test_stage_writes_its_outs(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = RuntimeParams(device="cpu", num_workers=0, log_every=1, checkpoint_every=1)
    monkeypatch.chdir(root)
    report.main(report.Params(seed=3), Run(stage="report", root=root, runtime=runtime))
    for name in ("report/index.html", "report/report.md", "figures/loss.png"):
        assert (root / "build" / name).stat().st_size > 0
    for link in re.findall(r"\]\((.*?)\)", (root / "build/report/report.md").read_text("utf-8")):
        assert (root / "build/report" / link).is_file()
    summary = json.loads((root / "build/report/summary.json").read_text("utf-8"))
    assert (root / summary["report"]).is_file()
