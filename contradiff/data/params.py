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
