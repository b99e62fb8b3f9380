"""The form of an exported model: a folder of safetensors files, config.json and a model card.

    pytorch_lora_weights.safetensors    the LoRA, with diffusers' names
    conditioner.safetensors             and the other trained modules, each a file (see `load_part`)
    config.json                         `ExportConfig`
    README.md                           the model card
    base/                               the base model, only on request

Loading a folder executes no code: safetensors and JSON hold values alone.
"""

import json
import shutil
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from contradiff.base.config import COMPONENTS
from contradiff.config import Section, Seed, parse_exactly
from contradiff.downstream.linear import LinearProbe
from contradiff.features.params import FeaturesParams
from contradiff.files import explain_damage, read_json, replace_dir
from contradiff.generation.class_table import ClassTable
from contradiff.generation.params import GenerateParams
from contradiff.method.attention import TriTimestepAttention
from contradiff.method.checkpoint import base_digest
from contradiff.method.conditioner import Conditioner
from contradiff.method.model import TRAINED_MODULES, ContraDiffModel, build_model
from contradiff.method.params import Architecture, ConditionerParams, LoraParams

FORMAT = 1
"""Raise it when a folder of the former form would be read wrongly, or not at all."""
CONFIG_NAME, CARD_NAME = "config.json", "README.md"
GET_AGAIN = "export or download it again"
ADAPTER = ".default.weight"
"""How peft ends the names of a LoRA's weights in a UNet: with the name of the adapter."""
LORA_NAME = "pytorch_lora_weights.safetensors"


class BaseReference(Section):
    """The base that a model was trained on: its id and commit on the hub, or its folder's name."""

    path: str
    revision: str | None
    sha256: dict[str, str] = Field(description="hashes of the weights of unet and vae")


class ExportConfig(Architecture):
    """The content of config.json. `parts` has the arguments of each module that `load_part` builds.

    `probe` names the part that classifies, if there is one. `class_lora` says whether the UNet uses
    its LoRA for classes. The last three fields are for readers and the model card: rows of the
    report, numbers in metrics/, and how the model was trained.
    """

    format: Literal[1]
    base: BaseReference
    image_size: int
    seed: Seed
    latents_dtype: Literal["float16", "bfloat16"]
    features: FeaturesParams
    generate: GenerateParams
    class_names: list[str]
    probe: str | None
    class_lora: bool
    parts: dict[str, dict[str, Any]]
    scores: list[list[str]]
    metrics: dict[str, Any]
    training: dict[str, Any]


@dataclass(frozen=True)
class Parts:
    """An exported model in memory, in evaluation mode on the CPU. `base` is the base's folder.

    `more` has the trained modules that are no part of the network: class table and probes.
    """

    config: ExportConfig
    network: ContraDiffModel
    more: dict[str, nn.Module]
    base: Path


def write_folder(folder: Path, parts: Parts, card: str, *, with_base: bool) -> None:
    """Replace `folder` by an export, completely or not at all. `with_base` copies the base too.

    Raises ValueError if `folder` has files of another kind.
    """
    if folder.exists() and not (folder.is_dir() and _is_replaceable(folder)):
        raise ValueError(f"{folder}: it exists, and is no exported model; choose another folder")
    network = parts.network
    modules = {name: getattr(network, name) for name in TRAINED_MODULES} | parts.more
    with replace_dir(folder) as temporary:
        write_lora(temporary, network.unet, parts.config.lora)
        for name, module in modules.items():
            if module is not None:
                state = module.state_dict().items()
                tensors = {key: value.cpu().contiguous() for key, value in state}
                save_file(tensors, temporary / f"{name}.safetensors", metadata={"format": "pt"})
        config = json.dumps(parts.config.model_dump(mode="json"), indent=1, sort_keys=True)
        (temporary / CONFIG_NAME).write_text(config + "\n", encoding="utf-8")
        (temporary / CARD_NAME).write_text(card, encoding="utf-8")
        for component in COMPONENTS if with_base else ():
            shutil.copytree(parts.base / component, temporary / "base" / component)


