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


@dataclass(frozen=True)
class Reconstruction:
    """Centre crops beside their decoded latents.

    `std` is the scaled latents' standard deviation; the scaling factor should make it about 1.
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
        return paired_grid(self.originals, self.decoded, columns=min(16, len(self.originals)))


def reconstruct(
    encoder: LatentEncoder, images: Iterable[Sample], records: Iterable[Record]
) -> Reconstruction:
    """Decode latents as they are stored in shards, and compare them with their images.

    Raises:
        ValueError: They differ by more than latents.min_psnr allows; names likely causes.
    """
    info, stored = encoder.info, [StoredLatents.of_record(record) for record in records]
    originals = [
        apply_crop(decode(image.image, name=image.key), item.crops[0], size=info.image_size)
        for image, item in zip(images, stored, strict=True)
    ]
    moments = (torch.from_numpy(item.moments[:1]).to(encoder.device) for item in stored)
    latents = [mode(item, scaling_factor=info.scaling_factor) for item in moments]
    decoded = torch.cat([decode_latents(encoder.vae, item).cpu() for item in latents])
    found = Reconstruction(torch.stack(originals), decoded, torch.cat(latents).std().item())
    floor = encoder.params.min_psnr
    if not found.psnr >= floor:
        raise ValueError(
            f"latents.min_psnr: decoded latents show their images at {found.psnr:.1f} dB where "
            f"{floor:g} are asked for; their standard deviation is {found.std:.2f}, and should be "
            "about 1. Either build/base has a wrong VAE or scaling factor, or its VAE was made for "
            "images of another kind or size (data.image_size). If the base can do no better, "
            "lower latents.min_psnr"
        )
    return found
