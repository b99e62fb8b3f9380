"""probe: features of the frozen model at the fixed triple => linear classifier, top-1 and top-5."""

from stages._runtime import Run, execute

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from pydantic import model_validator
from safetensors.torch import save_file

from contradiff.atomic import replace_dir
from contradiff.checkpoint import load_checkpoint
from contradiff.config import Section, Seed
from contradiff.data.shards import ShardIndex
from contradiff.data.subsets import is_dev
from contradiff.extraction import FeatureSet, extract, stored_batches
from contradiff.features import FeaturesParams
from contradiff.probing import (
    ProbeParams,
    evaluate,
    train_attentive_probe,
    train_linear_probe,
)

IMAGES, LATENTS = Path("build/shards"), Path("build/latents")


class Params(Section):
    seed: Seed
    features: FeaturesParams
    probe: ProbeParams

    @model_validator(mode="after")
    def _attentive_head_replaces_pooling(self) -> "Params":
        if self.probe.head == "attentive" and self.features.pool == "mean":
            msg = (
                "probe.head: attentive trains the attention head, which features.pool: mean leaves "
                "out; set features.pool to attention or probe.head to linear"
            )
            raise ValueError(msg)
        return self


def main(params: Params, run: Run) -> None:
    index = ShardIndex.read(IMAGES)
    num_classes = len(index.facts["class_ids"])
    model = load_checkpoint(Path("build/pretrain"), base=Path("build/base")).to(run.device)
    attentive = params.probe.head == "attentive"

    def features_of(split: str) -> FeatureSet:
        batches = stored_batches(
            IMAGES, LATENTS, split=split, batch_size=params.features.batch_size
        )
        with run.progress(f"{split} features", index.num_samples(split)) as advance:
            return extract(
                model,
                batches,
                params=params.features,
                pool="none" if attentive else params.features.pool,
                seed=params.seed,
                device=run.device,
                on_progress=advance,
            )

    train = features_of("train")
    if params.probe.split == "dev":
        held_out = [is_dev(key) for key in train.keys]
        train, evaluated = chosen(train, [not dev for dev in held_out]), chosen(train, held_out)
    else:
        evaluated = features_of("val")

    settings = params.probe.sgd_settings()
    with run.progress("train the probe", params.probe.epochs, "epoch") as advance:

        def on_progress(_epoch: int, losses: Mapping[str, float]) -> None:
            advance(1, loss=f"{losses['loss']:.3f}")

        if attentive:
            probe = train_attentive_probe(
                train.features,
                train.labels,
                attention_head=model.attention,
                num_classes=num_classes,
                seed=params.seed,
                on_progress=on_progress,
                **settings,
            )
            with torch.inference_mode():
                maps = evaluated.features.split(params.features.batch_size)
                shown = torch.cat(
                    [probe.attention_head(part.to(run.device)).cpu() for part in maps]
                )
        else:
            probe = train_linear_probe(
                train.features.to(run.device),
                train.labels.to(run.device),
                num_classes=num_classes,
                seed=params.seed,
                on_progress=on_progress,
                **settings,
            )
            shown = evaluated.features
    result = evaluate(probe, evaluated.features, evaluated.labels)
    run.log(f"top-1 {result.top1:.1%} on {result.total} {params.probe.split} images")
    with replace_dir(Path("build/probe")) as folder:
        state = {name: tensor.cpu().contiguous() for name, tensor in probe.state_dict().items()}
        save_file(state, folder / "head.safetensors")
        save_file(
            {"features": shown.contiguous(), "labels": evaluated.labels},
            folder / "features_val.safetensors",
        )
    run.write_json(
        Path("metrics/probe.json"),
        {
            "probe": {
                "top1": result.top1,
                "top5": result.top5,
                "interval": list(result.interval),
                "total": result.total,
                "split": params.probe.split,
                "head": params.probe.head,
                "pool": params.features.pool,
            }
        },
    )


def chosen(items: FeatureSet, kept: Sequence[bool]) -> FeatureSet:
    """The rows where `kept`."""
    mask = torch.tensor(kept)
    keys = tuple(key for key, keep in zip(items.keys, kept, strict=True) if keep)
    return FeatureSet(items.features[mask], items.labels[mask], keys)


if __name__ == "__main__":
    execute(Params, main)
