"""The exponential moving average (EMA) of the trained weights."""

from torch import Tensor

from contradiff.method.model import ContraDiff


class WeightAverage:
    """diffusers' EMAModel over the trainable parameters, with its warm-up.

    Attributes:
        tensors: the live average by parameter name.
    """

    def __init__(self, model: ContraDiff, *, decay: float) -> None:
        """Start from the model's present weights; `decay` is that of an optimiser step."""
        from diffusers.training_utils import EMAModel

        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parameters = list(named.values())
        self.ema = EMAModel(self.parameters, decay=decay, foreach=True)
        self.tensors: dict[str, Tensor] = dict(zip(named, self.ema.shadow_params, strict=True))

    def update(self, done: int) -> None:
        """Follow step `done`: decay 0 after the first, then min(decay, done / (done + 9))."""
        self.ema.optimization_step = done - 1
        self.ema.step(self.parameters)

    def copy_to_model(self) -> None:
        """Replace the weights by their average."""
        self.ema.copy_to(self.parameters)
