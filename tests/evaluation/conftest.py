"""Inception with random weights, as files of both formats' kinds, for tests without network."""

import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import peers


class StandIn(nn.Module):
    """The signature and parts of Inception's TorchScript, with a few random weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 2048, 4, stride=32), nn.ReLU(), nn.AvgPool2d(10))
        self.output = nn.Linear(2048, 4)

    def forward(
        self,
        img: Tensor,
        return_features: bool = False,
        use_fp16: bool = False,  # noqa: ARG002
        no_output_bias: bool = False,
    ) -> Tensor:
        features = self.layers((img.to(torch.float32) - 128) / 128).reshape(-1, 2048)
        if return_features:
            return features
        bias = torch.zeros_like(self.output.bias) if no_output_bias else self.output.bias
        return F.softmax(F.linear(features, self.output.weight, bias), dim=1)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A small TorchScript file that has Inception's parts."""
    torch.manual_seed(0)
    path = tmp_path / "inception-2015-12-05.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(StandIn()).save(str(path))
    return path


@pytest.fixture(scope="session")
def inception_state() -> dict[str, Tensor]:
    """Random weights of the whole network, as pytorch-fid and torch-fidelity name them."""
    return peers.random_inception(0)


@pytest.fixture(scope="session")
def state_file(
    inception_state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same as a file."""
    path = tmp_path_factory.mktemp("inception") / "pt_inception.pth"
    torch.save(inception_state, path)
    return path
