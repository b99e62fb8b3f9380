"""Class-conditional generation: a table of embeddings replaces the conditioner (Table 5).

label => one token for the UNet's cross-attention; training changes the table, never the model
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int64
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor, nn

from contradiff.base.vae import sample
from contradiff.config import Section
from contradiff.data.streams import PairedShards, TrainingStream, training_batches
from contradiff.files import sha256_of
from contradiff.method.checkpoint import WEIGHTS_NAME, read_config, write_weights
from contradiff.method.lora import cast_frozen_weights, disable_lora, merge_lora
from contradiff.method.model import ContraDiff
from contradiff.method.noise import add_noise
from contradiff.training.batch import ViewChooser
from contradiff.training.loop import OnStep, train
from contradiff.training.optim import build_adamw, cosine_with_warmup
from contradiff.training.state import SavedState
from contradiff.types import Precision, Tokens

TABLE_NAME = "table.safetensors"
MICROBATCH_SIZE = 32
"""Images that go through the UNet at once; their gradients add up. Stable Diffusion's activations
for a batch of 512 fit no GPU."""


class ClassConditionParams(Section):
    """Section `class_condition`. The paper says only: one embedding layer of width 512."""

    epochs: int = Field(ge=0, description="0: train no table; generate.condition: class needs one")
    width: int = Field(ge=1, description="width of an embedding")
    drop: float = Field(ge=0, lt=1, description="chance that a label is replaced by the null class")
    batch_size: int = Field(ge=1, description="images a step")
    lr: float = Field(gt=0, description="peak learning rate")
    lora: bool = Field(description="whether the denoiser keeps its LoRA, here and in generation")


class ClassTable(nn.Module):
    """One embedding a class and one for the null class, mapped to the UNet's width (Sec. 4.2.2).

    Like the conditioner's, its last layer starts at zero, so that all tokens are zero at first.

    *Deviation*: the paper's encoder is "a single learnable embedding layer with a dimensionality of
    512". The UNet needs 768, so a linear layer follows. Classifier-free guidance needs the null
    class.
    """

    def __init__(self, *, num_classes: int, width: int, cross_attention_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes + 1, width)
        self.to_tokens = nn.Linear(width, cross_attention_dim)
        nn.init.zeros_(self.to_tokens.weight)
        nn.init.zeros_(self.to_tokens.bias)

    @property
    def null_label(self) -> int:
        """Label of the null class: the last row, `num_classes`."""
        return self.embedding.num_embeddings - 1

    def forward(self, labels: Int64[Tensor, " batch"]) -> Tokens:
        """Labels in [0, null_label] => encoder_hidden_states, one token an image."""
        return self.to_tokens(self.embedding(labels))[:, None]


def choose_denoiser(model: ContraDiff, *, lora: bool) -> None:
    """Turn the model into ContraDiff's denoiser, with LoRA merged, or back into the base's own."""
    if lora:
        merge_lora(model.unet)
    else:
        disable_lora(model.unet)
        model.self_condition = None


def count_steps(params: ClassConditionParams, *, num_samples: int) -> int:
    """Count the optimiser steps of the whole training; an epoch drops its last, smaller batch.

    A ValueError says that a batch needs more images than there are.
    """
    steps_per_epoch = num_samples // params.batch_size
    if params.epochs and steps_per_epoch == 0:
        given = f"class_condition.batch_size: {params.batch_size}"
        raise ValueError(f"{given} is more than the {num_samples} images")
    return params.epochs * steps_per_epoch


def train_class_table(
    model: ContraDiff,
    table: ClassTable,
    pairs: PairedShards,
    *,
    params: ClassConditionParams,
    precision: Precision,
    seed: int,
    work_dir: Path,
    num_workers: int,
    log_every: int,
    checkpoint_every: int,
    on_step: OnStep,
) -> None:
    """Train the table in place, on the model's device; the same `work_dir` resumes the training.

    The loss is Eq. 3 for the latents of centre crops at uniform timesteps. A resumed training ends
    with the same weights, bit for bit on one machine: all that is random in step s is seeded by
    (seed, s). The model comes with LoRA merged or disabled and is frozen here; `precision` is that
    of its passes, and the table is float32. A ValueError says that the loss is not finite.

    *Deviation*: the paper says that "no additional fine-tuning is applied for image generation". An
    embedding has to be trained, but the model is not.
    """
    total_steps = count_steps(params, num_samples=pairs.num_samples)
    lengths = {"total_steps": total_steps, "warmup_steps": round(0.02 * total_steps)}  # our choice
    device = model.unet.device
    model.requires_grad_(requires_grad=False).eval()
    if precision == "bf16":
        cast_frozen_weights(model.unet)
    table.to(device)
    optimizer = build_adamw(
        table.named_parameters(), lr=params.lr, betas=(0.9, 0.999), weight_decay=0.0
    )
    weights = {f"table.{name}": tensor for name, tensor in table.state_dict().items()}
    saved = SavedState(work_dir / "state.safetensors", weights, every=checkpoint_every)
    start = saved.resume(optimizer)
    info = pairs.latent_index.info
    # View 0 of each image comes first: "two" pairs it with another view, where there is one.
    views = "two" if info.views > 1 else "same"
    choose = ViewChooser(pairs, latent_views=views, cond_view="same", condition="labels", seed=seed)
    place = {"start_step": start, "seed": seed, "rank": 0, "world_size": 1}
    stream = TrainingStream(
        pairs, make_batch=choose, with_images=True, batch_size=params.batch_size, **place
    )
    batches = training_batches(stream, num_workers=num_workers)

    def take_gradients(step: int) -> dict[str, Tensor]:
        """Add up the gradients of Eq. 3 over the microbatches; return the loss."""
        generator = torch.Generator(device).manual_seed(seed * 1_000_003 + step)
        loaded = next(batches)
        moments = loaded["moments"][0].to(device, non_blocking=True)
        labels = loaded["labels"].to(device, non_blocking=True)
        batch_size, channels, height, width = moments.shape
        shape = (2, batch_size, channels // 2, height, width)
        posterior_noise, noise = torch.randn(shape, generator=generator, device=device)
        latents = sample(moments, noise=posterior_noise, scaling_factor=info.scaling_factor)
        dropped = torch.rand(batch_size, generator=generator, device=device) < params.drop
        labels = labels.masked_fill(dropped, table.null_label)
        num_timesteps = model.schedule.num_train_timesteps
        timesteps = torch.randint(num_timesteps, (batch_size,), generator=generator, device=device)
        noisy = add_noise(latents, noise, timesteps, model.schedule.alphas_cumprod)

        loss = torch.zeros((), device=device)
        microbatches = (each.split(MICROBATCH_SIZE) for each in (noisy, noise, timesteps, labels))
        for some_noisy, some_noise, some_timesteps, some_labels in zip(*microbatches, strict=True):
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                noise_pred = model.noise_pred(some_noisy, some_timesteps, table(some_labels))
            part = F.mse_loss(noise_pred.float(), some_noise) * (len(some_labels) / batch_size)
            part.backward()
            loss += part.detach()
        return {"loss": loss}

    train(
        take_gradients,
        steps=range(start, total_steps),
        optimizer=optimizer,
        lr=lambda step: params.lr * cosine_with_warmup(step, **lengths),
        lr_key="class_condition.lr",
        is_reported=lambda done: done % log_every == 0,
        on_step=on_step,
        saved=saved,
    )


def save_class_table(
    folder: Path,
    table: ClassTable | None,
    *,
    checkpoint: Path,
    num_classes: int,
    num_steps: int,
    params: ClassConditionParams,
) -> None:
    """Write table.safetensors and config.json in place of an earlier folder, whole or not at all.

    The table is None where no step was taken. `checkpoint` is the folder of the model that it was
    trained with, and `num_classes` counts no null class.
    """
    config = params.model_dump(include={"drop", "lora", "width"}) | {
        "checkpoint_sha256": sha256_of(checkpoint / WEIGHTS_NAME),
        "num_classes": num_classes,
        "num_steps": num_steps,
    }
    write_weights(folder, {} if table is None else {TABLE_NAME: table.state_dict()}, config)


def read_class_config(folder: Path) -> dict[str, Any]:
    """Read a table's config.json; a ValueError says that there is none."""
    return read_config(folder, what="table of classes", stage="class_condition")


def load_class_table(folder: Path, *, checkpoint: Path) -> ClassTable:
    """Rebuild a trained table on the CPU for the model in `checkpoint`.

    A ValueError says that there is none, or that it is untrained or belongs to another model.
    """
    config = read_class_config(folder)
    if config["num_steps"] == 0:
        why = "class_condition.epochs is 0, so that no table was trained"
        need = "generate.condition: class needs one; set class_condition.epochs to 1 or more"
        raise ValueError(f"{folder}: {why}, but {need}")
    if config["checkpoint_sha256"] != sha256_of(checkpoint / WEIGHTS_NAME):
        what = f"{folder}: this table was trained with another model than {checkpoint}"
        raise ValueError(f"{what}; run `dvc repro class_condition`")
    weights = load_file(folder / TABLE_NAME)
    sizes = {name: config[name] for name in ("num_classes", "width")}
    table = ClassTable(**sizes, cross_attention_dim=len(weights["to_tokens.bias"]))
    table.load_state_dict(weights)
    return table
