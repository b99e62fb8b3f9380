"""The two files that have Inception's weights: their addresses, digests and names.

StyleGAN2-ADA's TorchScript file, or pytorch-fid's state dict: both have the same weights.
"""

from pathlib import Path

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


def download_inception(
    weights: Path, *, url: str = INCEPTION_URL, sha256: str = INCEPTION_SHA256
) -> None:
    """Download the TorchScript file to `weights` if it is missing; raise ValueError on failure."""
    if weights.is_file():
        return
    from torch.hub import download_url_to_file

    weights.parent.mkdir(parents=True, exist_ok=True)
    try:
        download_url_to_file(url, str(weights), hash_prefix=sha256, progress=False)
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
