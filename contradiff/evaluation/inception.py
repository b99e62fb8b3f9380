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

from contradiff.evaluation.inception_files import STATE_DICT_NAME


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
