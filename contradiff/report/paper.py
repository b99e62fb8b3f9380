"""Puts a run's values below those of the paper's Tables 3 to 9, where the two can be compared."""

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from contradiff.report.results import RunResults

PAPER_UNET_SIZE = 859_520_964
"""Number of parameters of Stable Diffusion v1.4's UNet."""


class PaperTable(NamedTuple):
    """A table of the paper, and this run's rows, or why the run cannot be compared."""

    number: int
    title: str
    protocol: str
    columns: list[str]
    rows: list[list[str]]
    own_rows: list[list[str]]
    obstacle: str


def paper_tables(results: RunResults) -> Iterator[PaperTable]:
    """Yield the paper's Tables 3 to 9 with this run's rows.

    Only equal data are compared: ImageNet-1K at 256 pixels, and for Table 6, CIFAR-100. For other
    data, `obstacle` names the difference, and there are no rows of this run. For equal data,
    `obstacle` is empty, and each own row says in its first cell what differs from the paper.
    """
    printed = tomllib.loads(Path(__file__).with_name("paper.toml").read_text(encoding="utf-8"))
    for number, table in printed.items():
        obstacle = _obstacle(results, int(number))
        own = [] if obstacle else list(_own_rows(results, int(number)))
        yield PaperTable(int(number), **table, own_rows=own, obstacle=obstacle)


def _obstacle(results: RunResults, number: int) -> str:
    """Say what makes a run's values another quantity than those of a table; "" if nothing does."""
    if number == 9:
        _, unet = results.pretrain.parameters.modules.get("unet", (0, 0))
        return "" if unet == PAPER_UNET_SIZE else "other base than Stable Diffusion v1.4"
    splits, facts = results.images.splits, results.images.facts
    num_val = sum(shard.num_samples for shard in splits.get("val", []))
    side = results.pretrain.params.get("data", {}).get("image_size")
    data = f"{len(facts.class_ids):,} classes, {num_val:,} validation images, {side} pixels"
    if (len(facts.class_ids), num_val, side) != (1000, 50_000, 256):
        return f"other data ({data})"
    score, transfer = results.score, results.transfer
    if number in {4, 5, 8} and not score.extractor.startswith("inception"):
        return f"other extractor ({score.extractor})"
    kind = "class-conditional" if number == 5 else "unconditional"
    if number in {4, 5, 8} and not score.condition.startswith(kind):
        return f"other condition ({score.condition})"
    if number == 6 and (transfer.source != "cifar100" or "25" not in transfer.by_shots):
        return f"other data ({transfer.source}, {', '.join(transfer.by_shots)} images a class)"
    return ""


def _own_rows(results: RunResults, number: int) -> Iterator[list[str]]:
    probe, score, size = results.probe, results.score, results.pretrain.parameters
    sizes = [f"{size.trainable / 1e6:.0f}M", f"{size.frozen / 1e6:.0f}M"]
    steps = f"this run, {results.pretrain.num_steps:,} steps"
    weight = f"{results.pretrain.params['loss']['lambda']:g}"
    base = results.baselines.rows.get("base_pooled")
    pooled = [] if base is None else [f"{100 * base.top1:.1f}"]
    top1 = f"{100 * probe.top1:.1f}"
    generated = [f"{score.num_samples:,} samples"] if score.num_samples != 50_000 else []
    quality = ["–" if v is None else f"{v:.2f}" for v in (score.fid, score.inception_score)]
    match number:
        case 3:
            if pooled:
                how = f"base's means of three maps, {results.baselines.protocol}"
                yield [f"this run: {how}", "–", sizes[1], *pooled]
            yield [f"{steps}, {probe.protocol}", *sizes, top1]
            if "top1" in probe.table2:
                how = "as in Table 2" if probe.table2.get("literal") else "Table 2's rates"
                yield [f"{steps}, SGD {how}", *sizes, f"{100 * probe.table2['top1']:.1f}"]
        case 4 | 5:
            yield [", ".join([steps, f"guidance {score.guidance:g}", *generated]), *quality]
        case 6:
            ways = results.transfer.by_shots["25"]
            for name in ("logistic", "ridge", "sgd"):
                if (way := getattr(ways, name)) is not None:
                    yield [f"{steps}, {name}", *sizes, f"{100 * way.mean:.1f}"]
        case 7:
            if pooled:
                yield ["this run: base's means of three maps", "–", *pooled]
            loss = f"this run, λ = {weight}"
            yield [loss, sizes[0], top1]
        case 8:
            yield [", ".join([weight, steps, *generated]), quality[0], top1]
        case _:
            total = f"{(size.trainable + size.frozen) / 1e6:.0f}M"
            yield ["this run, without linear classifier and text encoder", total, sizes[0]]
