"""Sections `data`, `raw` and `latents` of the parameters."""

from typing import Literal

from pydantic import Field, model_validator

from contradiff.config import Section

Layout = Literal["imagefolder", "archives", "kaggle", "parquet"]


class DataParams(Section):
    """Section `data`: the raw images."""

    source: Literal["toy", "imagefolder", "archives", "kaggle", "parquet", "auto"] = Field(
        description="toy: render images into data.root; auto: detect the layout in data.root"
    )
    root: str = Field(min_length=1, description="folder of the raw images, relative to the project")
    image_size: int = Field(ge=8, multiple_of=8, description="side of the images in pixels")
    num_train: int | None = Field(ge=1, description="only for toy: number of training images")
    num_val: int | None = Field(ge=1, description="only for toy: number of validation images")

    @model_validator(mode="after")
    def _counts_belong_to_toy(self) -> "DataParams":
        is_toy = self.source == "toy"
        counts = {"num_train": self.num_train, "num_val": self.num_val}
        remedy = "set a number" if is_toy else "set it to null"
        wrong = [f"data.{name}: {remedy}" for name in counts if (counts[name] is None) == is_toy]
        if wrong:
            raise ValueError(f"{'; '.join(wrong)}, because data.source is {self.source!r}")
        return self

    @property
    def layout(self) -> Layout | Literal["auto"]:
        """How the raw images are stored. Toy images are stored in class folders."""
        return "imagefolder" if self.source == "toy" else self.source


class RawParams(Section):
    """Section `raw`: how to check raw data. The section does not change any result."""

    verify: bool = Field(description="check the md5 of ILSVRC's archives (reads every byte)")


class LatentsParams(Section):
    """Section `latents`: which crops of an image to encode before training."""

    views: int = Field(ge=1, description="crops of an image: 1 centre crop, the others random")
    flips: bool = Field(description="also encode the mirror image of each training crop")
    crop_scale_min: float = Field(gt=0, le=1, description="smallest random crop (share of area)")
    colour_jitter: float = Field(ge=0, le=1, description="colour changes in random crops; 0: none")
    dtype: Literal["float16", "bfloat16"] = Field(description="type of the stored latents")
    min_psnr: float = Field(description="smallest allowed mean PSNR of decoded latents, in dB")
    batch_size: int = Field(ge=1, description="number of crops that the VAE encodes in one pass")

    def views_of(self, split: str) -> tuple[int, bool]:
        """Return the number of crops of an image, and whether their mirror images are added.

        In the split `val`, which serves only for evaluation, an image has only its centre crop.
        """
        return (1, False) if split == "val" else (self.views, self.flips)
