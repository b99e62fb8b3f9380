"""Sections `data` and `raw` of the parameters."""

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
        for name in ("num_train", "num_val"):
            is_given, reason = getattr(self, name) is not None, f"data.source is {self.source!r}"
            if self.source == "toy" and not is_given:
                raise ValueError(f"data.{name}: set a number, because {reason}")
            if self.source != "toy" and is_given:
                raise ValueError(f"data.{name}: set it to null, because {reason}")
        return self

    @property
    def layout(self) -> Layout | Literal["auto"]:
        """How the raw images are stored. Toy images are stored in class folders."""
        return "imagefolder" if self.source == "toy" else self.source


class RawParams(Section):
    """Section `raw`: how to check raw data. The section does not change any result."""

    verify: bool = Field(description="check the md5 of ILSVRC's archives (reads every byte)")
