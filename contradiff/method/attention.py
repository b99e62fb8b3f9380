"""The UNet's maps at three noise levels, and the attention that makes them one feature (Eq. 4)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from contradiff.config import Section
from contradiff.method.noise import NUM_LEVELS
from contradiff.method.transformer import Block, Mlp, attend
from contradiff.types import Features, Latents, Maps, Precision, Timesteps, Tokens

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

LevelMaps = Float[Tensor, "batch 3 width_m h_m w_m"]
"""Maps of one view, ordered: noisiest, middle, cleanest."""

MapBlock = Literal["mid", "up.1", "mid+up.1"]
"""Where in the UNet the maps come from: the mid block, the second up block, or both."""

NUM_UP_BLOCKS: dict[MapBlock, int] = {"mid": 0, "up.1": 2, "mid+up.1": 2}
"""How many up blocks run before the maps are there."""


class HeadParams(Section):
    """Section `head`: tri-timestep attention and the projector behind it."""

    block: MapBlock = Field(
        description="whose maps are read: mid (paper) | up.1, on mid's grid | both, stacked"
    )
    width: int = Field(ge=1, description="of the attention and of the feature h; paper-scale 1024")
    num_heads: int = Field(ge=1)
    mlp_ratio: int = Field(ge=1)
    self_conditioning: bool = Field(
        description="the decoder also sees the pooled bottleneck (paper: no)"
    )
    projector_width: int = Field(ge=1)
    projector_out: int = Field(ge=1)

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "HeadParams":
        if self.width % self.num_heads:
            raise ValueError("head.width must be a multiple of head.num_heads")
        return self


class FeaturesParams(Section):
    """Section `features`: which frozen features are taken for evaluation, and how they are kept."""

    model: Literal["contradiff", "base", "diffeed", "timm"] = Field(
        description="contradiff: the trained model | base: its base alone, no LoRA and zero tokens "
        "(Table 3's SD Features) | diffeed: the base in two passes with feedback | timm: a backbone"
    )
    timm_name: str | None = Field(description="timm: the architecture, as timm.create_model's")
    timm_weights: str | None = Field(description="timm: a local .safetensors file of its weights")
    timm_pretrained: bool = Field(description="timm: fetch its weights from the hub (network)")
    timesteps: list[int] = Field(
        min_length=NUM_LEVELS, max_length=NUM_LEVELS, description="the fixed evaluation triple"
    )
    more_triples: list[list[int]] = Field(description="further triples, for the probe's grid")
    more_blocks: list[MapBlock] = Field(
        description="further columns for the probe's grid: pooled maps of these blocks, each triple"
    )
    noising: Literal["direct", "ddim_chain"] = Field(
        description="direct: in one step (Eq. 5) | ddim_chain: DDIM inversion on a grid of 20 steps"
    )
    condition: Literal["image", "noise"] = Field(
        description="what contradiff's conditioner sees; the base alone has zero tokens"
    )
    pool: Literal["attention", "mean"] = Field(
        description="attention: h of Eq. 4 | mean: the maps averaged over space (SD Features); "
        "timm: the backbone's own pooled feature"
    )
    dtype: Literal["fp16", "bf16"] = Field(description="of the stored features")
    precision: Precision = Field(description="of the computation; bf16 by autocast")
    batch_size: int = Field(ge=1)

    @property
    def triples(self) -> list[list[int]]:
        """The evaluation triple, and the further ones behind it."""
        return [self.timesteps, *self.more_triples]

    @model_validator(mode="after")
    def _distinct(self) -> "FeaturesParams":
        if len(set(self.timesteps)) < NUM_LEVELS or min(self.timesteps) < 0:
            raise ValueError(
                f"features.timesteps must be three distinct timesteps >= 0, not {self.timesteps}"
            )
        for triple in self.more_triples:
            if len(triple) != NUM_LEVELS or len(set(triple)) < NUM_LEVELS or min(triple) < 0:
                raise ValueError(
                    f"features.more_triples: {triple} are not three distinct timesteps >= 0"
                )
        if len({frozenset(triple) for triple in self.triples}) < len(self.triples):
            raise ValueError(
                "features.more_triples: a triple is repeated (features.timesteps counts too)"
            )
        if len(set(self.more_blocks)) < len(self.more_blocks):
            raise ValueError(f"features.more_blocks: {self.more_blocks} repeats a block")
        return self

    @model_validator(mode="after")
    def _baselines_have_their_own_shape(self) -> "FeaturesParams":
        if self.model != "contradiff" and self.pool == "attention":
            raise ValueError(
                f"features.pool: attention is contradiff's trained head, which features.model: "
                f"{self.model} is without; set features.pool: mean"
            )
        if self.model == "diffeed" and self.noising != "direct":
            raise ValueError(
                "features.noising: features.model diffeed noises in one step; set it to direct"
            )
        if self.model in ("diffeed", "timm") and self.more_blocks:
            raise ValueError(
                f"features.more_blocks: features.model {self.model} fixes its blocks; set it to []"
            )
        if self.model == "timm":
            self._check_timm()
        return self

    def _check_timm(self) -> None:
        if self.timm_name is None:
            raise ValueError(
                "features.timm_name: features.model timm needs it (such as vit_base_patch16_224)"
            )
        if (self.timm_weights is None) != self.timm_pretrained:
            raise ValueError(
                "features.timm_weights: features.model timm needs either a local .safetensors file "
                "here or features.timm_pretrained: true (network), not both and not neither"
            )
        if self.more_triples:
            raise ValueError(
                "features.more_triples: features.model timm has no timesteps; set it to []"
            )


@dataclass(frozen=True)
class Encoded:
    """The UNet's state after the mid block or a later one: all that the rest of the pass needs.

    Attributes:
        bottleneck: the mid block's output.
        hidden: the last block's output; the bottleneck, if no up block has run.
        skips: what the up blocks yet to come will take.
        time_embedding: what they see of the timestep.
        num_up_blocks: how many up blocks have run.
    """

    bottleneck: Maps
    hidden: Float[Tensor, "batch width_h h_h w_h"]
    skips: tuple[Tensor, ...]
    time_embedding: Float[Tensor, "batch width_t"]
    num_up_blocks: int

    def __getitem__(self, rows: slice) -> "Encoded":
        """The state of some of the batch's rows."""
        return Encoded(
            self.bottleneck[rows],
            self.hidden[rows],
            tuple(skip[rows] for skip in self.skips),
            self.time_embedding[rows],
            self.num_up_blocks,
        )


