"""The mean and its gradient are the same with and without microbatches."""

import weakref

import pytest
import torch
from torch import Tensor, nn

from contradiff.method.microbatches import mean_in_microbatches


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("microbatch_size", [1, 2, 3, 5, 9])
def test_mean_and_gradients_are_those_of_one_piece(microbatch_size: int):
    """Check gradients of computed inputs and of weights, through a later scaling of the mean."""
    layer = nn.Linear(4, 3).double()
    inputs, constant, weights = draw(5, 4, seed=0), draw(5, 3, seed=1), draw(5, seed=2)
    source = draw(4, seed=3).requires_grad_()
    lengths: list[int] = []

    def loss_of(rows: slice, hidden: Tensor, constant: Tensor) -> Tensor:
        lengths.append(len(hidden))
        error = (layer(hidden).tanh() - constant).square().sum(dim=1)
        return (weights[rows] * error).mean()

    def gradients(mean: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(mean * 0.7, [source, *layer.parameters()]))

    expected = loss_of(slice(None), inputs * source, constant)
    lengths.clear()
    given, trained = [inputs * source, constant], list(layer.parameters())
    mean = mean_in_microbatches(loss_of, given, trained, microbatch_size=microbatch_size)
    assert (sum(lengths), max(lengths)) == (5, min(microbatch_size, 5))
    torch.testing.assert_close(mean, expected)
    torch.testing.assert_close(gradients(mean), gradients(expected))


def test_a_microbatch_is_freed_before_the_next_one_runs():
    """Both its activations and the gradients of its rows are freed."""
    seen: list[weakref.ref[Tensor]] = []

    def loss_of(_: slice, rows: Tensor) -> Tensor:
        assert [ref() for ref in seen] == [None] * len(seen)
        hidden = (2 * rows).exp()
        rows.register_hook(lambda gradient: seen.append(weakref.ref(gradient)))
        seen.extend(weakref.ref(tensor) for tensor in (rows, hidden))
        return hidden.mean()

    given = draw(4, 2, seed=0).requires_grad_()
    mean_in_microbatches(loss_of, [given], [], microbatch_size=1).backward()
    assert len(seen) == 4 * 3
    torch.testing.assert_close(given.grad, 2 * (2 * given.detach()).exp() / 8)


def test_what_the_loss_does_not_use_gets_no_gradient():
    used, unused = draw(3, 2, seed=0).requires_grad_(), draw(3, 2, seed=1).requires_grad_()
    frozen, spare = draw(3, 2, seed=2), nn.Parameter(draw(2, seed=3))
    given, loss_of = [used, unused, frozen], lambda _, used, __, frozen: (used * frozen).mean()
    mean_in_microbatches(loss_of, given, [spare], microbatch_size=2).backward()
    torch.testing.assert_close(used.grad, frozen / 6)
    for tensor in (unused, spare):
        assert tensor.grad is not None
        assert not tensor.grad.any()
    assert frozen.grad is None


def test_it_is_differentiated_once():
    given = draw(3, seed=0).requires_grad_()
    loss_of = lambda _, rows: rows.square().mean()  # noqa: E731
    mean = mean_in_microbatches(loss_of, [given], [], microbatch_size=1)
    [gradient] = torch.autograd.grad(mean * given.sum(), [given], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
