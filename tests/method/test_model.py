"""How the parts of the model are connected, which are trained, and the maps."""

from collections.abc import Callable
from itertools import product

import pytest
import torch

from contradiff.method.model import ContraDiffModel
from contradiff.method.parameter_counts import count_parameters
from tests.method.batches import draw_batch, watch_maps

Build = Callable[..., ContraDiffModel]


def test_self_conditioning_starts_as_nothing_and_feeds_the_up_blocks_alone(build_tiny: Build):
    model, plain = build_tiny(head={"self_conditioning": True}), build_tiny()
    assert model.self_condition is not None
    linear = model.self_condition.to_time
    counts = count_parameters(model, num_vae_parameters=0)["modules"]
    assert counts["self_condition"] == (32 * 64 + 64, 0)
    assert not model.load_state_dict(plain.state_dict(), strict=False).unexpected_keys

    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, 4, 8, 8, generator=generator)
    tokens = torch.randn(2, 16, 16, generator=generator)
    timesteps = torch.tensor([5, 900])
    with torch.no_grad():
        expected = plain.predict(noisy, timesteps, tokens)
        changed = model.predict(noisy, timesteps, tokens)
        maps = [m.split_unet.down(noisy, timesteps, tokens).bottleneck for m in (model, plain)]
        pooled = maps[0].mean(dim=(2, 3))
        # By hand: only the up blocks get the changed time embedding.
        emb = plain.unet.time_embedding(plain.unet.time_proj(timesteps))
        replaced = [emb + linear(pooled)]
        for block in plain.unet.up_blocks:
            block.register_forward_pre_hook(
                lambda _, args, kwargs: (args, kwargs | {"temb": replaced[0]}), with_kwargs=True
            )
        written_out = plain.unet(noisy, timesteps, encoder_hidden_states=tokens).sample
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
        at_start = model.predict(noisy, timesteps, tokens)
    assert maps[0].equal(maps[1])
    assert not torch.allclose(changed, expected)
    torch.testing.assert_close(changed, written_out)
    assert at_start.equal(expected)


def test_trained_state_is_exactly_what_training_may_change(build_tiny: Build):
    model = build_tiny()
    state = set(model.trained_state())
    attentions = [name for name, _ in model.named_modules() if name.endswith("attn2")]
    layers = product(attentions, "qkv", "AB")
    lora = {f"{attention}.to_{t}.lora_{factor}.default.weight" for attention, t, factor in layers}
    rest = {name for name in model.state_dict() if not name.startswith("unet.")}
    assert len(lora) == 7 * 3 * 2
    assert state == lora | rest
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert state - trainable == {f"projector.1.{name}" for name in statistics}


def test_a_trained_state_that_does_not_fit_is_refused(build_tiny: Build):
    model = build_tiny()
    state, name = model.trained_state(), "attention.to_q.weight"
    for other in (
        {key: value for key, value in state.items() if key != name},
        state | {"attention.extra": torch.zeros(1)},
        state | {name: state[name][:-1]},
    ):
        with pytest.raises(ValueError, match="it has other lora, conditioner or head"):
            model.load_trained_state(other)


def test_training_mode_leaves_the_base_in_evaluation_mode(build_tiny: Build):
    model = build_tiny().train()
    assert model.projector.training
    assert not any(module.training for module in model.unet.modules())
    assert not model.eval().projector.training


@pytest.mark.parametrize("block", ["mid", "up.1", "mid+up.1"])
@torch.no_grad()
def test_level_maps_are_those_of_single_passes(build_tiny: Build, block: str):
    """The noisiest level comes first, in whatever order the timesteps are given."""
    model, batch = build_tiny(head={"block": block}), draw_batch(2)
    tokens, latents = model.encode_condition(batch.conditions[0]), batch.latents[0]
    options = {"timesteps": [101, 401, 201], "noise": batch.noise[0], "blocks": [block]}
    maps = model.level_maps(latents, tokens, **options)[block]
    seen = watch_maps(model, block)
    for level, timestep in enumerate((401, 201, 101)):
        alpha = model.schedule.alphas_cumprod[timestep]
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * batch.noise[0, level]
        model.unet(noisy, timestep, encoder_hidden_states=tokens)
    torch.testing.assert_close(maps, torch.stack(seen, dim=1), rtol=1e-4, atol=1e-5)
