"""pytorch-fid, clean-fid and torch-fidelity on weights and images given to them, without network.

Used by `python -m bench fid` and by the tests that compare our scores with theirs.
"""

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

State = dict[str, Tensor]
Array = np.ndarray[Any, Any]
SCRIPT_NAME = "inception-2015-12-05.pt"
"""clean-fid looks for this name."""


def random_inception(seed: int) -> State:
    """Random weights of Inception that keep activations of order one through all its layers."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Blank(FeatureExtractorInceptionV3):
        """Without weights: the class would load some when it is made."""

        def load_state_dict(self, *_: Any, **__: Any) -> None:
            """Keep those that torch draws."""

    content = io.BytesIO()
    torch.save({}, content)
    content.seek(0)
    generator = torch.Generator().manual_seed(seed)
    module = Blank("blank", ["2048"], feature_extractor_weights_path=content)
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            fan_in = part.weight[0].numel()
            part.weight.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
        elif isinstance(part, nn.BatchNorm2d):
            for tensor in (part.weight, part.running_var):
                assert tensor is not None
                tensor.uniform_(0.8, 1.2, generator=generator)
            for tensor in (part.bias, part.running_mean):
                assert tensor is not None
                tensor.normal_(0, 0.1, generator=generator)
        elif isinstance(part, nn.Linear):
            part.weight.normal_(0, 0.05, generator=generator)
            part.bias.zero_()
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


class Scripted(nn.Module):
    """Our parts of Inception with the signature of StyleGAN2-ADA's TorchScript file."""

    def __init__(self, layers: nn.Module, weight: Tensor) -> None:
        super().__init__()
        self.layers = layers
        self.output = nn.Linear(weight.shape[1], weight.shape[0])
        self.output.weight = nn.Parameter(weight, requires_grad=False)

    def forward(
        self,
        img: Tensor,
        return_features: bool = False,  # the file's own signature
        no_output_bias: bool = False,
    ) -> Tensor:
        """TensorFlow 1's resize by a shifted grid, then features or probabilities."""
        height, width = img.shape[2], img.shape[3]
        theta = torch.eye(2, 3)
        # corners of pixels on corners: half a pixel of the output is half a pixel of the input
        theta[0, 2] += 1.0 / width - 1.0 / 299
        theta[1, 2] += 1.0 / height - 1.0 / 299
        size = [img.shape[0], img.shape[1], 299, 299]
        grid = F.affine_grid(theta[None].expand(img.shape[0], 2, 3), size, align_corners=False)
        x = F.grid_sample(
            img.to(torch.float32), grid, mode="bilinear", padding_mode="border", align_corners=False
        )
        features = self.layers((x - 128) / 128).flatten(1)
        if return_features:
            return features
        logits = self.output(features)
        if no_output_bias:
            logits = features @ self.output.weight.T
        return F.softmax(logits, dim=1)


def write_script(folder: Path, state: Mapping[str, Tensor]) -> Path:
    """Write a TorchScript file of these weights, as clean-fid and our `extractor` take it."""
    from contradiff.evaluation.inception import inception_of

    network = inception_of(state, name="bench")
    path = folder / SCRIPT_NAME
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Scripted(network.layers, network.output_weight).eval()).save(str(path))
    return path


def write_pngs(folder: Path, images: Tensor) -> Path:
    """Write uint8 images, one file each, in an order that all libraries keep."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:05d}.png")
    return folder


def pictures(num_images: int, *, side: int, seed: int, contrast: float) -> Tensor:
    """Smooth random images with a little noise, uint8 (n 3 side side)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(num_images, 3, 4, 4, generator=generator)
    smooth = F.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=False)
    noise = torch.randn(num_images, 3, side, side, generator=generator)
    return (128 + contrast * smooth + 8 * noise).clamp(0, 255).to(torch.uint8)


def pytorch_fid_features(state: State, *, dims: int = 2048) -> Callable[[Path], Array]:
    """Build pytorch-fid's network; it then computes features (n dims) by the library's own loop."""
    from pytorch_fid import fid_score, inception

    with mock.patch.object(inception, "load_state_dict_from_url", return_value=state):
        model = inception.InceptionV3([inception.InceptionV3.BLOCK_INDEX_BY_DIM[dims]])

    def features(folder: Path) -> Array:
        files = sorted(folder.glob("*.png"))
        with mock.patch.object(fid_score, "tqdm", lambda loader: loader):
            return fid_score.get_activations(files, model, batch_size=8, dims=dims, num_workers=0)

    return features


def clean_fid_features(script: Path, *, mode: str) -> Callable[[Path], Array]:
    """Load clean-fid's network; it then computes features (n 2048) by the library's own loop.

    Args:
        script: as from `write_script`.
        mode: clean or legacy_tensorflow.
    """
    from cleanfid import fid
    from cleanfid.inception_torchscript import InceptionV3W

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inside = mode == "legacy_tensorflow"
        model = InceptionV3W(str(script.parent), download=False, resize_inside=inside).eval()

    def features(folder: Path) -> Array:
        return fid.get_folder_features(
            str(folder),
            model,
            num_workers=0,
            batch_size=8,
            device=torch.device("cpu"),
            mode=mode,
            verbose=False,
        )

    return features


def torch_fidelity_features(
    weights: Path, layers: Sequence[str] = ("2048", "logits_unbiased")
) -> Callable[[Path], dict[str, Tensor]]:
    """Load torch-fidelity's network; it then computes features by layer by the library's loop."""
    from torch_fidelity.datasets import ImagesPathDataset
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.utils import get_featuresdict_from_dataset

    extractor = FeatureExtractorInceptionV3(
        "peer", list(layers), feature_extractor_weights_path=str(weights)
    )

    def features(folder: Path) -> dict[str, Tensor]:
        dataset = ImagesPathDataset([str(file) for file in sorted(folder.glob("*.png"))])
        return get_featuresdict_from_dataset(
            dataset, extractor, batch_size=8, cuda=False, save_cpu_ram=True, verbose=False
        )

    return features


def torch_fidelity_scores(
    samples: Tensor, reference: Tensor, *, num_subsets: int, subset_size: int, seed: int
) -> dict[str, float]:
    """FID, KID, precision and recall of features (n d) by torch-fidelity's own functions."""
    from torch_fidelity import metric_fid, metric_kid, metric_prc

    statistics = [metric_fid.fid_features_to_statistics(x) for x in (samples, reference)]
    options = {"verbose": False, "rng_seed": seed, "kid_subsets": num_subsets}
    return {
        **metric_fid.fid_statistics_to_metric(*statistics, verbose=False),
        **metric_kid.kid_features_to_metric(
            samples, reference, kid_subset_size=subset_size, **options
        ),
        **metric_prc.prc_features_to_metric(samples, reference, verbose=False),
    }
