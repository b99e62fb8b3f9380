"""Class-conditional generation: a table of embeddings replaces the conditioner (Table 5).

A label gives one token for the UNet's cross-attention. Only the table is trained, not the model.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Int64
from torch import Tensor, nn

from contradiff.base.vae import sample
from contradiff.config import Precision
from contradiff.data.pairs import PairedShards
from contradiff.data.streams import TrainingStream, training_batches
from contradiff.files import explain_damage, load_tensors, sha256_of
from contradiff.generation.class_table_folder import TABLE_NAME, count_steps, read_class_card
from contradiff.generation.params import ClassConditionParams
from contradiff.method.lora import cast_frozen_weights, disable_lora, merge_lora
from contradiff.method.model import ContraDiffModel
from contradiff.method.noise import add_noise, prediction_target
from contradiff.method.weights import CONFIG_NAME, WEIGHTS_NAME
from contradiff.training.batch import ViewChooser
from contradiff.training.loop import OnStep, train
from contradiff.training.optim import build_adamw, cosine_with_warmup
from contradiff.training.state import SavedState
from contradiff.types import Tokens
from contradiff.watch import Watch

MICROBATCH_SIZE = 32
"""Images that go through the UNet at once, because a complete batch of 512 images fits no GPU. The
gradients of a batch are summed over these parts."""


class ClassTable(nn.Module):
    """An embedding for each class and for "no class", mapped to the UNet's width (Sec. 4.2.2).

    The last layer starts at zero, as in the conditioner, so that all tokens are zero at first.

    *Deviation*: the paper's encoder is "a single learnable embedding layer with a dimensionality of
    512". Here a linear layer follows, for the UNet's width. A null class allows guidance.
    """

    def __init__(self, *, num_classes: int, width: int, cross_attention_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes + 1, width)
        self.to_tokens = nn.Linear(width, cross_attention_dim)
        nn.init.zeros_(self.to_tokens.weight)
        nn.init.zeros_(self.to_tokens.bias)

    @property
    def null_label(self) -> int:
        """Return the label of the null class ("no class"), which is the number of classes."""
        return self.embedding.num_embeddings - 1

    def forward(self, labels: Int64[Tensor, " batch"]) -> Tokens:
        """Return one token (encoder_hidden_states) for each label in [0, null_label]."""
        return self.to_tokens(self.embedding(labels))[:, None]


def choose_denoiser(model: ContraDiffModel, *, lora: bool) -> None:
    """If `lora` is true, merge LoRA into the UNet. Otherwise restore the base's UNet."""
    if lora:
        merge_lora(model.unet)
    else:
        disable_lora(model.unet)
        model.self_condition = None


def train_class_table(
    model: ContraDiffModel,
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
    watch: Watch,
) -> None:
    """Train the table in place, on the model's device; resume if `work_dir` has a saved state.

    The loss is Eq. 3 for centre crops, at uniform timesteps. Call `choose_denoiser` before. This
    function freezes the model, whose UNet runs in `precision`; the table is float32. A resumed
    training gives the weights of an uninterrupted one, bit for bit on the same machine. `watch`
    measures how long the training waits for its batches. Raises ValueError if the loss is not
    finite.

    *Deviation*: the paper says that "no additional fine-tuning is applied for image generation".
    Here only the table is trained, because classes need trained embeddings.
    """
    total_steps = count_steps(params, num_samples=pairs.num_samples)
    # The paper does not give a warm-up.
    lengths = {"total_steps": total_steps, "warmup_steps": round(0.02 * total_steps)}
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
    # moments[0] below must be view 0, the centre crop. With several views, "same" draws any view.
    views = "two" if info.views > 1 else "same"
    choose = ViewChooser(pairs, latent_views=views, cond_view="same", condition="labels", seed=seed)
    place = {"start_step": start, "seed": seed, "rank": 0, "world_size": 1}
    stream = TrainingStream(
        pairs, make_batch=choose, with_images=True, batch_size=params.batch_size, **place
    )
    batches = watch.waiting(training_batches(stream, num_workers=num_workers))

    def take_gradients(step: int) -> dict[str, Tensor]:
        """Sum the gradients of Eq. 3 over microbatches (parts of the batch); return the loss."""
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
        target = prediction_target(latents, noise, timesteps, model.schedule)

        loss = torch.zeros((), device=device)
        microbatches = (each.split(MICROBATCH_SIZE) for each in (noisy, target, timesteps, labels))
        for some_noisy, some_target, some_timesteps, some_labels in zip(*microbatches, strict=True):
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                prediction = model.predict(some_noisy, some_timesteps, table(some_labels))
            part = F.mse_loss(prediction.float(), some_target) * (len(some_labels) / batch_size)
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


def load_class_table(folder: Path, *, checkpoint: Path) -> ClassTable:
    """Load a trained table on the CPU for the model in the folder `checkpoint`.

    Raises ValueError if the table is missing, damaged or untrained, or was trained with another
    model.
    """
    card, path = read_class_card(folder), folder / TABLE_NAME
    if card.num_steps == 0:
        why = 'generate.condition "class" needs a trained table, but class_condition.epochs was 0'
        remedy = "set class_condition.epochs to 1 or more, and run `dvc repro class_condition`"
        raise ValueError(f"{folder}: {why}; {remedy}")
    if card.checkpoint_sha256 != sha256_of(checkpoint / WEIGHTS_NAME):
        what = f"the class table was trained with another model than {checkpoint}"
        raise ValueError(f"{folder / CONFIG_NAME}: {what}; run `dvc repro class_condition`")
    remedy = f"run `dvc repro class_condition`, or fetch it with `dvc pull {folder}`"
    weights = load_tensors(path, sha256=card.sha256.get(TABLE_NAME, "nothing"), remedy=remedy)
    with explain_damage(path, remedy=remedy):
        table = ClassTable(
            num_classes=card.num_classes,
            width=card.width,
            cross_attention_dim=len(weights["to_tokens.bias"]),
        )
        table.load_state_dict(weights)
    return table