def encode_to_bottleneck(
    unet: "UNet2DConditionModel", noisy_latents: Latents, timesteps: Timesteps, tokens: Tokens
) -> Encoded:
    """The first half of `unet.forward`: down blocks and mid block.

    The up blocks, 68% of a pass of Stable Diffusion's UNet, are not run.
    """
    time_embedding = unet.time_embedding(unet.get_time_embed(noisy_latents, timesteps))
    hidden = unet.conv_in(noisy_latents)
    skips = (hidden,)
    for block in unet.down_blocks:
        if getattr(block, "has_cross_attention", False):
            hidden, states = block(hidden, temb=time_embedding, encoder_hidden_states=tokens)
        else:
            hidden, states = block(hidden, temb=time_embedding)
        skips += states
    bottleneck = unet.mid_block(hidden, time_embedding, encoder_hidden_states=tokens)
    return Encoded(bottleneck, bottleneck, skips, time_embedding, num_up_blocks=0)


def decode_from_bottleneck(
    unet: "UNet2DConditionModel", encoded: Encoded, tokens: Tokens
) -> Latents:
    """The rest of `unet.forward`: the up blocks yet to come and the output => predicted noise."""
    hidden = advance(unet, encoded, tokens, num_up_blocks=len(unet.up_blocks)).hidden
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))  # pyright: ignore[reportOptionalCall]


def advance(
    unet: "UNet2DConditionModel", encoded: Encoded, tokens: Tokens, *, num_up_blocks: int
) -> Encoded:
    """Run up blocks until `num_up_blocks` have run in all; those that have are not run again."""
    hidden, skips = encoded.hidden, encoded.skips
    for block in list(unet.up_blocks)[encoded.num_up_blocks : num_up_blocks]:
        resnets = block.resnets
        assert isinstance(resnets, nn.ModuleList)
        states, skips = skips[-len(resnets) :], skips[: -len(resnets)]
        size = skips[-1].shape[2:] if skips else None
        if getattr(block, "has_cross_attention", False):
            hidden = block(
                hidden,
                temb=encoded.time_embedding,
                res_hidden_states_tuple=states,
                encoder_hidden_states=tokens,
                upsample_size=size,
            )
        else:
            hidden = block(
                hidden,
                temb=encoded.time_embedding,
                res_hidden_states_tuple=states,
                upsample_size=size,
            )
    num_up_blocks = max(num_up_blocks, encoded.num_up_blocks)
    return replace(encoded, hidden=hidden, skips=skips, num_up_blocks=num_up_blocks)


def block_maps(
    unet: "UNet2DConditionModel", encoded: Encoded, tokens: Tokens, *, block: MapBlock
) -> Maps:
    """The maps that the tri-timestep attention reads, on the bottleneck's grid.

    Deviation: the paper reads the mid block alone. `up.1` has a finer grid (for Stable
    Diffusion four times the bottleneck's sides, 1280 channels) and is averaged down to it, so that
    the attention has as many positions.

    Args:
        unet: the denoiser.
        encoded: its state after the mid block, or `advance`d by `NUM_UP_BLOCKS` already.
        tokens: the conditions that it was encoded with.
        block: "mid" runs no up block; the others run the first two and no more. "mid+up.1" stacks
            the channels of both, the mid block's first.

    Returns:
        As many channels as `block_channels` says.
    """
    return maps_of_blocks(unet, encoded, tokens, blocks=[block])[block]


