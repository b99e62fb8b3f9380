"""The Inception network of 2015, with which published FIDs are computed.

One of two files gives the weights: StyleGAN2-ADA's TorchScript file, which clean-fid runs, or
pytorch-fid's state dict, which torch-fidelity's layers load.

images (b 3 299 299) from 0 to 255 => features (b 2048), logits without bias (b 1008)
"""

import io
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Num
from torch import Tensor, nn

INCEPTION_URL = (
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/"
    "inception-2015-12-05.pt"
)
STATE_DICT_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
SCRIPT_NAME = "inception-2015-12-05.pt"
"""clean-fid's `InceptionV3W` looks for a file of this name."""
STATE_DICT_NAME = "inception-2015-12-05.pth"
PINNED = {
    INCEPTION_SHA256: SCRIPT_NAME,
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2": STATE_DICT_NAME,
}
"""sha256 of each accepted file => the name of its copy. Other projects publish these digests."""


class Inception(nn.Module):
    """Images => features after the last pooling, and logits without the output layer's bias.

    The original code of the inception score, StyleGAN2-ADA and torch-fidelity also omit this bias.
    """

    def __init__(self, weights: Path) -> None:
        """Load the weights on the CPU. A TorchScript file can run code; a state dict cannot."""
        from cleanfid.inception_torchscript import InceptionV3W
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        super().__init__()
        if weights.name == STATE_DICT_NAME:
            # torch-fidelity unpickles what it loads, so it gets a new file that has only tensors.
            content = io.BytesIO()
            torch.save(torch.load(weights, map_location="cpu", weights_only=True), content)
            content.seek(0)
            options = {"feature_extractor_weights_path": content}
            module = FeatureExtractorInceptionV3("", ["2048"], **options)
            output = module.fc
            # torch-fidelity's own forward calls the children in this order.
            layers = (layer for name, layer in module.named_children() if name != "fc")
            self.network: Any = nn.Sequential(*layers)
            self.network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        else:
            with warnings.catch_warnings():
                # Only torch.jit.load reads this file, and it is deprecated.
                warnings.filterwarnings("ignore", message=".*torch.jit.load.*")
                self.network = InceptionV3W(str(weights.parent), download=False)
            output = self.network.base.output
        self.output_weight = nn.Parameter(output.weight.detach().float(), requires_grad=False)
        self.num_classes, self.num_features = output.weight.shape

    def forward(
        self, images: Num[Tensor, "b 3 h w"], *, resizer: str
    ) -> tuple[Float[Tensor, "b features"], Float[Tensor, "b classes"]]:
        """Return the features and logits of images (0 to 255) from `Extractor.prepare`."""
        from torch_fidelity import interpolate_compat_tensorflow as tensorflow

        resize = resizer == "legacy_tensorflow"
        pixels = images.float()
        if resizer == "legacy_pytorch":
            pixels = pixels * (128 / 127.5)  # pytorch-fid: x / 127.5 - 1; clean-fid: x / 128 - 1
        # By default, convolutions on NVIDIA GPUs round to 10 bits (TF32), which changes the third
        # digit of a score.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            if isinstance(self.network, nn.Sequential):
                if resize:
                    like_tensorflow = tensorflow.interpolate_bilinear_2d_like_tensorflow1x
                    pixels = like_tensorflow(pixels, size=(299, 299), align_corners=False)
                features = self.network((pixels - 128) / 128).flatten(1)
            else:
                self.network.resize_inside = resize
                features = self.network(pixels)
        return features, F.linear(features, self.output_weight)


def download_inception(
    weights: Path, *, url: str = INCEPTION_URL, sha256: str = INCEPTION_SHA256
) -> None:
    """Download the TorchScript file to `weights` if it is missing; raise ValueError on failure."""
    if weights.is_file():
        return
    weights.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(weights), hash_prefix=sha256, progress=False)
    except (OSError, RuntimeError) as error:
        fault = f"extractor.download: cannot download {url} ({error}); is there a network?"
        raise ValueError(no_weights(fault)) from error


def no_weights(fault: str) -> str:
    """Return the message `fault`, followed by how to get Inception's weights."""
    return (
        f'{fault}. extractor.kind "inception" needs inception-2015-12-05.pt (91 MiB, usually from '
        f"{INCEPTION_URL}) or pt_inception-2015-12-05-6726825d.pth ({STATE_DICT_URL}). Download "
        "one file and set extractor.weights to its path, or set extractor.download to true if there"
        ' is a network, or set extractor.kind to "classifier"'
    )
