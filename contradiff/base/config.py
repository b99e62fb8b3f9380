"""Which base everything starts from, and what its configuration says without its weights."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from contradiff.config import Section
from contradiff.files import file_manifest

PARTS = ("vae", "unet", "scheduler")

UNUSED_INPUTS = (
    *("addition_embed_type", "class_embed_type", "num_class_embeds"),
    *("encoder_hid_dim_type", "encoder_hid_dim", "center_input_sample"),
)
"""A UNet with one of these (SDXL's has) does more than noisy latents, timesteps and tokens ask."""

SHIPPED_CONFIGS = {"CompVis/stable-diffusion-v1-4": "stable-diffusion-v1-4"}
"""Hub ids whose configuration the project ships, and its folder there."""


class BaseParams(Section):
    """Section `base`: which pretrained model everything starts from."""

    source: Literal["local", "hub"] = Field(
        description="a folder in diffusers' format, or a hub id"
    )
    path: str = Field(min_length=1, description="the folder, or the hub id")
    revision: str | None = Field(description="hub: a commit hash, which pins the weights")

    @model_validator(mode="after")
    def _revision_belongs_to_hub(self) -> "BaseParams":
        if self.source == "hub" and (self.revision is None or len(self.revision) != 40):
            raise ValueError(
                "base.revision must be a full commit hash (40 digits) when base.source is hub"
            )
        if self.source == "local" and self.revision is not None:
            raise ValueError(
                "base.revision has no meaning when base.source is local; set it to null"
            )
        return self


def config_folder(base: BaseParams, *, root: Path, shipped: Path) -> Path:
    """Where a base's configuration is read without weights and without a network.

    Args:
        base: which base.
        root: the project's folder, which a local base's path is relative to.
        shipped: folder of the configurations that the project ships.

    Raises:
        ValueError: there is none; names base.path.
    """
    if base.source == "local":
        folder = local_base(base, root=root)
    elif base.path in SHIPPED_CONFIGS:
        folder = shipped / SHIPPED_CONFIGS[base.path]
    else:
        raise ValueError(
            f"base.path: the configuration of {base.path} is not shipped in {shipped} (there: "
            f"{', '.join(SHIPPED_CONFIGS)}), so that nothing is known of it before it is fetched; "
            "or set base.source: local and base.path to a folder of it"
        )
    check_config(folder)
    return folder


def local_base(base: BaseParams, *, root: Path) -> Path:
    """The folder of a base whose source is local.

    In DVC's temporary copies of the project a folder that DVC tracks is here; one that it does not
    is only below the project's root.

    Raises:
        ValueError: there is no such folder; names base.path.
    """
    here = Path(base.path)
    folder = here if here.is_dir() else root / base.path
    if not folder.is_dir():
        raise ValueError(
            f"base.path: there is no folder {base.path}; the tiny base comes by "
            "`dvc pull models/tiny`, or is retrained by `make base`"
        )
    return folder


def base_manifest(base: BaseParams, *, root: Path) -> dict[str, Any]:
    """What stands for a base in DVC: every file of a local one, or the pinned commit of a hub's.

    Raises:
        ValueError: a local folder is missing or cannot be used; names base.path.
    """
    if base.source == "hub":
        return {"path": base.path, "revision": base.revision}
    folder = local_base(base, root=root)
    check_base(folder)
    files = [path for part in PARTS for path in (folder / part).rglob("*") if path.is_file()]
    names = [path.relative_to(folder).as_posix() for path in files]
    return {"path": base.path, "files": file_manifest(folder, names)}


def check_base(folder: Path) -> None:
    """Refuse a folder that is no latent diffusion model in diffusers' format.

    Raises:
        ValueError: a part is missing, or is not what ContraDiff can use; names base.path.
    """
    check_config(folder)
    for part in ("vae", "unet"):
        if not list((folder / part).glob("*.safetensors")):
            raise ValueError(
                f"base.path: {folder / part} holds no .safetensors file; pickled weights are not "
                "read"
            )


def check_config(folder: Path) -> None:
    """As `check_base`, from the configuration files alone: there need be no weights.

    Raises:
        ValueError: a part is missing, or is not what ContraDiff can use; names base.path.
    """
    vae, unet, scheduler = (read_part(folder, part) for part in PARTS)
    blocks = [*unet.get("down_block_types", []), *unet.get("up_block_types", [])]
    attends = any("CrossAttn" in block for block in blocks)
    if unet.get("_class_name") != "UNet2DConditionModel" or not attends:
        raise ValueError(
            f"base.path: {folder}/unet is no UNet2DConditionModel with cross-attention"
        )
    # 1280 is diffusers' default
    if not isinstance(width := unet.get("cross_attention_dim", 1280), int):
        raise ValueError(
            f"base.path: {folder}/unet has cross_attention_dim {width!r}; all its blocks must "
            "attend to tokens of one width"
        )
    for key in UNUSED_INPUTS:
        if unet.get(key):
            raise ValueError(
                f"base.path: {folder}/unet has {key} {unet[key]!r}, which is not supported"
            )
    mid = "UNetMidBlock2DCrossAttn"
    if unet.get("mid_block_type", mid) != mid:
        raise ValueError(
            f"base.path: {folder}/unet has mid_block_type {unet['mid_block_type']!r}, not {mid}"
        )
    # 4 is the default of both
    latent_channels, in_channels = vae.get("latent_channels", 4), unet.get("in_channels", 4)
    if latent_channels != in_channels:
        raise ValueError(
            f"base.path: {folder}/unet takes {in_channels} channels (in_channels), but its vae "
            f"makes latents of {latent_channels} (latent_channels)"
        )
    if (out_channels := unet.get("out_channels", 4)) != in_channels:
        raise ValueError(
            f"base.path: {folder}/unet takes {in_channels} channels and predicts {out_channels} "
            "(out_channels); Eq. 3 compares noise with noise"
        )
    if scheduler.get("prediction_type", "epsilon") != "epsilon":
        raise ValueError(
            f"base.path: {folder}/scheduler predicts {scheduler['prediction_type']}; "
            "Eq. 3 needs epsilon"
        )


def read_part(folder: Path, part: str) -> dict[str, Any]:
    """The configuration of one of PARTS.

    Raises:
        ValueError: it is missing or no JSON; names base.path.
    """
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    path = folder / part / name
    if not path.is_file():
        raise ValueError(
            f"base.path: {folder} has no {part}/{name}; expected a model folder in diffusers' "
            "format with vae/, unet/ and scheduler/. The tiny base comes by "
            "`dvc pull models/tiny`, or is retrained by `make base`"
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"base.path: {path}: not valid JSON: {error}") from error


def downsampling_of(folder: Path) -> int:
    """Side of an image over that of its latent, from the autoencoder's configuration."""
    vae = read_part(folder, "vae")
    return 2 ** (len(vae["block_out_channels"]) - 1)


def fetch_from_hub(name: str, revision: str, destination: Path, *, weights: bool) -> None:
    """Download the parts that are used, at one pinned commit, as safetensors alone.

    Args:
        name: hub id.
        revision: commit hash.
        destination: folder.
        weights: whether to, or the configuration alone.

    Raises:
        ValueError: it cannot be fetched; names base.path.
    """
    from huggingface_hub import snapshot_download

    patterns = [f"{part}/*.json" for part in PARTS]
    if weights:
        patterns += [f"{part}/diffusion_pytorch_model.safetensors" for part in PARTS[:2]]
    try:
        snapshot_download(name, revision=revision, allow_patterns=patterns, local_dir=destination)
    except Exception as error:
        raise ValueError(
            f"base.path: {name} at {revision} could not be fetched from the hub ({error}); without "
            "a network, download it elsewhere, set base.source: local and base.path to its folder"
        ) from error
