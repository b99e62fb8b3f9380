"""The exponential moving average (EMA) of what is trained."""

from collections.abc import Mapping

from torch import Tensor

from contradiff.method.model import ContraDiff


class WeightAverage:
    """Exponential moving average of what is trained (diffusers' EMAModel, with its warm-up)."""

    def __init__(self, model: ContraDiff, *, decay: float) -> None:
        from diffusers.training_utils import EMAModel

        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self.ema = EMAModel(self.parameters, decay=decay, foreach=True)

    def update(self) -> None:
        """After an optimiser step: decay 0 at the first, min(decay, (1 + s) / (10 + s)) after s."""
        self.ema.step(self.parameters)

    def copy_to_model(self) -> None:
        """The average replaces the weights."""
        self.ema.copy_to(self.parameters)

    def state(self) -> dict[str, Tensor]:
        """The average by parameter name, to be saved."""
        return dict(zip(self.names, self.ema.shadow_params, strict=True))

    def load(self, state: Mapping[str, Tensor], *, step: int) -> None:
        """Go on from a saved `state` after `step` updates."""
        for name, shadow in zip(self.names, self.ema.shadow_params, strict=True):
            shadow.copy_(state[name])
        self.ema.optimization_step = step