def write_lora(folder: Path, unet: nn.Module, params: LoraParams) -> None:
    """Write a UNet's LoRA to `LORA_NAME`, as diffusers does: without the adapter's name of peft."""
    from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin

    layers = {
        name.replace(ADAPTER, ".weight"): value.cpu().contiguous()
        for name, value in unet.state_dict().items()
        if "lora_" in name
    }
    config = {"r": params.rank, "lora_alpha": params.alpha, "target_modules": params.targets}
    StableDiffusionLoraLoaderMixin.save_lora_weights(
        folder, unet_lora_layers=layers, unet_lora_adapter_metadata=config
    )


def read_folder(folder: Path, base: Path) -> Parts:
    """Load an export and its base.

    Raises ValueError if a file is missing or damaged, if the form is newer than this code, or if
    `base` has not the weights that the model was trained on.
    """
    config = read_export_config(folder)
    for component, digest in config.base.sha256.items():
        if (found := base_digest(base, component)) != digest:
            raise ValueError(
                f"{base}: this is not the base that {folder} was trained on: the {component} of "
                f"{config.base.path} has the sha256 {digest}, but this one has {found or 'no file'}"
            )
    lora = _read(folder / LORA_NAME).items()
    state = {name.replace(".weight", ADAPTER): value for name, value in lora}
    with torch.random.fork_rng(devices=[]):  # all initial weights are replaced
        network = build_model(base, config, image_size=config.image_size, seed=None).eval()
        for name in TRAINED_MODULES:
            if getattr(network, name) is not None:
                tensors = _read(folder / f"{name}.safetensors").items()
                state |= {f"{name}.{key}": value for key, value in tensors}
        network.load_trained_state(state)
    more = {name: load_part(folder, name) for name in config.parts if name not in TRAINED_MODULES}
    return Parts(config, network, more, base)


def read_export_config(folder: Path) -> ExportConfig:
    """Read config.json. Raises ValueError if it is missing, damaged, or newer than this code."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"{folder}: no exported model, because it has no {CONFIG_NAME}")
    content = read_json(path, remedy=GET_AGAIN)
    found = content.get("format")
    if not isinstance(found, int):
        raise ValueError(f"{path}: no exported model, because it has no format number")
    if found > FORMAT:
        newer = f"written by a newer contradiff (format {found}; this one reads {FORMAT})"
        raise ValueError(f"{path}: {newer}; run `pip install --upgrade contradiff`")
    return parse_exactly(ExportConfig, content, source=str(path))


def load_part(folder: Path, name: str) -> nn.Module:
    """Load one trained module alone, without the base; `parts` in config.json has their names."""
    parts = read_export_config(folder).parts
    if name not in parts:
        raise ValueError(f"{folder}: there is no part {name!r}, only {sorted(parts)}")
    try:
        return build_part(name, parts[name], _read(folder / f"{name}.safetensors"))
    except RuntimeError as error:
        raise ValueError(f"{folder}: {name}.safetensors does not fit {CONFIG_NAME}") from error


def build_part(name: str, arguments: dict[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    """Build a trained module that is used as it is, from its arguments and its weights."""
    with torch.random.fork_rng(devices=[]):
        module = _BUILDERS[name](**arguments)
    module.load_state_dict(state)
    return module.eval().requires_grad_(requires_grad=False)


def _conditioner(params: dict[str, Any], **sizes: int) -> Conditioner:
    return Conditioner(ConditionerParams.model_validate(params), **sizes)


def _sgd_probe(dim: int, num_classes: int, attention: dict[str, Any] | None = None) -> nn.Module:
    probe = LinearProbe(dim, num_classes)
    if attention is None:
        return probe
    head = TriTimestepAttention(**attention)
    return nn.Sequential(OrderedDict(attention_head=head, probe=probe))


_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "attention": TriTimestepAttention,
    "conditioner": _conditioner,
    "class_table": ClassTable,
    "probe_logistic": LinearProbe,
    "probe_sgd": _sgd_probe,
}


def _read(path: Path) -> dict[str, Tensor]:
    with explain_damage(path, remedy=GET_AGAIN):
        return load_file(path)


def _is_replaceable(folder: Path) -> bool:
    return not any(folder.iterdir()) or (folder / CONFIG_NAME).is_file()
