"""Inception as FIDs are made with: finding, checking and loading the weights of 2015.

Two files hold the same network: StyleGAN2-ADA's TorchScript (clean-fid reads it) and the state
dict of pytorch-fid and torch-fidelity. Each is recognised by its content and pinned by its sha256.

network input (b 3 299 299), about [-1, 1] -> features (b 2048), logits without bias (b 1008)
"""

import io
import shutil
import urllib.request
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from contradiff.files import replace_file, sha256_of

INCEPTION_URL = (
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/"
    "inception-2015-12-05.pt"
)
STATE_DICT_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
"""Of the file at `INCEPTION_URL`: the digest that k-diffusion (crowsonkb) and others pin for it.

Not computed here, where there is no network."""
STATE_DICT_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""Of the file at `STATE_DICT_URL`, and of torch-fidelity's copy (weights-inception-…): its name
carries the first digits, several projects publish the rest. Not computed here either."""
PINNED = (INCEPTION_SHA256, STATE_DICT_SHA256)


class Inception(nn.Module):
    """The network without its resizing: features of the last pooling, and logits without bias.

    The logits leave out the last layer's bias, as the first implementation of the inception score
    does, and StyleGAN2-ADA and torch-fidelity after it. `channels_last`.
    """

    def __init__(self, layers: Any, output_weight: Float[Tensor, "classes features"]) -> None:
        """A network in evaluation mode, without gradients.

        Args:
            layers: everything up to the last pooling, a module or a TorchScript of one.
            output_weight: of the last linear layer.
        """
        super().__init__()
        self.layers = layers
        self.output_weight = nn.Parameter(output_weight.detach().float(), requires_grad=False)
        self.eval().requires_grad_(requires_grad=False)
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    @property
    def num_features(self) -> int:
        """Dimension of the features."""
        return self.output_weight.shape[1]

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        return self.output_weight.shape[0]

    def forward(
        self, pixels: Float[Tensor, "batch 3 side side"]
    ) -> tuple[Float[Tensor, "batch features"], Float[Tensor, "batch classes"]]:
        """Features and logits of resized and scaled images."""
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        features = self.layers(pixels).flatten(1).float()
        return features, F.linear(features, self.output_weight)


def check_inception(weights: Path, *, pinned: tuple[str, ...] = PINNED) -> str:
    """Return the sha256 of a file of Inception's weights.

    Args:
        weights: `extractor.weights`.
        pinned: what the file may hash to; tests put stand-ins here.

    Raises:
        ValueError: the file is missing, or is another one.
    """
    if not weights.is_file():
        raise ValueError(no_weights(f"extractor.weights: {weights} does not exist"))
    found = sha256_of(weights)
    if found not in pinned:
        raise ValueError(
            f"extractor.weights: {weights} is not the expected file: its sha256 is {found}, "
            f"expected {' or '.join(pinned)}; the files usually come from {INCEPTION_URL} or "
            f"{STATE_DICT_URL}"
        )
    return found


def download_inception(
    weights: Path, *, url: str = INCEPTION_URL, sha256: str = INCEPTION_SHA256
) -> None:
    """Fetch the TorchScript file (91 MiB) to `weights`, whole and checked or not at all.

    Args:
        weights: where to put it; nothing happens if the file is there.
        url: where from.
        sha256: of what must arrive.

    Raises:
        ValueError: it cannot be fetched, or something else arrived.
    """
    if weights.is_file():
        return
    with replace_file(weights) as temporary:
        try:
            with (
                urllib.request.urlopen(url, timeout=60) as source,  # noqa: S310  # ours, or a test's
                temporary.open("wb") as file,
            ):
                shutil.copyfileobj(source, file)
        except OSError as error:
            fault = f"extractor.download: cannot fetch {url} ({error}); is there a network?"
            raise ValueError(no_weights(fault)) from error
        found = sha256_of(temporary)
        if found != sha256:
            raise ValueError(
                f"extractor.download: {url} gave a file of sha256 {found}, expected {sha256}"
            )


def no_weights(fault: str) -> str:
    """What to do when there are no weights, after the words of what is wrong."""
    return (
        f"{fault}: extractor.kind inception needs inception-2015-12-05.pt (91 MiB, usually from "
        f"{INCEPTION_URL}) or pt_inception-2015-12-05-6726825d.pth ({STATE_DICT_URL}). Fetch one "
        "and set extractor.weights to its path, or set extractor.download to true where there is "
        "a network, or extractor.kind to classifier"
    )


def load_inception(weights: Path, *, device: torch.device) -> Inception:
    """Load either file. Nothing in a state dict is executed; a TorchScript file is a program.

    Args:
        weights: a file that `check_inception` accepts.
        device: where the network is put.

    Raises:
        ValueError: it is neither a TorchScript file nor a state dict, or not of Inception.
    """
    if _is_script(weights):
        return _load_script(weights, device).to(device)
    return _load_state_dict(weights).to(device)


def _is_script(weights: Path) -> bool:
    """Both may be zip archives; the one of a TorchScript has code in it."""
    if not zipfile.is_zipfile(weights):
        return False
    with zipfile.ZipFile(weights) as archive:
        return any("/code/" in name for name in archive.namelist())


def _load_script(path: Path, device: torch.device) -> Inception:
    try:
        with warnings.catch_warnings():
            # torch has no other reader for this file; that TorchScript is deprecated helps no user.
            warnings.filterwarnings("ignore", message=".*torch.jit.load.*")
            script: Any = torch.jit.load(path, map_location=device)
    except RuntimeError as error:
        raise ValueError(f"extractor.weights: {path} is no TorchScript file: {error}") from error
    if not (hasattr(script, "layers") and hasattr(script, "output")):
        raise ValueError(
            f"extractor.weights: {path} has not Inception's parts `layers` and `output`"
        )
    # The script's own forward would resize in TensorFlow's old way, and run twice for both outputs.
    return Inception(script.layers, script.output.weight)


def _load_state_dict(path: Path) -> Inception:
    from pickle import UnpicklingError  # noqa: TID251  # only the name of what torch.load raises

    try:
        state: object = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, KeyError, UnpicklingError) as error:
        raise ValueError(
            f"extractor.weights: {path} is neither a TorchScript file nor a state dict of tensors "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from error
    if not isinstance(state, Mapping) or "fc.weight" not in state:
        raise ValueError(f"extractor.weights: {path} has not Inception's last layer, `fc.weight`")
    return inception_of(dict(state), name=str(path))


def inception_of(state: Mapping[str, Tensor], *, name: str) -> Inception:
    """Build the network from a state dict, by torch-fidelity's module.

    Args:
        state: of pytorch-fid's or torch-fidelity's Inception.
        name: where it comes from, for messages.

    Raises:
        ValueError: names or shapes are not Inception's.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    # The class reads its weights from a file only, and unpickles it: here, bytes of our own.
    content = io.BytesIO()
    torch.save(dict(state), content)
    content.seek(0)
    try:
        module = FeatureExtractorInceptionV3(
            "inception", ["2048"], feature_extractor_weights_path=content
        )
    except RuntimeError as error:
        raise ValueError(f"extractor.weights: {name} does not fit Inception: {error}") from error
    # Its children stand in the order in which its forward, which would resize first, calls them.
    layers = nn.Sequential(*(m for key, m in module.named_children() if key != "fc"))
    return Inception(layers, module.fc.weight)