def maps_of_blocks(
    unet: "UNet2DConditionModel", encoded: Encoded, tokens: Tokens, *, blocks: Sequence[MapBlock]
) -> dict[MapBlock, Maps]:
    """As `block_maps`, of several blocks of one pass; the up blocks are run once, if at all."""
    maps: dict[MapBlock, Maps] = {"mid": encoded.bottleneck}
    if any(block != "mid" for block in blocks):
        num_up_blocks = max(NUM_UP_BLOCKS[block] for block in blocks)
        hidden = advance(unet, encoded, tokens, num_up_blocks=num_up_blocks).hidden
        height, width = encoded.bottleneck.shape[2:]
        maps["up.1"] = F.adaptive_avg_pool2d(hidden, (height, width))
        maps["mid+up.1"] = torch.cat([maps["mid"], maps["up.1"]], dim=1)
    return {block: maps[block] for block in blocks}


def block_channels(unet: "UNet2DConditionModel", block: MapBlock) -> int:
    """Channels of `block_maps`: 1280 of each block of Stable Diffusion.

    Raises:
        ValueError: the UNet has no second up block; names head.block.
    """
    widths: Sequence[int] = unet.config["block_out_channels"][::-1]
    if block == "mid":
        return widths[0]
    if len(unet.up_blocks) < 2:
        raise ValueError(
            f"head.block: {block} reads the UNet's second up block, but the base has "
            f"{len(unet.up_blocks)}; set it to mid"
        )
    return widths[1] if block == "up.1" else widths[0] + widths[1]


def order_by_noise(
    maps: Float[Tensor, "levels batch width_m h_m w_m"], timesteps: Int[Tensor, "levels batch"]
) -> LevelMaps:
    """Order each image's maps from the noisiest to the cleanest: query, key, value."""
    order = timesteps.argsort(dim=0, descending=True, stable=True)
    index = order.view(*order.shape, 1, 1, 1).expand_as(maps)
    return maps.gather(0, index).transpose(0, 1)


class TriTimestepAttention(nn.Module):
    """h = Attention[W_Q f(z_t1), W_K f(z_t2), W_V f(z_t3)] (Eq. 4), and a class token over it.

    A shared LayerNorm; W_Q, W_K, W_V without bias; multi-head attention and W_O; an MLP; a class
    token with one ViT block; a final norm. Around Eq. 4's attention the paper fixes only the count
    of parameters (28M with the linear classifier), which this meets. Q comes from the noisiest map,
    K from the middle one, V from the cleanest.
    """

    def __init__(self, *, in_channels: int, width: int, num_heads: int, mlp_ratio: int) -> None:
        """Random weights.

        Args:
            in_channels: of the maps; 1280 for Stable Diffusion's mid block.
            width: of the attention and of h.
            num_heads: must divide `width`.
            mlp_ratio: hidden layer of the MLPs over `width`.
        """
        super().__init__()
        self.num_heads = num_heads
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

    def forward(self, maps: LevelMaps) -> Features:
        """Three maps, noisiest first => h."""
        noisiest, middle, cleanest = self.norm_in(maps.flatten(3).transpose(2, 3)).unbind(1)
        attended = attend(
            self.to_q(noisiest), self.to_k(middle), self.to_v(cleanest), num_heads=self.num_heads
        )
        tokens = self.to_out(attended)
        tokens = tokens + self.mlp(self.norm_mlp(tokens))
        tokens = torch.cat([self.class_token.expand(len(tokens), -1, -1), tokens], dim=1)
        return self.norm_out(self.block(tokens)[:, 0])


class SelfCondition(nn.Module):
    """Self-conditioning of the denoiser on its own bottleneck (after DDAE++, Xiang et al., 2025).

    The pooled bottleneck goes through a linear layer into the time embedding that the up blocks
    see, so that the reconstruction loss itself asks the bottleneck for what the whole image is.
    The layer starts at zero. The paper has none. The other such idea, self-distillation from
    shallow to deep blocks (SRA), needs a second loss, a teacher and a further pass.
    """

    def __init__(self, unet: "UNet2DConditionModel") -> None:
        """Make the layer that fits a UNet's bottleneck and time embedding."""
        super().__init__()
        widths = unet.config["block_out_channels"]
        self.to_time = nn.Linear(widths[-1], 4 * widths[0])
        nn.init.zeros_(self.to_time.weight)
        nn.init.zeros_(self.to_time.bias)

    def forward(self, encoded: Encoded) -> Encoded:
        """The state with another time embedding for the up blocks."""
        pooled = encoded.bottleneck.mean(dim=(2, 3))
        return replace(encoded, time_embedding=encoded.time_embedding + self.to_time(pooled))


class Projector(nn.Sequential):
    """Linear, BatchNorm, ReLU, Linear before the contrastive loss; probes read h, not its output.

    The paper has none; SimCLR and MAGE, which it follows, do.
    """

    def __init__(self, *, in_width: int, width: int, out_width: int) -> None:
        """Random weights; no biases, since BatchNorm and cosine similarity make them idle."""
        super().__init__(
            nn.Linear(in_width, width, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(inplace=True),
            nn.Linear(width, out_width, bias=False),
        )
