"""The transformer block of the conditioner and of the attention head."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Sequence = Float[Tensor, "batch num_tokens width"]
Queries = Float[Tensor, "batch num_queries width"]


class Mlp(nn.Sequential):
    """An MLP (Linear, GELU, Linear) whose hidden layer has `ratio * width` units."""

    def __init__(self, width: int, *, ratio: int) -> None:
        hidden = ratio * width
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


def attend(query: Queries, key: Sequence, value: Sequence, *, num_heads: int) -> Queries:
    """Compute multi-head scaled dot-product attention; a head has width / num_heads channels."""
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Block(nn.Module):
    """A pre-norm ViT block: self-attention (q, k, v without bias), then an MLP."""

    def __init__(self, width: int, *, num_heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_attention = nn.LayerNorm(width)
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.to_out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = Mlp(width, ratio=mlp_ratio)

    def forward(self, tokens: Sequence, *, num_queries: int | None = None) -> Queries:
        """Apply attention between tokens, then the MLP to each token.

        Return only the first `num_queries` tokens, which is cheaper. None returns all tokens.
        """
        normed, width = self.norm_attention(tokens), tokens.shape[-1]
        to_query, to_key_value = self.to_qkv.weight.split((width, 2 * width))
        key, value = F.linear(normed, to_key_value).chunk(2, dim=-1)
        query = F.linear(normed[:, :num_queries], to_query)
        attended = attend(query, key, value, num_heads=self.num_heads)
        tokens = tokens[:, :num_queries] + self.to_out(attended)
        return tokens + self.mlp(self.norm_mlp(tokens))
