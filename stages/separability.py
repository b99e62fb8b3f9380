"""separability: validation features beside the base's own => t-SNE, kNN, silhouette (Fig. 3)."""

from stages.runtime.run import Run, execute

from pathlib import Path

import numpy as np

from contradiff.config import Section, Seed
from contradiff.downstream.separability import (
    Panel,
    Separability,
    SeparabilityParams,
    base_of,
    choose_images,
    embed,
    labels_of,
    plot_panels,
    separability,
    separability_metrics,
)
from contradiff.features.extraction import Pool, extract, stored_batches
from contradiff.features.params import FeaturesParams
from contradiff.files import replace_file
from contradiff.method.checkpoint import load_checkpoint
from contradiff.method.model import ContraDiff

IMAGES, LATENTS = Path("build/shards"), Path("build/latents")
FIGURE, DARK_FIGURE = Path("build/figures/tsne.png"), Path("build/figures/tsne_dark.png")


class Params(Section):
    seed: Seed
    features: FeaturesParams
    separability: SeparabilityParams


def main(params: Params, run: Run) -> None:
    settings = params.separability
    all_labels = labels_of(IMAGES, split="val")
    chosen = choose_images(
        all_labels,
        num_images=settings.num_images,
        num_classes=settings.num_classes,
        seed=params.seed,
    )
    labels = np.array([all_labels[index] for index in chosen])
    model = load_checkpoint(Path("build/pretrain"), base=Path("build/base")).to(run.device)

    # whatever the probe is of: the trained model is set beside its base
    settings_of_features = params.features.model_copy(update={"model": "contradiff"})

    def featured_by(which: ContraDiff, *, pool: Pool, name: str) -> np.ndarray:
        batches = stored_batches(
            IMAGES,
            LATENTS,
            split="val",
            batch_size=params.features.batch_size,
            chosen=chosen,
        )
        with run.progress(f"features of {name}", len(chosen)) as advance:
            return extract(
                which,
                batches,
                params=settings_of_features,
                pool=pool,
                seed=params.seed,
                device=run.device,
                on_progress=advance,
            ).features.numpy()

    featured = {
        "contradiff": featured_by(model, pool=params.features.pool, name="ContraDiff"),
        "base": featured_by(base_of(model), pool="mean", name="the base"),
    }
    titles = {
        "contradiff": "ContraDiff: h"
        if params.features.pool == "attention"
        else "ContraDiff: maps",
        "base": "base alone: pooled bottleneck",
    }
    found: dict[str, Separability] = {}
    panels: list[Panel] = []
    for name, features in featured.items():
        found[name] = separability(features, labels, num_neighbours=settings.num_neighbours)
        panels.append(Panel(titles[name], embed(features, seed=params.seed), found[name]))
        run.log(f"{titles[name]}: {settings.num_neighbours}-NN accuracy {found[name].knn:.1%}")
    for path, dark in ((FIGURE, False), (DARK_FIGURE, True)):
        with replace_file(path) as temporary:
            temporary.write_bytes(plot_panels(panels, labels, dark=dark))
    metrics = separability_metrics(
        found,
        num_images=len(chosen),
        num_classes=len(np.unique(labels)),
        num_neighbours=settings.num_neighbours,
    )
    run.write_json(Path("metrics/separability.json"), {"separability": metrics})


if __name__ == "__main__":
    execute(Params, main)
