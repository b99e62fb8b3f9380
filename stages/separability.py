"""separability: validation features beside the base's own => t-SNE, kNN, silhouette (Fig. 3)."""

from stages.runtime.run import Run, execute

from dataclasses import asdict
from pathlib import Path

import numpy as np

from contradiff.config import Section, Seed
from contradiff.data.shards import read_images
from contradiff.downstream.separability import (
    Separability,
    SeparabilityParams,
    choose_images,
    embed,
    separability,
)
from contradiff.features.batches import stored_batches
from contradiff.features.cache import ModelFolders
from contradiff.features.models import DiffusionFeatures, compute_features, load_feature_model
from contradiff.features.params import FeaturesParams
from contradiff.files import replace_file
from contradiff.report.figures import plot_embeddings

BASE, CHECKPOINT = Path("build/base"), Path("build/pretrain")
IMAGES, LATENTS = Path("build/shards"), Path("build/latents")
FIGURE, DARK_FIGURE = Path("build/figures/tsne.png"), Path("build/figures/tsne_dark.png")


class Params(Section):
    seed: Seed
    features: FeaturesParams
    separability: SeparabilityParams


def main(params: Params, run: Run) -> None:
    settings, seed = params.separability, params.seed
    all_labels = [sample.label for sample in read_images(IMAGES, "val")]
    limits = {"num_images": settings.num_images, "num_classes": settings.num_classes}
    chosen = choose_images(all_labels, **limits, seed=seed)
    labels = np.array([all_labels[index] for index in chosen])
    trained = "ContraDiff: h" if params.features.pool == "attention" else "ContraDiff: maps"
    found: dict[str, Separability] = {}
    panels: dict[str, np.ndarray] = {}
    # Whatever features.model names for the probe: the trained model is set beside its base.
    for kind, title, changes in (
        ("contradiff", trained, {}),
        ("base", "base alone: pooled bottleneck", {"pool": "mean"}),
    ):
        changes |= {"model": kind, "more_triples": [], "more_blocks": []}
        model = load_feature_model(
            params.features.model_copy(update=changes),
            ModelFolders(CHECKPOINT, BASE, run.root),
            seed=seed,
            device=run.device,
        )
        if kind == "base" and isinstance(model, DiffusionFeatures):
            model.model.block = "mid"
        batch_size = params.features.batch_size
        batches = stored_batches(IMAGES, LATENTS, split="val", batch_size=batch_size, chosen=chosen)
        with run.progress(f"features of {kind}", len(chosen)) as advance:
            features = compute_features(model, batches, on_progress=advance).features.numpy()
        found[kind] = separability(features, labels, num_neighbours=settings.num_neighbours)
        panels[f"{title}\n{found[kind]}"] = embed(features, seed=seed)
        run.log(f"{title}: {settings.num_neighbours}-NN accuracy {found[kind].knn:.1%}")
    for path, dark in ((FIGURE, False), (DARK_FIGURE, True)):
        with replace_file(path) as temporary:
            temporary.write_bytes(plot_embeddings(panels, labels, dark=dark))
    metrics = {
        **{kind: asdict(each) for kind, each in found.items()},
        "num_images": len(chosen),
        "num_classes": len(np.unique(labels)),
        "num_neighbours": settings.num_neighbours,
    }
    run.write_json(Path("metrics/separability.json"), {"separability": metrics})


if __name__ == "__main__":
    execute(Params, main)
