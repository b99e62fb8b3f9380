"""Choices made for speed, beside what they replaced: memory layout, LoRA, iterations of t-SNE.

Our loading stores UNet and VAE channels last where there is no GPU; "plain" is diffusers' layout.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bench._tiny import noise_batch, random_model, read_tiny, use_pefts_layers, write_base
from bench._turns import Row, compare, relative_error
from bench.probe import draw
from contradiff.base.loading import load_vae
from contradiff.downstream.separability import embed
from contradiff.method.lora import merge_lora
from contradiff.method.model import ContraDiffModel
from contradiff.training.flops import training_step

PLAIN = torch.contiguous_format


def rows(folder: Path, *, rounds: int, num_images: int = 64) -> Iterator[Row]:
    """Yield the rows."""
    yield from network_rows(folder, rounds=rounds, num_images=num_images)
    yield tsne_row(rounds=rounds)


def network_rows(folder: Path, *, rounds: int, num_images: int) -> Iterator[Row]:
    """Yield a row for each kind of work on a batch of images."""
    write_base(folder)
    params, ours, plain, pefts, merged = read_tiny(), *(random_model(folder) for _ in range(4))
    plain.unet.to(memory_format=PLAIN)  # pyright: ignore[reportCallIssue]
    use_pefts_layers(pefts)
    merge_lora(merged.unet)
    vaes = load_vae(folder), load_vae(folder).to(memory_format=PLAIN)  # pyright: ignore[reportCallIssue]
    batch = noise_batch(ours, folder, num_images=num_images)
    latents, pixels = batch.latents[0], batch.conditions[0]
    steps = batch.timesteps[0, 0]

    def train(model: ContraDiffModel) -> Tensor:
        loss = training_step(model, params)(batch)["loss"]
        loss.backward()
        model.zero_grad(set_to_none=True)
        return loss.detach()

    @torch.no_grad()
    def features(model: ContraDiffModel) -> Tensor:
        levels, block = params.features.timesteps, model.block
        tokens, noise = model.encode_condition(pixels), batch.noise[0]
        maps = model.level_maps(latents, tokens, timesteps=levels, noise=noise, blocks=[block])
        return model.attention(maps[block])

    @torch.no_grad()
    def sample(model: ContraDiffModel) -> Tensor:
        return model.predict(latents, steps, model.encode_condition(pixels))

    @torch.no_grad()
    def encode(vae: nn.Module) -> Tensor:
        return vae.encode(pixels).latent_dist.mean  # pyright: ignore[reportCallIssue]

    @torch.no_grad()
    def decode(vae: nn.Module) -> Tensor:
        return vae.decode(latents).sample  # pyright: ignore[reportCallIssue]

    layout, layouts = ("channels_last", "plain layout"), (ours, plain)
    for (choice, peer), name, work, networks in (
        (layout, "training step", train, layouts),
        (layout, "feature h", features, layouts),
        (layout, "step of sampling", sample, layouts),
        (layout, "VAE, encode", encode, vaes),
        (layout, "VAE, decode", decode, vaes),
        (("LoRA in one product", "peft's layer"), "training step", train, (ours, pefts)),
        (("LoRA merged", "LoRA apart, peft's layer"), "feature h", features, (merged, pefts)),
    ):
        first, second = (lambda work=work, network=network: work(network) for network in networks)
        yield compare(
            f"{choice}: {name}, {num_images} images",
            peer,
            (first, second),
            rounds=rounds,
            kind="time",
            error=lambda first=first, second=second: relative_error(first(), second()),
            tolerance=1e-4,
            note="equal: the results",
        )


def tsne_row(*, rounds: int) -> Row:
    """Return the row of t-SNE, whose drawings differ; the remark has the divergences."""
    from sklearn.manifold import TSNE

    table = draw(1000, width=128, seed=1)[0].numpy()
    options = {"perplexity": 30.0, "metric": "cosine", "init": "pca", "random_state": 0}
    long, short = TSNE(**options), TSNE(**options, max_iter=500)
    for tsne in (long, short):
        tsne.fit_transform(table)
    same = np.array_equal(embed(table, seed=0), short.embedding_)
    return compare(
        "t-SNE of 1,000 features, 500 iterations",
        "1,000 iterations",
        (lambda: embed(table, seed=0), lambda: TSNE(**options).fit_transform(table)),
        rounds=min(rounds, 2),
        kind="time",
        error=lambda: float(not same),
        tolerance=0.0,
        note=f"divergence {short.kl_divergence_:.3f} instead of {long.kl_divergence_:.3f}",
        warm_up=False,
    )
