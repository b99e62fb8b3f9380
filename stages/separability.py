"""separability: compare the model with its base: t-SNE, kNN, silhouette (Fig. 3), denoising error.

The stage also measures whether the feature h depends on the latent or on the condition.
"""

from stages.runtime.run import Run, execute

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from contradiff.config import Seed
from contradiff.data.shards import read_images
from contradiff.downstream import diagnostics
from contradiff.downstream import separability as separation
from contradiff.features.batches import stored_batches
from contradiff.features.cache import ModelFolders
from contradiff.features.models import DiffusionFeatures, compute_features, load_feature_model
from contradiff.features.params import FeaturesParams
from contradiff.files import replace_file
from contradiff.method.params import Architecture
from contradiff.report.figures import plot_embeddings

BASE, CHECKPOINT = Path("build/base"), Path("build/pretrain")
IMAGES, LATENTS = Path("build/shards"), Path("build/latents")
FIGURE, DARK_FIGURE = Path("build/figures/tsne.png"), Path("build/figures/tsne_dark.png")


class Params(Architecture):
    seed: Seed
    features: FeaturesParams
    separability: separation.SeparabilityParams


def main(params: Params, run: Run) -> None:
    settings, seed, features = params.separability, params.seed, params.features
    all_labels = [sample.label for sample in read_images(IMAGES, "val")]
    chosen = separation.choose_images(all_labels, settings, seed=seed)
    labels = np.array([all_labels[index] for index in chosen])
    models = ModelFolders(CHECKPOINT, BASE, run.root, params)
    trained = "ContraDiff: h" if features.pool == "attention" else "ContraDiff: maps"
    found: dict[str, separation.Separability] = {}
    panels: dict[str, np.ndarray] = {}
    errors: dict[str, float] = {}
    views = diagnostics.two_views(IMAGES, LATENTS)
    of_views: dict[str, object] | None = None
    # Always compare the trained model with its base, even if features.model is another model.
    for kind, title, pool in (
        ("contradiff", trained, features.pool),
        ("base", "base alone: pooled bottleneck", "mean"),
    ):
        changes = {"model": kind, "pool": pool, "more_triples": [], "more_blocks": []}
        own = features.model_copy(update=changes)
        model = load_feature_model(own, models, seed, run.device)
        assert isinstance(model, DiffusionFeatures)
        if kind == "base":
            model.model.block = "mid"
        size = features.batch_size
        batches = stored_batches(IMAGES, LATENTS, split="val", batch_size=size, chosen=chosen)
        with run.progress(f"features of {kind}", len(chosen)) as advance:
            table = compute_features(model, batches, on_progress=advance).features.numpy()
        k = settings.num_neighbours
        found[kind] = separation.separability(table, labels, num_neighbours=k)
        panels[f"{title}\n{found[kind]}"] = separation.embed(table, seed=seed)
        if kind == "contradiff" and views is not None:
            of_views = {"num_images": len(views[0].keys), **diagnostics.view_metrics(model, *views)}
        null = replace(model, params=own.model_copy(update={"condition": "noise"}))
        some = range(0, len(all_labels), -(-len(all_labels) // diagnostics.NUM_DENOISED))
        batches = stored_batches(IMAGES, LATENTS, split="val", batch_size=size, chosen=some)
        errors[kind] = diagnostics.denoising_error(null, batches)
        error = f"denoising error {errors[kind]:.4f}"
        run.log(f"{title}: {k}-NN accuracy {found[kind].knn:.1%}, {error}")
    for path, dark in ((FIGURE, False), (DARK_FIGURE, True)):
        with replace_file(path) as temporary:
            temporary.write_bytes(plot_embeddings(panels, labels, dark=dark))
    metrics: dict[str, object] = {kind: asdict(each) for kind, each in found.items()}
    metrics |= {"num_images": len(chosen), "num_classes": len(np.unique(labels))}
    metrics |= {"num_neighbours": settings.num_neighbours, "diagnostics": of_views}
    metrics["denoising_error"] = {**errors, "num_images": len(some)}
    run.write_json(Path("metrics/separability.json"), {"separability": metrics})


if __name__ == "__main__":
    execute(Params, main)
