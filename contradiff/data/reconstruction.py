"""Decode stored latents, to see how much of an image the base's autoencoder keeps."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from contradiff.base.vae import decode_latents, mode, psnr
from contradiff.data.encoding import LatentEncoder
from contradiff.data.latents import StoredLatents
from contradiff.data.png import paired_grid
from contradiff.data.shards import Record, Sample
from contradiff.data.transforms import apply_crop, decode
from contradiff.types import ByteImages

COLUMNS = 16


@dataclass(frozen=True)
class Reconstruction:
    """Images beside the decoded latents that were stored for them.

    Attributes:
        originals: The centre crops.
        decoded: The decoded first views.
        std: Standard deviation of the scaled latents; the scaling factor should make it about 1.
    """

    originals: ByteImages
    decoded: ByteImages
    std: float

    @property
    def psnr(self) -> float:
        """Mean PSNR of the images in dB."""
        return psnr(self.originals, self.decoded).mean().item()

    def figure(self) -> bytes:
        """Draw a PNG with rows of images, each above the row of their reconstructions."""
        columns = min(COLUMNS, len(self.originals))
        return paired_grid(self.originals, self.decoded, columns=columns)


def reconstruct(
    encoder: LatentEncoder, images: Iterable[Sample], records: Iterable[Record]
) -> Reconstruction:
    """Decode latents as they are stored in shards.

    Args:
        encoder: The encoder that made the latents.
        images: The encoded images.
        records: Their latents.

    Raises:
        ValueError: The decoded images differ too much from the originals; the message names
            latents.min_psnr and likely causes.
    """
    info, device = encoder.info, encoder.device
    originals: list[torch.Tensor] = []
    decoded: list[torch.Tensor] = []
    latents: list[torch.Tensor] = []
    for image, record in zip(images, records, strict=True):
        stored = StoredLatents.of_record(record)
        pixels = decode(image.image, name=image.key)
        originals.append(apply_crop(pixels, stored.crops[0], size=info.image_size))
        moments = torch.from_numpy(stored.moments[:1]).to(device)
        latents.append(mode(moments, scaling_factor=info.scaling_factor))
        decoded.append(decode_latents(encoder.vae, latents[-1]).cpu())
    std = torch.cat(latents).std().item()
    found = Reconstruction(torch.stack(originals), torch.cat(decoded), std)
    floor = encoder.params.min_psnr
    if not found.psnr >= floor:
        raise ValueError(
            f"latents.min_psnr: decoded latents show their images at {found.psnr:.1f} dB where "
            f"{floor:g} are asked for; their standard deviation is {std:.2f}, and should be about "
            "1. Either build/base has a wrong VAE or scaling factor, or its VAE was made for "
            "images of another kind or size (data.image_size). If the base can do no better, "
            "lower latents.min_psnr"
        )
    return found
