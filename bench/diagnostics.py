"""Explain a finished run: its features during training, from few labels, and in every UNet block.

    dvc pull, or dvc repro                           a finished run in build/
    dvc exp run -S runtime.keep_every=31 -sf pretrain    the same training again; keeps checkpoints
    python -m bench diagnostics                      writes build/diagnostics

All images are training images. Classifiers are trained on nine tenths of them and tested on the dev
split, the rest; FID compares samples with training images. So a checkpoint, block or timestep that
is chosen by these numbers can still be judged on the validation images. Pretraining has seen the
dev images too, without labels. Without kept checkpoints, only the finished model is measured.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from bench._diagnostics_figures import plot_blocks, plot_training
from contradiff.base.loading import load_vae
from contradiff.config import Seed, parse, read_params
from contradiff.data.params import DataParams
from contradiff.data.shard_info import ImageInfo
from contradiff.data.shards import ShardIndex, read_split
from contradiff.data.subsets import is_dev, share_of_each_class
from contradiff.downstream.diagnostics import two_views, view_metrics
from contradiff.downstream.logistic import logistic_score, stratified_folds
from contradiff.downstream.params import ProbeParams, SeparabilityParams
from contradiff.evaluation.extractors import Extractor, load_extractor
from contradiff.evaluation.fid import FeatureSource, FeatureStatistics, fid
from contradiff.evaluation.measuring import real_image
from contradiff.evaluation.params import ScoreParams
from contradiff.evaluation.scores import kid
from contradiff.features.batches import CleanBatch, stored_batches
from contradiff.features.cache import ModelFolders
from contradiff.features.models import (
    DiffusionFeatures,
    autocast,
    image_noise,
    load_feature_model,
)
from contradiff.features.params import FeaturesParams
from contradiff.generation.conditions import unconditional
from contradiff.generation.params import GenerateParams
from contradiff.generation.sampling import generate
from contradiff.generation.solvers import load_solver
from contradiff.method.checkpoint import read_checkpoint_card
from contradiff.method.noise import add_noise
from contradiff.method.params import Architecture

BASE, CHECKPOINT, EXTRACTOR = map(Path, ("build/base", "build/pretrain", "build/extractor"))
IMAGES, LATENTS, KEPT = map(Path, ("build/shards", "build/latents", ".work/checkpoints"))
SHARES = (0.01, 0.05, 0.1, 1.0)
"""Shares of the labels that classifiers are trained with."""
NOISE_LEVELS = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8)
"""The heat map's timesteps, as fractions of the schedule."""
RIDGES = tuple(10.0**exponent for exponent in range(-1, 6))

Features = Float[Tensor, "n width"]


class Params(Architecture):
    """The sections of params.yaml that decide how a run is measured."""

    seed: Seed
    data: DataParams
    features: FeaturesParams
    probe: ProbeParams
    separability: SeparabilityParams
    generate: GenerateParams
    score: ScoreParams


