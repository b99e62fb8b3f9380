"""peft's linear layer with a low-rank update, faster in float32 on CPUs."""

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor


class LinearWithLora(Linear):
    """Adds `lora_B(lora_A(x)) * scaling` to the base layer's output in one matrix product.

    peft needs one more pass over arrays of the output's size, and another one backward: 4 to 5% of
    a training step's time. Its way stays for all else: on GPUs and under autocast ours was never
    timed, and bfloat16 would be rounded in another place.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output (..., out_features) for `x` (..., in_features)."""
        if args or kwargs or self.disable_adapters or self.merged or not self._is_plain(x):
            return super().forward(x, *args, **kwargs)
        [name] = self.active_adapters
        rows = x.reshape(-1, x.shape[-1])
        low, up = self.lora_A[name](rows), self.lora_B[name].get_parameter("weight").T
        output = torch.addmm(self.base_layer(rows), low, up, alpha=self.scaling[name])
        return output.view(*x.shape[:-1], output.shape[-1])

    def _is_plain(self, x: Tensor) -> bool:
        """Whether one adapter is active, and all is float32 on a CPU."""
        types = x.dtype, *(self.lora_A[name].weight.dtype for name in self.active_adapters)
        is_float = types == (torch.float32, torch.float32)
        return is_float and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
