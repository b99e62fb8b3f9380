"""Compare our scores with torch-fidelity's: the same images, and Inception's random weights.

OMP_NUM_THREADS=1 python -m bench fid 24    24 images in each set; two minutes on one core
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch_fidelity import calculate_metrics
from torch_fidelity import feature_extractor_inceptionv3 as module
from torch_fidelity.metric_isc import isc_features_to_metric

from contradiff.data.png import encode_png
from contradiff.evaluation.extractors import Extractor, load_extractor, save_inception
from contradiff.evaluation.fid import frechet_distance
from contradiff.evaluation.inception_files import PINNED, STATE_DICT_NAME
from contradiff.evaluation.params import Resizer
from contradiff.evaluation.scores import kid, prdc
from contradiff.files import sha256_of


def main(arguments: Sequence[str]) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        agreement_table(Path(folder), int(arguments[0]) if arguments else 8)


def agreement_table(folder: Path, num_images: int) -> None:
    """Print our scores of two sets of images, and those that torch-fidelity computes from files."""
    torch.save(random_inception(0), weights := folder / "inception.pth")
    with mock.patch.dict(PINNED, {sha256_of(weights): STATE_DICT_NAME}):
        save_inception(folder / "extractor", weights, resizers=["legacy_tensorflow"])
        extractor = load_extractor(folder / "extractor", device=torch.device("cpu"))
    found: list[tuple[Tensor, Tensor]] = []
    for name, contrast in (("samples", 60.0), ("reference", 35.0)):
        images = pictures(num_images, seed=len(found), contrast=contrast)
        found.append(features_of(extractor, images, "legacy_tensorflow"))
        (folder / name).mkdir()
        for number, image in enumerate(images):
            (folder / name / f"{number:05d}.png").write_bytes(encode_png(image))
    (x, logits), (y, _) = found
    size = num_images // 2
    kid_mean, kid_std = kid(x, y, num_subsets=100, subset_size=size, seed=0)
    # Our function `fid` would refuse these sets, which have fewer images than dimensions.
    moments = [moment for z in (x, y) for moment in (z.double().mean(0), z.double().T.cov())]
    ours = {
        "frechet_inception_distance": frechet_distance(*moments),
        "kernel_inception_distance_mean": kid_mean,
        "kernel_inception_distance_std": kid_std,
        **isc_features_to_metric(logits, splits=2, shuffle=False),
        **prdc(x, y),
    }
    options = dict.fromkeys(("fid", "kid", "isc", "prc", "save_cpu_ram"), True)
    options |= dict.fromkeys(("cuda", "cache", "verbose", "samples_shuffle"), False)
    options |= {"isc_splits": 2, "kid_subsets": 100, "kid_subset_size": size, "rng_seed": 0}
    options |= {"input1": str(folder / "samples"), "input2": str(folder / "reference")}
    options["feature_extractor"] = "inception-v3-compat"
    theirs = calculate_metrics(feature_extractor_weights_path=str(weights), **options)
    print("score: contradiff, torch-fidelity, relative difference")
    for key in [key for key in ours if key in theirs]:
        error = abs(ours[key] / theirs[key] - 1)
        print(f"  {key:34} {ours[key]:10.6g} {theirs[key]:10.6g} {error:12.1e}")


def features_of(extractor: Extractor, images: Tensor, resizer: Resizer) -> tuple[Tensor, Tensor]:
    """Return the features and logits of images."""
    prepared = torch.stack([extractor.prepare(image, resizer=resizer) for image in images])
    return extractor(prepared, resizer=resizer)


def pictures(num_images: int, *, side: int = 64, seed: int, contrast: float) -> Tensor:
    """Draw smooth random images with a little noise, uint8 (n 3 side side)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(num_images, 3, 4, 4, generator=generator)
    smooth = F.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=False)
    noise = torch.randn(num_images, 3, side, side, generator=generator)
    return (128 + contrast * smooth + 8 * noise).clamp(0, 255).to(torch.uint8)


def random_inception(seed: int) -> dict[str, Tensor]:
    """Draw random weights that keep the activations of all of Inception's layers near 1 in size."""
    network = module.FeatureExtractorInceptionV3
    with (
        mock.patch.object(module, "load_state_dict_from_url"),
        mock.patch.object(network, "load_state_dict"),
    ):
        state = network("random", ["2048"]).state_dict()
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in state.items():
        if tensor.ndim == 4:
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
        elif name == "fc.weight":
            tensor.normal_(0, 0.05, generator=generator)
        elif name.endswith(("weight", "var")):
            tensor.uniform_(0.8, 1.2, generator=generator)
        elif name.endswith(("bias", "mean")):
            tensor.normal_(0, 0.1, generator=generator)
    return state