def main(arguments: Sequence[str]) -> None:
    """Measure the run in build/; write diagnostics.json, tables.md and two pictures."""
    parser = argparse.ArgumentParser(prog="python -m bench diagnostics", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    for name, default in (("images", 5000), ("samples", 500), ("steps", 25)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=Path("build/diagnostics"))
    options = parser.parse_args(arguments)
    run = FinishedRun.read(options.images)
    sampler = Sampler.read(run.params, options.samples, options.steps, options.images)
    print(f"{len(run.labels)} training images, {int(run.is_dev.sum())} of them dev images")
    found: dict[str, Any] = {"num_dev": int(run.is_dev.sum()), "num_fit": int((~run.is_dev).sum())}
    found |= {"samples": options.samples, "steps": options.steps}
    found["few_labels"] = few_labels(run)
    print(json.dumps(found["few_labels"]), flush=True)
    found["blocks"] = {kind: run.blocks(kind) for kind in ("base", "contradiff")}
    checkpoints = {**kept_checkpoints(KEPT), read_checkpoint_card(CHECKPOINT).num_steps: CHECKPOINT}
    found["training"] = []
    for step, folder in sorted(checkpoints.items()):
        row = {"step": step, **run.checkpoint(folder), **sampler.scores(run.model(folder=folder))}
        found["training"].append(row)
        print("  ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    contents = {"diagnostics.json": json.dumps(found, indent=1).encode()}
    contents["tables.md"] = "\n".join(tables(found)).encode() + b"\n"
    contents["blocks.png"] = plot_blocks(found["blocks"])
    contents["training.png"] = plot_training(found["training"])
    for name, content in contents.items():
        (options.out / name).write_bytes(content)
    print(f"wrote {options.out}/tables.md, diagnostics.json, training.png and blocks.png")


@dataclass(frozen=True)
class FinishedRun:
    """The parameters of a run, and training images with their labels in memory."""

    params: Params
    batches: list[CleanBatch]
    labels: Int64[Tensor, " n"]
    is_dev: Bool[Tensor, " n"]

    @classmethod
    def read(cls, num_images: int) -> "FinishedRun":
        """Read at most about `num_images` images, evenly spread over the training images."""
        params = parse(Params, read_params(Path("params.yaml")), source="params.yaml")
        total = ShardIndex.read(IMAGES, ImageInfo).num_samples("train")
        chosen = range(0, total, -(-total // num_images))
        size = params.features.batch_size
        read = stored_batches(IMAGES, LATENTS, split="train", batch_size=size, chosen=chosen)
        batches = list(read)
        keys = (key for batch in batches for key in batch.keys)
        labels = torch.cat([batch.labels for batch in batches])
        return cls(params, batches, labels, torch.tensor([is_dev(key) for key in keys]))

    @property
    def device(self) -> torch.device:
        """CUDA if there is a GPU."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def model(self, kind: str = "contradiff", *, folder: Path = CHECKPOINT) -> DiffusionFeatures:
        """Load the trained model of a checkpoint, or its base; the features are h, then maps."""
        is_base = kind == "base"
        changes = {"model": kind, "pool": "mean" if is_base else "attention"}
        changes |= {"more_triples": [], "more_blocks": []}
        params = self.params.features.model_copy(update=changes)
        own = ModelFolders(folder, BASE, Path(), self.params)
        model = load_feature_model(params, own, self.params.seed, self.device)
        assert isinstance(model, DiffusionFeatures)
        return replace(model, more_pools=("cleanest",) if is_base else ("mean",))

    def features(self, model: DiffusionFeatures) -> dict[str, Features]:
        """Compute each kind of feature for all images: "attention" (h), "mean", "cleanest"."""
        parts = [model(batch) for batch in self.batches]
        return {
            column.pool: torch.cat([part[column.name].float().cpu() for part in parts])
            for column in model.columns
        }

    def labelled(self, share: float) -> Int64[Tensor, " rows"]:
        """Draw a share of each class; dev images are left out. Return rows of the images."""
        fit = (~self.is_dev).nonzero().squeeze(1)
        chosen = share_of_each_class(self.labels[fit].tolist(), share=share, seed=self.params.seed)
        return fit[torch.tensor(chosen)]

    def logistic(self, features: Features, share: float = 1.0) -> float:
        """Return the dev accuracy of logistic regression; C is chosen among the labelled images."""
        rows, labels = self.labelled(share), self.labels
        folds = stratified_folds(labels[rows], seed=self.params.seed)
        return logistic_score(
            (features[rows], labels[rows]),
            (features[self.is_dev], labels[self.is_dev]),
            num_classes=int(labels.max()) + 1,
            cs=self.params.probe.cs or [0.1],
            folds=folds[:1] if share == 1 else folds,
        ).accuracy.top1

    def neighbours(self, features: Features, share: float = 1.0) -> float:
        """Return the dev accuracy of a vote of the nearest labelled images (cosine distance).

        separability.num_neighbours vote, or as many as the smallest class has.
        """
        from sklearn.neighbors import KNeighborsClassifier

        rows = self.labelled(share)
        smallest = int(self.labels[rows].unique(return_counts=True)[1].min())
        k = min(self.params.separability.num_neighbours, smallest)
        classifier = KNeighborsClassifier(k, metric="cosine")
        classifier.fit(features[rows].double().numpy(), self.labels[rows].numpy())
        dev = features[self.is_dev].double().numpy(), self.labels[self.is_dev].numpy()
        return float(classifier.score(*dev))

    def ridge(self, features: Features) -> float:
        """Return the dev accuracy of ridge regression; leave-one-out chooses its penalty."""
        from sklearn.linear_model import RidgeClassifierCV
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        classifier = make_pipeline(StandardScaler(), RidgeClassifierCV(alphas=RIDGES))
        classifier.fit(features[~self.is_dev].double().numpy(), self.labels[~self.is_dev].numpy())
        dev = features[self.is_dev].double().numpy(), self.labels[self.is_dev].numpy()
        return float(classifier.score(*dev))

    def blocks(self, kind: str) -> dict[str, dict[int, float]]:
        """Return the dev accuracy of each UNet block's averaged output at each timestep."""
        model, found = self.model(kind), dict[str, dict[int, float]]()
        num_timesteps = model.model.schedule.num_train_timesteps
        for timestep in (round(level * num_timesteps) for level in NOISE_LEVELS):
            parts = [block_means(model, batch, timestep) for batch in self.batches]
            for block in parts[0]:
                means = torch.cat([part[block] for part in parts])
                found.setdefault(block, {})[timestep] = self.ridge(means)
            row = "  ".join(f"{block} {found[block][timestep]:.1%}" for block in found)
            print(f"{kind}, timestep {timestep}: {row}", flush=True)
        return found

    def checkpoint(self, folder: Path) -> dict[str, float]:
        """Measure the features of one checkpoint: spread, views found again, dev accuracy."""
        model, row = self.model(folder=folder), dict[str, float]()
        views = two_views(IMAGES, LATENTS)
        if views is not None:
            for name, values in view_metrics(model, *views).items():
                row |= {f"{name}.{key}": value for key, value in values.items()}
        features = self.features(model)
        names = {"attention": "h", "mean": "maps"}
        return row | {f"{name}.top1": self.ridge(features[p]) for p, name in names.items()}


def few_labels(run: FinishedRun) -> dict[str, dict[str, dict[float, float]]]:
    """Test features of the finished model and of its base with few labels, by two classifiers."""
    trained, base = run.features(run.model()), run.features(run.model("base"))
    named = {"h": trained["attention"], "maps": trained["mean"]}
    named |= {"base's maps": base["mean"], "base's cleanest map": base["cleanest"]}
    ways: dict[str, Callable[[Features, float], float]] = {}
    ways = {"logistic regression": run.logistic, "nearest neighbours": run.neighbours}
    return {
        way: {
            name: {share: classify(features, share) for share in SHARES}
            for name, features in named.items()
        }
        for way, classify in ways.items()
    }


@torch.inference_mode()
def block_means(model: DiffusionFeatures, batch: CleanBatch, timestep: int) -> dict[str, Features]:
    """Return the output of each UNet block at a timestep, averaged over space.

    An image's noise is the same as for the cleanest map of the feature h.
    """
    unet, means = model.model.unet, dict[str, Features]()

    def keep(name: str) -> Callable[..., None]:
        def hook(_block: Any, _given: Any, output: Any) -> None:
            maps = output[0] if isinstance(output, tuple) else output
            means[name] = maps.float().mean(dim=(2, 3)).cpu()

        return hook

    named = [(f"down.{number}", block) for number, block in enumerate(unet.down_blocks)]
    named += [("mid", unet.mid_block)]
    named += [(f"up.{number}", block) for number, block in enumerate(unet.up_blocks)]
    hooks = [block.register_forward_hook(keep(name)) for name, block in named]
    try:
        latents = batch.latents.to(model.device)
        noise = image_noise((3, *latents.shape[1:]), batch.indices, seed=model.seed)[:, -1]
        at = torch.full((len(latents),), timestep, device=model.device)
        alphas = model.model.schedule.alphas_cumprod
        with autocast(model.device, model.params.precision):
            noisy = add_noise(latents, noise.to(model.device), at, alphas)
            model.model.predict(noisy, at, model.tokens(batch))
    finally:
        for hook in hooks:
            hook.remove()
    return means


def kept_checkpoints(folder: Path) -> dict[int, Path]:
    """Find the kept checkpoints of the training of build/pretrain; return folders by step."""
    wanted = read_checkpoint_card(CHECKPOINT)
    cards = {path.parent: read_checkpoint_card(path.parent) for path in folder.glob("*/*/*.json")}
    return {
        card.num_steps: path
        for path, card in cards.items()
        if (card.params, card.base_sha256) == (wanted.params, wanted.base_sha256)
    }


@dataclass(frozen=True)
class Sampler:
    """Draws unconditional samples of a checkpoint, and compares them with training images."""

    params: Params
    extractor: Extractor
    reference: Features
    num_samples: int
    num_steps: int

    @classmethod
    def read(cls, params: Params, num_samples: int, num_steps: int, num_images: int) -> "Sampler":
        """Measure the reference, the first `num_images` training images."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        extractor = load_extractor(EXTRACTOR, device=device)
        if num_samples < extractor.card.num_features:
            least = extractor.card.num_features
            raise SystemExit(f"--samples: FID needs at least {least}, a feature's number of values")
        records = islice(read_split(IMAGES, "train"), num_images)
        images = (real_image(record, image_size=params.data.image_size) for record in records)
        batches = iter(lambda: list(islice(images, params.score.batch_size)), [])
        features = torch.cat([_extract(extractor, batch) for batch in batches])
        return cls(params, extractor, features, num_samples, num_steps)

    def scores(self, model: DiffusionFeatures) -> dict[str, float]:
        """Return FID and KID of a checkpoint. Sample i has the same noise in all checkpoints."""
        network, seed = model.model, self.params.seed
        settings: dict[str, Any] = {"condition": "noise", "guidance": 1.0}
        settings |= {"guidance_interval": [0.0, 1.0], "num_inference_steps": self.num_steps}
        section = self.params.generate.model_copy(update=settings)
        solver = load_solver(BASE, solver=section.solver, num_inference_steps=self.num_steps)
        images = generate(
            network,
            load_vae(BASE).to(model.device),  # pyright: ignore[reportArgumentType]
            solver,
            range(self.num_samples),
            unconditional(network, seed=seed),
            params=section,
            image_size=self.params.data.image_size,
            seed=seed,
        )
        features = torch.cat([_extract(self.extractor, batch) for batch in images])
        card = self.extractor.card
        source = FeatureSource("", card.resizers[0], card.name, card.weights_sha256)
        both = (FeatureStatistics.of(each, source=source) for each in (features, self.reference))
        size = min(self.params.score.kid_subset_size, self.num_samples)
        options = {"num_subsets": self.params.score.kid_subsets, "subset_size": size, "seed": seed}
        return {"fid": fid(*both), "kid": kid(features, self.reference, **options)[0]}


def _extract(extractor: Extractor, images: Any) -> Features:
    resizer = extractor.card.resizers[0]
    prepared = torch.stack([extractor.prepare(image, resizer=resizer) for image in images])
    return extractor(prepared, resizer=resizer)[0].cpu()


def tables(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of all tables in Markdown; `found` is the content of diagnostics.json."""
    yield f"Training images: {found['num_fit']:,} to fit, {found['num_dev']:,} (dev) to test.\n"
    for way, rows in found["few_labels"].items():
        shares = [f"{float(share):.0%}" for share in next(iter(rows.values()))]
        yield from _table(
            [f"{way}, labels", *shares],
            [[name, *(f"{top1:.1%}" for top1 in own.values())] for name, own in rows.items()],
        )
    base, trained = found["blocks"]["base"], found["blocks"]["contradiff"]
    steps = list(next(iter(base.values())))
    yield from _table(
        ["block, timestep", *map(str, steps)],
        [
            [block, *(f"{100 * own[t]:.1f} → {100 * trained[block][t]:.1f}" for t in steps)]
            for block, own in base.items()
        ],
    )
    measures = [name for name in found["training"][0] if name != "step"]
    yield from _table(
        ["step", *(str(row["step"]) for row in found["training"])],
        [[name, *(f"{row[name]:.4g}" for row in found["training"])] for name in measures],
    )
    yield from _table(
        ["chosen by", "step", "h top-1", "FID"],
        [
            [how, str(row["step"]), f"{row['h.top1']:.1%}", f"{row['fid']:.2f}"]
            for how, row in chosen_checkpoints(found["training"]).items()
        ],
    )


def chosen_checkpoints(rows: Sequence[Mapping[str, float]]) -> dict[str, Mapping[str, float]]:
    """Return the checkpoint with the best probe, the one with the best FID, and the last one."""
    return {
        "best probe": max(rows, key=lambda row: row["h.top1"]),
        "best FID": min(rows, key=lambda row: row["fid"]),
        "the last": rows[-1],
    }


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""
