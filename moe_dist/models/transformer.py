"""A transformer encoder whose blocks may share attention, experts, routers and LayerNorms.

    pre-LN:   x = x + attention(LN(x));  x = x + ffn(LN(x));  one more LN after the last block
    post-LN:  x = LN(x + attention(x));  x = LN(x + ffn(x))

In WideNet (Xue et al. 2021), all blocks share one attention, one router and the same experts, and
each block has its own LayerNorms. A layer can be used many times because its statistics and losses
are returned, and because noise and dropout are keyed by the layer call: 0 for the embedding,
2 i + 1 for block i's attention, 2 i + 2 for its ffn.

Legend: B samples, S tokens in each, T = B S tokens, D width, H heads, C channels in each head,
M channels and N norms in `norm_divergence`.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_dist.config.schema import EncoderConfig
from moe_dist.moe.experts import GeluExperts
from moe_dist.moe.gating.softmax_topk import SoftmaxTopK
from moe_dist.moe.layer import LayerStats, MoE
from moe_dist.nn.init import set_init_bound, uniform_parameter
from moe_dist.nn.token_context import TokenContext
from moe_dist.nn.token_noise import token_dropout

EPS = 1e-6  # of LayerNorms
EMBEDDING_BOUND = 0.02 * 3**0.5  # of a uniform distribution with standard deviation 0.02


@dataclass(frozen=True)
class Block:
    """One block's layers, as places in the lists of `Encoder`.

    Attributes:
        attention: Index in `Encoder.attention`.
        norm: Index in `Encoder.norm_attention` and `Encoder.norm_ffn`.
        ffn: Key in `Encoder.ffn`: "moe0", "ffn0" and so on.
        routes: True if the block computes a routing, False if it uses the last one again.
    """

    attention: int
    norm: int
    ffn: str
    routes: bool


def build_blocks(config: EncoderConfig) -> list[Block]:
    """Assigns layers to blocks.

    Args:
        config: The config's section `model.encoder`.

    Returns:
        The blocks in order.

    Raises:
        ValueError: `moe_blocks` names a block that does not exist, or blocks with different experts
            share a routing.
    """

    def group(block: int, size: int | None) -> int:
        return block // (size or config.depth)

    moe = _moe_blocks(config)
    blocks: list[Block] = []
    experts_of_routing: dict[int, str] = {}
    for i in range(config.depth):
        ffn = f"{'moe' if i in moe else 'ffn'}{group(i, config.blocks_per_ffn)}"
        routing = group(i, config.blocks_per_routing)
        routes = i in moe and routing not in experts_of_routing
        if i in moe and experts_of_routing.setdefault(routing, ffn) != ffn:
            raise ValueError(
                f"model.encoder.blocks_per_routing={config.blocks_per_routing}, but block {i} has "
                "experts of its own: blocks that share a routing need the same experts "
                f"(blocks_per_ffn={config.blocks_per_ffn})"
            )
        attention = group(i, config.blocks_per_attention)
        blocks.append(Block(attention, group(i, config.blocks_per_norm), ffn, routes))
    return blocks


def _moe_blocks(config: EncoderConfig) -> set[int]:
    """Returns which blocks have experts."""
    every = set(range(config.depth))
    if config.moe_blocks == "all":
        return every
    if config.moe_blocks == "none":
        return set()
    try:
        moe = {int(number) for number in config.moe_blocks.split(",")}
    except ValueError:
        moe = {-1}
    if not moe <= every:
        raise ValueError(
            f"model.encoder.moe_blocks={config.moe_blocks!r}: must be all, none, or numbers from 0 "
            f"to {config.depth - 1} with commas"
        )
    return moe


class Encoder(nn.Module):
    """A stack of blocks, (T, D) -> (T, D), which also returns each routing's statistics."""

    def __init__(self, config: EncoderConfig) -> None:
        """Creates the layers.

        Args:
            config: The config's section `model.encoder`.

        Raises:
            ValueError: Sizes do not fit together.
        """
        super().__init__()
        self.config = config
        self.blocks = build_blocks(config)
        num_attentions = len({block.attention for block in self.blocks})
        num_norms = len({block.norm for block in self.blocks})
        self.attention = nn.ModuleList()
        for _ in range(num_attentions):
            self.attention.append(Attention(config.dim, config.num_heads))
        self.norm_attention = nn.ModuleList(LayerNorm(config.dim) for _ in range(num_norms))
        self.norm_ffn = nn.ModuleList(LayerNorm(config.dim) for _ in range(num_norms))
        # ordered by first use, which is the same on every rank
        self.ffn = nn.ModuleDict()
        for block in self.blocks:
            if block.ffn not in self.ffn:
                is_moe = block.ffn.startswith("moe")
                self.ffn[block.ffn] = build_moe(config) if is_moe else build_ffn(config)
        self.norm = LayerNorm(config.dim) if config.norm_first else nn.Identity()

    def forward(
        self,
        x_TD: torch.Tensor,
        shape: tuple[int, int],
        mask_B1SS: torch.Tensor | None,
        ctx: TokenContext,
    ) -> tuple[torch.Tensor, dict[str, LayerStats]]:
        """Runs all blocks.

        Args:
            x_TD: Embeddings.
            shape: (B, S).
            mask_B1SS: True for tokens (last dimension) that a token may attend to; None for all
                tokens of its sample.
            ctx: The tokens' context.

        Returns:
            The output, and each routing's statistics, by the block that computes the routing.
        """
        stats: dict[str, LayerStats] = {}
        routing: Any = None  # of the last block that routes
        dropout = self.config.dropout
        for i, block in enumerate(self.blocks):
            norm_before, norm_after = self._place_norm(self.norm_attention[block.norm])
            attention = self.attention[block.attention]
            h_TD = self._call(attention, norm_before(x_TD), shape, mask_B1SS)
            x_TD = norm_after(x_TD + token_dropout(h_TD, dropout, ctx.at_layer(2 * i + 1)))

            norm_before, norm_after = self._place_norm(self.norm_ffn[block.norm])
            layer = self.ffn[block.ffn]
            ffn_ctx = ctx.at_layer(2 * i + 2)
            h_TD = norm_before(x_TD)
            if isinstance(layer, MoE):
                # as `MoE.forward`, except that several blocks may use one routing
                if block.routes:
                    routing, gate_stats = layer.route(h_TD, ffn_ctx)
                h_TD, expert_stats = layer.run_experts(h_TD, routing, ffn_ctx)
                if block.routes:  # one balance loss for each routing, however often it is used
                    stats[f"block{i}"] = layer.stats(routing, gate_stats, expert_stats)
            else:
                h_TD = self._call(layer, h_TD)
            x_TD = norm_after(x_TD + token_dropout(h_TD, dropout, ffn_ctx))
        return self.norm(x_TD), stats

    def _place_norm(self, norm: nn.Module) -> tuple[nn.Module, nn.Module]:
        """Returns the modules before a layer and after its residual; the norm is one of them."""
        return (norm, nn.Identity()) if self.config.norm_first else (nn.Identity(), norm)

    def _call(self, layer: nn.Module, x_TD: torch.Tensor, *more: Any) -> torch.Tensor:
        """Returns the layer's output; with `recompute` its activations are not stored."""
        if self.config.recompute:
            return checkpoint(layer, x_TD, *more, use_reentrant=False, preserve_rng_state=False)
        return layer(x_TD, *more)

    @property
    def num_chosen(self) -> int:
        """Experts for each token."""
        return self.config.moe.k

    def uses(self) -> Counter[str]:
        """Counts how often a token goes through each shareable module, by its name's prefix."""
        count: Counter[str] = Counter()
        for block in self.blocks:
            count[f"attention.{block.attention}."] += 1
            if block.ffn.startswith("moe"):
                count[f"ffn.{block.ffn}.gate."] += block.routes
            count[f"ffn.{block.ffn}."] += 1
        return count

    def attention_multiply_adds(self, tokens: int) -> int:
        """Counts the multiply-adds for attention scores and weighted values in one sample."""
        return len(self.blocks) * 2 * tokens**2 * self.config.dim

    def activations_per_token(self, seen: int = 0) -> int:
        """Counts the activations that backward needs, without those of expert rows.

        Args:
            seen: Tokens in the attention mask's last dimension; 0 without a mask.

        Returns:
            Elements for each token.
        """
        config = self.config
        count = 2 * config.dim
        for block in self.blocks:
            # inputs and outputs of two LayerNorms, dropout masks
            count += (4 + 2 * (config.dropout > 0)) * config.dim
            if not config.recompute:
                # queries, keys, values, attention output, mask
                count += 4 * config.dim + seen
            if block.ffn.startswith("moe"):
                count += 4 * config.moe.num_experts + 2 * config.moe.k  # scores, float64 sums
            elif not config.recompute:
                count += 2 * config.ffn_hidden_dim
        return count

    @property
    def num_moe_uses(self) -> int:
        """How often a token goes to experts."""
        return sum(block.ffn.startswith("moe") for block in self.blocks)


