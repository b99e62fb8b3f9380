"""Tri-timestep attention: the UNet's maps at three noise levels => one feature h (Eq. 4)."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from contradiff.method.params import HeadParams
from contradiff.method.transformer import Block, Mlp, attend
from contradiff.types import Features

LevelMaps = Float[Tensor, "batch 3 width_m h_m w_m"]
"""Outputs of a UNet block at an image's three noise levels, from noisiest to cleanest."""


def order_by_noise(
    maps: Float[Tensor, "levels batch width_m h_m w_m"], timesteps: Int[Tensor, "levels batch"]
) -> LevelMaps:
    """Sort each image's maps by noise: noisiest (query), middle (key), cleanest (value)."""
    order = timesteps.argsort(dim=0, descending=True, stable=True)
    index = order.view(*order.shape, 1, 1, 1).expand_as(maps)
    return maps.gather(0, index).transpose(0, 1)


class TriTimestepAttention(nn.Module):
    """h = Attention[W_Q f(z_t1), W_K f(z_t2), W_V f(z_t3)] (Eq. 4), pooled by a class token.

    Q comes from the noisiest map, K from the middle map and V from the cleanest map. The layers are
    a shared LayerNorm, W_Q, W_K and W_V without bias, multi-head attention, W_O, an MLP, one ViT
    block with a class token, and a last LayerNorm. The paper gives only Eq. 4 and the number of
    parameters: 28M with the linear classifier. These layers have as many.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        width: int,
        num_heads: int,
        mlp_ratio: int,
        residual: Literal["none", "value"],
        init: Literal["random", "identity"],
    ) -> None:
        super().__init__()
        self.num_heads, self.residual = num_heads, residual
        self.norm_in = nn.LayerNorm(in_channels)
        self.to_q = nn.Linear(in_channels, width, bias=False)
        self.to_k = nn.Linear(in_channels, width, bias=False)
        self.to_v = nn.Linear(in_channels, width, bias=False)
        self.to_out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = Mlp(width, ratio=mlp_ratio)
        self.class_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.block = Block(width, num_heads=num_heads, mlp_ratio=mlp_ratio)
        self.norm_out = nn.LayerNorm(width)
        if init == "identity":
            self._start_as_identity()

    def forward(self, maps: LevelMaps) -> Features:
        """Compute the feature h of each image from its three maps, noisiest first."""
        noisiest, middle, cleanest = self.norm_in(maps.flatten(3).transpose(2, 3)).unbind(1)
        query, key, value = self.to_q(noisiest), self.to_k(middle), self.to_v(cleanest)
        tokens = self.to_out(attend(query, key, value, num_heads=self.num_heads))
        if self.residual == "value":
            tokens = tokens + value
        tokens = tokens + self.mlp(self.norm_mlp(tokens))
        class_token = self.class_token.expand(len(tokens), -1, -1)
        if self.residual == "value":
            class_token = class_token + tokens.mean(dim=1, keepdim=True)
        tokens = torch.cat([class_token, tokens], dim=1)
        return self.norm_out(self.block(tokens, num_queries=1)[:, 0])

    @torch.no_grad()
    def _start_as_identity(self) -> None:
        """Initialise all layers so that h starts as the mean of the least noisy map.

        W_V and the values in the ViT block start orthogonal. Both MLPs start at zero. The output
        layers of both attentions start at zero if `residual` is "value". Otherwise they start as
        the identity, because zeros would make h a constant.
        """
        nn.init.orthogonal_(self.to_v.weight)
        nn.init.orthogonal_(self.block.to_qkv.weight[-len(self.to_v.weight) :])
        for mlp in (self.mlp, self.block.mlp):
            for parameter in mlp[-1].parameters():
                nn.init.zeros_(parameter)
        for to_out in (self.to_out, self.block.to_out):
            (nn.init.zeros_ if self.residual == "value" else nn.init.eye_)(to_out.weight)
            nn.init.zeros_(to_out.bias)
        if self.residual == "value":
            nn.init.zeros_(self.class_token)


class Projector(nn.Sequential):
    """Layers between h and the contrastive loss: Linear, BatchNorm, ReLU, Linear, without biases.

    *Deviation*: the paper mentions no projector. But the paper follows SimCLR and MAGE, and both
    have a projector. As in these papers, probes use h, not the output of the projector.
    """

    def __init__(self, head: HeadParams) -> None:
        hidden, out = head.projector_width, head.projector_out
        first, last = nn.Linear(head.width, hidden, bias=False), nn.Linear(hidden, out, bias=False)
        super().__init__(first, nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), last)
