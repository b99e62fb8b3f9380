"""Which base everything starts from, and what its configuration says without its weights."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from contradiff.config import Section
from contradiff.files import file_manifest, replace_dir

COMPONENTS = ("vae", "unet", "scheduler")
"""Folders of a model in diffusers' format; the others, such as the text encoder, are not used."""

UNUSED_INPUTS = (
    *("addition_embed_type", "class_embed_type", "num_class_embeds"),
    *("encoder_hid_dim_type", "encoder_hid_dim", "center_input_sample"),
)
"""A UNet with one of these (such as SDXL's) needs more than noisy latents, timesteps and tokens."""

PRESETS = Path(__file__).parents[2] / "presets"
SHIPPED_CONFIGS = {"CompVis/stable-diffusion-v1-4": PRESETS / "stable-diffusion-v1-4"}
"""Hub ids whose configuration the project ships, and its folder."""


class BaseParams(Section):
    """Section `base`: which pretrained model everything starts from."""

    source: Literal["local", "hub"] = Field(
        description="a folder in diffusers' format, or a hub id"
    )
    path: str = Field(min_length=1, description="the folder, or the hub id")
    revision: str | None = Field(description="hub: a commit hash, which pins the weights")

    @model_validator(mode="after")
    def _revision_belongs_to_hub(self) -> "BaseParams":
        if self.source == "hub" and len(self.revision or "") != 40:
            needed = "a full commit hash (40 digits) when base.source is hub"
            raise ValueError(f"base.revision must be {needed}")
        if self.source == "local" and self.revision is not None:
            fault = "has no meaning when base.source is local"
            raise ValueError(f"base.revision {fault}; set it to null")
        return self


def config_folder(base: BaseParams, *, root: Path) -> Path:
    """Return a folder with the base's configuration files; it need not hold weights.

    Configurations that the project does not ship are fetched once and kept in .work of `root`. A
    base that is missing or unusable raises ValueError; a hub out of reach, ConnectionError.
    """
    if base.source == "local":
        folder = local_base(base, root=root)
    elif base.path in SHIPPED_CONFIGS:
        folder = SHIPPED_CONFIGS[base.path]
    else:
        folder = root / ".work/base-config" / f"{base.path.replace('/', '--')}-{base.revision}"
        if not folder.is_dir():
            with replace_dir(folder) as temporary:
                fetch_from_hub(base, temporary, weights=False)
    check_base(folder, weights=False)
    return folder


def local_base(base: BaseParams, *, root: Path) -> Path:
    """Return the folder of a base whose source is local; ValueError where there is none.

    DVC's temporary copy of the project holds what DVC tracks; anything else is only in `root`.
    """
    for folder in (Path(base.path), root / base.path):
        if folder.is_dir():
            return folder
    raise ValueError(
        f"base.path: there is no folder {base.path}; get the tiny base by `dvc pull models/tiny`, "
        "or retrain it by `make base`"
    )


def base_manifest(base: BaseParams, *, root: Path) -> dict[str, Any]:
    """Describe a base for DVC: every file of a checked local one, or the commit of a hub's."""
    if base.source == "hub":
        return {"path": base.path, "revision": base.revision}
    folder = local_base(base, root=root)
    check_base(folder)
    files = [path for name in COMPONENTS for path in (folder / name).rglob("*") if path.is_file()]
    names = (path.relative_to(folder).as_posix() for path in files)
    return {"path": base.path, "files": file_manifest(folder, names)}


def check_base(folder: Path, *, weights: bool = True) -> None:
    """Refuse (ValueError) an unusable base; without `weights`, configuration files are enough."""
    faults = list(_config_faults(folder))
    faults += [
        f"{name} holds no .safetensors file, and pickled weights are not read"
        for name in ("vae", "unet")
        if weights and not list((folder / name).glob("*.safetensors"))
    ]
    if faults:
        raise ValueError("\n".join(f"base.path: {folder}/{fault}" for fault in faults))


def _config_faults(folder: Path) -> Iterator[str]:
    """Yield faults, each beginning with the component; a missing key has diffusers' default."""
    vae, unet, scheduler = (read_config(folder, name) for name in COMPONENTS)
    blocks = [*unet.get("down_block_types", []), *unet.get("up_block_types", [])]
    attends = any("CrossAttn" in block for block in blocks)
    if unet.get("_class_name") != "UNet2DConditionModel" or not attends:
        yield "unet is no UNet2DConditionModel with cross-attention"
    if not isinstance(width := unet.get("cross_attention_dim", 1280), int):
        yield f"unet has cross_attention_dim {width!r}; all blocks must take tokens of one width"
    for key in UNUSED_INPUTS:
        if unet.get(key):
            yield f"unet has {key} {unet[key]!r}, which is not supported"
    mid = "UNetMidBlock2DCrossAttn"
    if unet.get("mid_block_type", mid) != mid:
        yield f"unet has mid_block_type {unet['mid_block_type']!r}, not {mid}"
    of_vae, of_unet = vae.get("latent_channels", 4), unet.get("in_channels", 4)
    if of_vae != of_unet:
        yield f"unet has in_channels {of_unet}, but its vae has latent_channels {of_vae}"
    if (predicted := unet.get("out_channels", 4)) != of_unet:
        why = "Eq. 3 compares noise with noise"
        yield f"unet has in_channels {of_unet} and out_channels {predicted}; {why}"
    if (prediction := scheduler.get("prediction_type", "epsilon")) != "epsilon":
        yield f"scheduler predicts {prediction}; Eq. 3 needs epsilon"


def read_config(folder: Path, component: str) -> dict[str, Any]:
    """Read a component's configuration; ValueError if it is missing or no JSON."""
    name = "scheduler_config.json" if component == "scheduler" else "config.json"
    path = folder / component / name
    if not path.is_file():
        raise ValueError(
            f"base.path: {folder} has no {component}/{name}; it must be a model in diffusers' "
            "format, with vae/, unet/ and scheduler/. Get the tiny base by `dvc pull models/tiny`, "
            "or retrain it by `make base`"
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"base.path: {path}: not valid JSON: {error}") from error


def downsampling_of(folder: Path) -> int:
    """Return the side of an image divided by that of its latent, such as 8."""
    return 2 ** (len(read_config(folder, "vae")["block_out_channels"]) - 1)


def fetch_from_hub(base: BaseParams, destination: Path, *, weights: bool) -> None:
    """Download a base at its commit, with `weights` or without; failures are ConnectionErrors."""
    from huggingface_hub import snapshot_download

    patterns = [f"{name}/*.json" for name in COMPONENTS]
    if weights:
        patterns += [f"{name}/diffusion_pytorch_model.safetensors" for name in ("vae", "unet")]
    try:
        snapshot_download(
            base.path, revision=base.revision, allow_patterns=patterns, local_dir=destination
        )
    except Exception as error:
        raise ConnectionError(
            f"base.path: {base.path} at {base.revision} could not be fetched from the hub "
            f"({error}); without a network, download it elsewhere, set base.source: local and "
            "base.path to its folder"
        ) from error