class Attention(nn.Module):
    """Multi-head self-attention within each sample, without dropout on its weights.

    Keys have no bias: a bias adds the same number to all scores of a token, which the softmax
    cancels, and Adam would change it by a zero gradient's rounding errors.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        """Creates the projections.

        Args:
            dim: Width.
            num_heads: How many heads there are.

        Raises:
            ValueError: `num_heads` does not divide `dim`.
        """
        super().__init__()
        if dim % num_heads:
            raise ValueError(
                f"model.encoder.dim={dim} is not a multiple of model.encoder.num_heads={num_heads}"
            )
        self.num_heads = num_heads
        self.query = linear(dim, dim)
        self.value = linear(dim, dim)
        self.out = linear(dim, dim)
        self.key = linear(dim, dim, bias=False)

    def forward(
        self, x_TD: torch.Tensor, shape: tuple[int, int], mask_B1SS: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns the attention output (T, D); see `Encoder.forward` for the arguments."""
        heads = (*shape, self.num_heads, x_TD.shape[1] // self.num_heads)
        q_BHSC = self.query(x_TD).view(heads).transpose(1, 2)
        k_BHSC = self.key(x_TD).view(heads).transpose(1, 2)
        v_BHSC = self.value(x_TD).view(heads).transpose(1, 2)
        y_BHSC = F.scaled_dot_product_attention(q_BHSC, k_BHSC, v_BHSC, mask_B1SS)
        return self.out(y_BHSC.transpose(1, 2).reshape(x_TD.shape))


class LayerNorm(nn.Module):
    """A layer norm, (x - mean) / deviation * (1 + gain) + bias; gain and bias start at zero."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gain_D = uniform_parameter(dim, bound=0.0)
        self.bias_D = uniform_parameter(dim, bound=0.0)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Returns the normalized input."""
        return F.layer_norm(x_TD, x_TD.shape[-1:], 1 + self.gain_D, self.bias_D, EPS)


def norm_divergence(named: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Returns how different an encoder's LayerNorms are (Xue et al. 2021).

        y = 1 / (M N^2) sum_i sum_j sum_n (gamma_i^j - gamma_i^n)^2 = 2 mean_i Var_j(gamma_i^j)

    with channels i from 1 to M and norms j, n from 1 to N. Blocks that share a norm count once.

    Args:
        named: One encoder's whole tensors by name, from a model or a checkpoint. Any prefix before
            "norm_attention" and "norm_ffn" is accepted, and other tensors are ignored.

    Returns:
        y for "attention.gain", "attention.bias", "ffn.gain" and "ffn.bias".

    Raises:
        ValueError: No tensor is a block's LayerNorm.
    """
    parts: dict[str, list[torch.Tensor]] = defaultdict(list)
    for name, p_D in named.items():
        match = re.search(r"\bnorm_(attention|ffn)\.\d+\.(gain|bias)_D$", name)
        if match:
            parts[".".join(match.groups())].append(p_D.detach().double())
    if not parts:
        raise ValueError(
            f"{len(named)} names without a block's LayerNorm, such as norm_attention.0.gain_D"
        )
    divergence: dict[str, float] = {}
    for part, norms in sorted(parts.items()):
        p_NM = torch.stack(norms)
        divergence[part] = 2 * p_NM.var(0, correction=0).mean().item()
    return divergence


class Positions(nn.Module):
    """A learned embedding for `num_positions` places, added to samples (B, S, D)."""

    def __init__(self, num_positions: int, dim: int) -> None:
        super().__init__()
        self.w_SD = uniform_parameter(num_positions, dim, bound=EMBEDDING_BOUND)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """Returns samples (B, S, D) plus the embedding for their places."""
        return x_BSD + self.w_SD[: x_BSD.shape[1]]


def linear(fan_in: int, fan_out: int, bound: float | None = None, bias: bool = True) -> nn.Linear:
    """Creates a linear layer whose bias starts at zero.

    The paper does not give its initialization.

    Args:
        fan_in: Input width.
        fan_out: Output width.
        bound: Weights are drawn from U(-bound, bound); None for variance 1 / fan_in.
        bias: True for a bias.

    Returns:
        The layer.
    """
    layer = nn.Linear(fan_in, fan_out, bias)
    set_init_bound(layer.weight, math.sqrt(3 / fan_in) if bound is None else bound)
    if bias:
        set_init_bound(layer.bias, 0.0)
    return layer


def build_ffn(config: EncoderConfig) -> nn.Module:
    """Returns a dense feed-forward layer.

    The paper does not specify its dropout. Here it applies to a block's output before the
    residual addition, not also to hidden units.
    """
    return nn.Sequential(
        linear(config.dim, config.ffn_hidden_dim),
        nn.GELU(),
        linear(config.ffn_hidden_dim, config.dim),
    )


def build_moe(config: EncoderConfig) -> MoE:
    """Returns an MoE layer with GELU experts."""
    moe = config.moe
    gate = SoftmaxTopK(
        config.dim,
        moe.num_experts,
        moe.k,
        noise=moe.noise,
        capacity_factor=moe.capacity_factor,
        balance_loss_weight=moe.balance_loss_weight,
    )
    experts = GeluExperts(moe.num_experts, config.dim, moe.expert_hidden_dim, config.recompute)
    return MoE(gate, experts)
