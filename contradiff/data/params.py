"""Sections `data` and `raw` of the parameters.

They have their own module, so that stages that need only the image size import no reader of data.
"""

from typing import Literal

from pydantic import Field, model_validator

from contradiff.config import Section

Layout = Literal["imagefolder", "archives", "kaggle", "parquet"]


class DataParams(Section):
    """Section `data`: the raw images."""

    source: Literal["toy", "imagefolder", "archives", "kaggle", "parquet", "auto"] = Field(
        description="toy: rendered where root says; auto: the layout that is found there"
    )
    root: str = Field(min_length=1, description="the raw images, relative to the project's root")
    image_size: int = Field(ge=8, multiple_of=8, description="side of the model's images, pixels")
    num_train: int | None = Field(ge=1, description="toy: training images to render")
    num_val: int | None = Field(ge=1, description="toy: validation images to render")

    @model_validator(mode="after")
    def _counts_belong_to_toy(self) -> "DataParams":
        for name in ("num_train", "num_val"):
            is_given, where = getattr(self, name) is not None, f"when data.source is {self.source}"
            if self.source == "toy" and not is_given:
                raise ValueError(f"data.{name} is needed {where}")
            if self.source != "toy" and is_given:
                raise ValueError(f"data.{name} has no meaning {where}; set it to null")
        return self

    @property
    def layout(self) -> Layout | Literal["auto"]:
        """The layout to read: toy images are rendered into class folders."""
        return "imagefolder" if self.source == "toy" else self.source


class RawParams(Section):
    """Section `raw`: how to check raw data; it changes no result."""

    verify: bool = Field(description="compare the md5 of ILSVRC's archives; reads all of them")
