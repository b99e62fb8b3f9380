"""Inception with random weights, as files of both formats, and a small extractor."""

import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import fid
from contradiff.evaluation.classifier import ResidualClassifier
from contradiff.evaluation.extractors import Extractor, load_extractor, save_classifier
from contradiff.evaluation.inception_files import SCRIPT_NAME


class StandIn(nn.Module):
    """The call and the attributes of Inception's TorchScript file, with a few random weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 2048, 4, stride=32), nn.ReLU(), nn.AvgPool2d(10))
        self.output = nn.Linear(2048, 4)

    def forward(
        self, img: Tensor, return_features: bool = False, no_output_bias: bool = False
    ) -> Tensor:
        # TensorFlow 1: the centres of the first pixels coincide, not those of the images
        theta = torch.eye(2, 3)
        theta[0, 2] += 1.0 / img.shape[3] - 1.0 / 299
        theta[1, 2] += 1.0 / img.shape[2] - 1.0 / 299
        size = [img.shape[0], img.shape[1], 299, 299]
        grid = F.affine_grid(theta[None].expand(img.shape[0], 2, 3), size, align_corners=False)
        x = F.grid_sample(img.float(), grid, padding_mode="border", align_corners=False)
        features = self.layers((x - 128) / 128).reshape(-1, 2048)
        if return_features:
            return features
        bias = torch.zeros_like(self.output.bias) if no_output_bias else self.output.bias
        return F.softmax(F.linear(features, self.output.weight, bias), dim=1)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / SCRIPT_NAME
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(StandIn()).save(str(path))
    return path


@pytest.fixture(scope="session")
def state_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole network, as pytorch-fid and torch-fidelity name its weights."""
    path = tmp_path_factory.mktemp("inception") / "pt_inception.pth"
    torch.save(fid.random_inception(0), path)
    return path


@pytest.fixture
def classifier() -> ResidualClassifier:
    torch.manual_seed(0)
    return ResidualClassifier(width=4, num_classes=3).eval()


@pytest.fixture
def extractor(classifier: ResidualClassifier, tmp_path: Path) -> Extractor:
    """Of images of 16 pixels: eight features, three classes."""
    folder = tmp_path / "extractor"
    facts = {"val_accuracy": 0.9, "val_count": 50, "val_chance": 0.4}
    save_classifier(folder, classifier, image_size=16, **facts)
    return load_extractor(folder, device=torch.device("cpu"))
