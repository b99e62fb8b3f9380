"""From the results of the pipeline, in build/ and metrics/, to a model that can be exported."""

from pathlib import Path
from typing import Any

from torch import nn

from contradiff.base.config import BaseParams
from contradiff.config import Seed, parse, read_params
from contradiff.data.params import LatentsParams
from contradiff.data.shards import INDEX_NAME
from contradiff.features.cache import ModelFolders
from contradiff.features.params import FeaturesParams
from contradiff.files import load_tensors, read_json
from contradiff.generation.class_table import load_class_table
from contradiff.generation.class_table_folder import read_class_card
from contradiff.generation.params import GenerateParams
from contradiff.method import checkpoint
from contradiff.method.params import Architecture
from contradiff.method.unet import block_channels
from contradiff.method.weights import CONFIG_NAME
from contradiff.pretrained.folder import (
    FORMAT,
    BaseReference,
    ExportConfig,
    Parts,
    build_part,
    write_folder,
)
from contradiff.pretrained.hub import push
from contradiff.pretrained.model_card import model_card


class ProjectParams(Architecture):
    """The sections of params.yaml that an exported model keeps."""

    seed: Seed
    base: BaseParams
    latents: LatentsParams
    features: FeaturesParams
    generate: GenerateParams


def read_project(root: Path) -> Parts:
    """Load what the pipeline in the folder `root` has trained, as an export has it.

    Raises ValueError if a result is missing, or was not made with the present params.yaml.
    """
    source, build = root / "params.yaml", root / "build"
    params = parse(ProjectParams, read_params(source), source=str(source))
    base, pretrain = build / "base", build / "pretrain"
    network = checkpoint.load_checkpoint(pretrain, base=base, expected=params)
    trained = checkpoint.read_checkpoint_card(pretrain)
    width = network.unet.config["cross_attention_dim"]
    channels, size, _ = network.conditioner.shape
    in_channels = block_channels(network.unet, network.block)
    parts: dict[str, dict[str, Any]] = {
        "attention": {"in_channels": in_channels, **params.head.attention_arguments},
        "conditioner": {"in_channels": channels, "size": size, "cross_attention_dim": width},
    }
    parts["conditioner"]["params"] = params.conditioner.model_dump(mode="json")
    more: dict[str, nn.Module] = {}
    table = read_class_card(build / "class_condition")
    if table.num_steps:
        sizes = {"num_classes": table.num_classes, "width": table.width}
        parts["class_table"] = sizes | {"cross_attention_dim": width}
        more["class_table"] = load_class_table(build / "class_condition", checkpoint=pretrain)
    class_names = _class_names(build / "shards")
    # Images without labels are of one class, and no probe was trained. metrics/ is of other images.
    probe = _read_probe_facts(root, params) if len(class_names) > 1 else None
    for protocol, file in (("logistic", "logistic.safetensors"), ("sgd", "head.safetensors")):
        if probe and (path := build / "probe" / file).is_file():
            digest, name = probe["sha256"].get(file, "nothing"), f"probe_{protocol}"
            state = load_tensors(path, sha256=digest, remedy="run `dvc repro probe`")
            is_attentive = protocol == "sgd" and probe["head"] == "attentive"
            num_classes, dim = state[f"{'probe.' * is_attentive}linear.weight"].shape
            parts[name] = {"dim": dim, "num_classes": num_classes}
            if is_attentive:
                parts[name]["attention"] = parts["attention"]
            more[name] = build_part(name, parts[name], state)
    digests = {name: checkpoint.base_digest(base, name) for name in ("unet", "vae")}
    config = ExportConfig(
        format=FORMAT,
        base=BaseReference(path=params.base.path, revision=params.base.revision, sha256=digests),
        image_size=trained.image_size,
        seed=params.seed,
        latents_dtype=params.latents.dtype,
        features=params.features.model_copy(update={"more_triples": [], "more_blocks": []}),
        generate=params.generate,
        class_names=class_names,
        probe=f"probe_{probe['headline']}" if probe else None,
        class_lora=table.lora,
        parts=parts,
        scores=_read_json(build / "report/summary.json").get("rows", []),
        metrics=_metrics(root / "metrics") if probe else {},
        training=trained.model_dump(include={"num_steps", "parameters", "params"}),
        **{name: getattr(params, name) for name in Architecture.model_fields},
    )
    return Parts(config, network, more, base)


def _read_probe_facts(root: Path, params: ProjectParams) -> dict[str, Any]:
    """Read build/probe/config.json; raises ValueError if its features are not params.yaml's."""
    folder, models = (
        root / "build/probe",
        ModelFolders(root / "build/pretrain", root / "build/base", root),
    )
    facts = read_json(folder / CONFIG_NAME, remedy="run `dvc repro probe`")
    if params.features.model != "contradiff":
        fault = f'"{params.features.model}" is not the trained model, which is to be exported'
        raise ValueError(
            f'features.model: {fault}; set it to "contradiff", and run `dvc repro probe`'
        )
    made_with = {"seed": params.seed, **params.features.model_dump(mode="json")}
    if facts["made_with"] != made_with or facts["checkpoint"] != models.fingerprint("contradiff"):
        fault = (
            "the probe was trained on other features than those of params.yaml and build/pretrain"
        )
        raise ValueError(f"{folder}: {fault}; run `dvc repro probe`")
    return facts


def _class_names(shards: Path) -> list[str]:
    path = shards / INDEX_NAME
    if not path.is_file():
        remedy = f"run `dvc repro shard`, or fetch it with `dvc pull {path}`"
        raise ValueError(f"{path}: the names of the classes are missing; {remedy}")
    facts = read_json(path, remedy="run `dvc repro shard`")["facts"]
    return list(facts.get("class_names", facts["class_ids"]))


def _metrics(folder: Path) -> dict[str, Any]:
    return _read_json(folder / "probe.json") | _read_json(folder / "score.json")


def _read_json(path: Path) -> dict[str, Any]:
    """Read a file of scores. It may be missing: a model can be exported before it is measured."""
    return read_json(path, remedy="run `dvc repro`") if path.is_file() else {}


def export(
    folder: str | Path,
    *,
    root: str | Path = ".",
    push_to: str | None = None,
    private: bool = False,
    with_base: bool = False,
    licence: str = "other",
) -> str | None:
    """Write what the pipeline in the folder `root` has trained to `folder`, with a model card.

    `with_base` copies the base model too. With `push_to`, such as "user/name", upload the folder to
    the Hugging Face hub, and return the address of the commit. `licence` is for the model card.

    Raises ValueError if a result is missing, was not made with the present params.yaml, or if
    `folder` has files of another kind, and ConnectionError if the upload fails.
    """
    parts, place = read_project(Path(root)), Path(folder)
    name = push_to or place.resolve().name
    card = model_card(parts.config, name=name, licence=licence, with_base=with_base)
    write_folder(place, parts, card, with_base=with_base)
    return push(place, push_to, private=private) if push_to is not None else None
