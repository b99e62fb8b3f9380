"""Sections `class_condition` and `generate` of params.yaml."""

from typing import Literal

from pydantic import Field, model_validator

from contradiff.config import Precision, Section

Condition = Literal["noise", "image", "class"]
Solver = Literal["ddim", "dpmsolver++", "unipc"]


class ClassConditionParams(Section):
    """Section `class_condition`. The paper only mentions one embedding layer of width 512."""

    epochs: int = Field(ge=0, description='0: no table; generate.condition "class" needs a table')
    width: int = Field(ge=1, description="width of an embedding")
    drop: float = Field(ge=0, lt=1, description='chance that "no class" replaces a label')
    batch_size: int = Field(ge=1, description="images per optimiser step")
    lr: float = Field(gt=0, description="peak learning rate")
    lora: bool = Field(description="false: training and generation use the base's UNet, no LoRA")


class GenerateParams(Section):
    """Section `generate`. Paper: 50,000 images in 100 steps. It does not mention guidance."""

    condition: Condition = Field(description="noise (App. A) | image (Fig. 4) | class (Table 5)")
    guidance: float = Field(ge=0, description="scale of classifier-free guidance; 1: no guidance")
    guidance_interval: list[float] = Field(
        min_length=2, max_length=2, description="noise levels with guidance: 0 is clean, 1 is noise"
    )
    num_samples: int = Field(ge=1)
    solver: Solver = Field(description="ddim (paper, eta = 0); the others need fewer steps")
    num_inference_steps: int = Field(ge=1, description="steps of the solver")
    batch_size: int = Field(ge=1, description="images generated at once")
    precision: Precision = Field(description="precision of the UNet's passes; the VAE runs in fp32")

    @model_validator(mode="after")
    def _guidance_has_something_to_guide(self) -> "GenerateParams":
        if self.condition == "noise" and self.guidance != 1:
            why = f'{self.guidance:g} has no effect with generate.condition "noise"'
            raise ValueError(f"generate.guidance: {why}; set generate.guidance to 1")
        low, high = self.guidance_interval
        if not 0 <= low < high <= 1:
            remedy = "set two numbers from 0 to 1, the smaller one first"
            raise ValueError(f"generate.guidance_interval: {remedy} (got {low:g}, {high:g})")
        if self.guidance == 1 and (low, high) != (0, 1):
            raise ValueError(
                f"generate.guidance_interval: {low:g} to {high:g} has no effect if "
                "generate.guidance is 1; set the interval to [0, 1], or change the guidance"
            )
        return self
