"""LoRA, head and classifier learn, nothing else changes, and all weights are restored."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from contradiff.downstream.finetuning import EncodedImages, finetune, finetuned_top1, weights_kept
from contradiff.features.batches import stored_batches
from contradiff.features.models import DiffusionFeatures, compute_features
from contradiff.method.model import ContraDiffModel
from tests.settings import features_params

CPU = torch.device("cpu")
FEATURES = features_params()
Build = Callable[..., ContraDiffModel]


@pytest.fixture
def stored(tiny_data: Path) -> EncodedImages:
    folders = tiny_data / "images", tiny_data / "latents"
    return EncodedImages.of(stored_batches(*folders, split="train", batch_size=5))


@pytest.fixture
def data(stored: EncodedImages) -> EncodedImages:
    """Real images, but latents of three classes that even a random base tells apart."""
    generator = torch.Generator().manual_seed(0)
    means = 2 * torch.randn(3, *stored.latents.shape[1:], generator=generator)
    return replace(stored, latents=means[stored.labels])


def tune(
    model: ContraDiffModel, data: EncodedImages, *, epochs: int = 16, lr: float = 0.003, **changes
):
    losses: list[float] = []
    settings: dict[str, Any] = {"num_classes": 3, "epochs": epochs, "lr": lr, "weight_decay": 0.05}
    settings |= {"batch_size": 10, "seed": 0, "device": CPU}
    settings |= {"on_epoch": lambda _, row: losses.append(row["loss"])}
    return finetune(model, data, features=FEATURES.model_copy(update=changes), **settings), losses


def test_images_come_back_as_they_were(stored: EncodedImages, tiny_data: Path):
    folders = tiny_data / "images", tiny_data / "latents"
    batches = stored_batches(*folders, split="train", batch_size=7)
    for ours, theirs in zip(stored.batches(7), batches, strict=True):
        assert ours.indices == theirs.indices
        for name in ("pixels", "latents", "labels"):
            assert getattr(ours, name).equal(getattr(theirs, name))
    [some] = stored[torch.tensor([3, 1])].batches(2)
    assert some.indices == (3, 1)
    assert some.latents.equal(stored.latents[[3, 1]])


@pytest.mark.parametrize("condition", ["image", "noise"])
def test_it_learns_by_lora_and_head_alone(build_tiny: Build, data: EncodedImages, condition: str):
    model = build_tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with weights_kept(model):
        classifier, losses = tune(model, data, condition=condition)
        assert losses[0] == pytest.approx(1.1, abs=0.15)  # log 3, of three classes
        assert losses[-1] < 0.7 * losses[0]
        after = model.state_dict()
        moved = {name for name in before if not after[name].equal(before[name])}
        # the up blocks come after the maps that h reads, so they are not run and get no gradient
        lora = {name for name in before if "lora_" in name and "up_blocks" not in name}
        assert moved == lora | {name for name in before if name.startswith("attention.")}
        features = FEATURES.model_copy(update={"condition": condition})
        top1 = finetuned_top1(model, classifier, data, features=features, seed=0, device=CPU)
        assert top1 > 0.7
        shown = compute_features(DiffusionFeatures(model, features, 0, CPU), data.batches(24))
        answers = (shown.features @ classifier.weight.T + classifier.bias).argmax(1)
        assert top1 == pytest.approx((answers == data.labels).float().mean().item())
    assert all(model.state_dict()[name].equal(before[name]) for name in before)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_training_and_testing_share_the_precision(
    build_tiny: Build, data: EncodedImages, precision: str, dtype: torch.dtype
):
    model = build_tiny()
    seen: list[torch.dtype] = []
    layer = next(part for part in model.attention.modules() if isinstance(part, torch.nn.Linear))
    layer.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    classifier, _ = tune(model, data, epochs=1, precision=precision)
    in_training = set(seen)
    seen.clear()
    features = FEATURES.model_copy(update={"precision": precision})
    finetuned_top1(model, classifier, data, features=features, seed=0, device=CPU)
    assert set(seen) == in_training == {dtype}
    trained = [p for n, p in model.named_parameters() if n in model.trained_state()]
    assert {p.dtype for p in (*trained, *classifier.parameters())} == {torch.float32}


def test_trainable_parts_come_back_after_an_error(build_tiny: Build, data: EncodedImages):
    model = build_tiny()
    before = {name: tensor.clone() for name, tensor in model.trained_state().items()}
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    expected = r"^transfer\.finetune_lr: the training diverged \(loss is nan at step"
    with pytest.raises(ValueError, match=expected), weights_kept(model):
        tune(model, data, lr=1e30)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(model.trained_state()[name].equal(before[name]) for name in before)


def test_same_seed_same_result(build_tiny: Build, data: EncodedImages):
    model, results = build_tiny(), []
    for _ in range(2):
        torch.manual_seed(len(results))  # the global generator must not matter
        with weights_kept(model):
            results.append(tune(model, data, epochs=2))
    assert results[0][1] == results[1][1]
    assert results[0][0].weight.equal(results[1][0].weight)
