"""A transformer encoder whose blocks may share what they are made of.

    pre-LN:   x = x + attention(LN(x));  x = x + ffn(LN(x))                         LN once more after the last block
    post-LN:  x = LN(x + attention(x));  x = LN(x + ffn(x))

WideNet (Xue et al. 2021) is the case of one attention, one router and one set of experts for all blocks, and of
LayerNorms of its own for each. A layer can be used many times because its statistics and losses are returned, and noise
and dropout are keyed by the use: embeddings are at site 0, block i's attention at 2 i + 1, its ffn at 2 i + 2.

Legend: B samples, S tokens of each, T = B S tokens, D width, H heads, C channels of a head.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
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
EMBEDDING_BOUND = 0.02 * 3**0.5  # deviation 0.02


@dataclass(frozen=True)
class Block:
    """What a block is made of: places in the lists of `Encoder`."""

    attention: int
    norm: int
    ffn: str  # "moe0" or "ffn0", the number counts what is shared
    routes: bool  # else it takes the last assignment


def build_blocks(config: EncoderConfig) -> list[Block]:
    """The blocks in order. Raises ValueError for blocks with experts that are not there, or an assignment that would
    outlive the experts it is for."""

    def group(block: int, size: int | None) -> int:
        return block // (size or config.depth)

    moe = _moe_blocks(config)
    blocks: list[Block] = []
    router: dict[int, str] = {}  # of each assignment
    for i in range(config.depth):
        ffn = f"{'moe' if i in moe else 'ffn'}{group(i, config.blocks_per_ffn)}"
        assignment = group(i, config.blocks_per_routing)
        routes = i in moe and assignment not in router
        if i in moe and router.setdefault(assignment, ffn) != ffn:
            raise ValueError(
                f"model.encoder.blocks_per_routing={config.blocks_per_routing}, but block {i} has experts of its own: "
                f"an assignment is for one set of experts (blocks_per_ffn={config.blocks_per_ffn})"
            )
        blocks.append(
            Block(
                group(i, config.blocks_per_attention), group(i, config.blocks_per_norm), ffn, routes
            )
        )
    return blocks


def _moe_blocks(config: EncoderConfig) -> set[int]:
    every = range(config.depth)
    named: dict[str, Iterable[int]] = {"all": every, "none": ()}
    try:
        moe = set(
            named[config.moe_blocks]
            if config.moe_blocks in named
            else map(int, config.moe_blocks.split(","))
        )
    except ValueError:
        moe = {-1}
    if not moe <= set(every):
        raise ValueError(
            f"model.encoder.moe_blocks={config.moe_blocks!r}: all, none, or numbers from 0 to {config.depth - 1} with "
            f"commas"
        )
    return moe


class Encoder(nn.Module):
    """(T, D) -> (T, D), and the statistics of each routing by the block that makes it."""

    def __init__(self, config: EncoderConfig) -> None:
        """Raises ValueError for numbers that do not fit together."""
        super().__init__()
        self.config, self.blocks = config, build_blocks(config)
        self.attention = nn.ModuleList(
            Attention(config.dim, config.num_heads)
            for _ in {block.attention for block in self.blocks}
        )
        norms = {block.norm for block in self.blocks}
        self.norm_attention = nn.ModuleList(LayerNorm(config.dim) for _ in norms)
        self.norm_ffn = nn.ModuleList(LayerNorm(config.dim) for _ in norms)
        # in order of first use; a set would be ordered otherwise on another rank
        names = dict.fromkeys(block.ffn for block in self.blocks)
        self.ffn = nn.ModuleDict(
            {name: _moe(config) if name.startswith("moe") else _ffn(config) for name in names}
        )
        self.norm = LayerNorm(config.dim) if config.norm_first else nn.Identity()

    def forward(
        self,
        x_TD: torch.Tensor,
        shape: tuple[int, int],
        mask_B1SS: torch.Tensor | None,
        ctx: TokenContext,
    ) -> tuple[torch.Tensor, dict[str, LayerStats]]:
        """`shape`: (B, S). `mask_B1SS`: which tokens (the last S) a token may see, None for all of its sample."""
        stats: dict[str, LayerStats] = {}
        routing: Any = None  # of the last gate that was asked, and what it told
        told: Any = None
        p = self.config.dropout
        for i, block in enumerate(self.blocks):
            before, after = self._around(self.norm_attention[block.norm])
            h_TD = self._call(self.attention[block.attention], before(x_TD), shape, mask_B1SS)
            x_TD = after(x_TD + token_dropout(h_TD, p, ctx.at_layer(2 * i + 1)))
            layer, here = self.ffn[block.ffn], ctx.at_layer(2 * i + 2)
            before, after = self._around(self.norm_ffn[block.norm])
            h_TD = before(x_TD)
            if isinstance(
                layer, MoE
            ):  # as `MoE.forward`, but that several blocks may have one routing
                if block.routes:
                    routing, told = layer.gate(h_TD, here)
                h_TD, inner = layer.dispatcher(h_TD, routing, layer.experts, here)
                if block.routes:  # a routing is balanced once, however often it is used
                    stats[f"block{i}"] = layer.stats(routing, told, inner)
            else:
                h_TD = self._call(layer, h_TD)
            x_TD = after(x_TD + token_dropout(h_TD, p, here))
        return self.norm(x_TD), stats

    def _around(self, norm: nn.Module) -> tuple[nn.Module, nn.Module]:
        """What is before a layer, and what after its residual: the norm is one of them."""
        return (norm, nn.Identity()) if self.config.norm_first else (nn.Identity(), norm)

    def _call(self, layer: nn.Module, x_TD: torch.Tensor, *more: Any) -> torch.Tensor:
        if self.config.recompute:
            return checkpoint(layer, x_TD, *more, use_reentrant=False, preserve_rng_state=False)
        return layer(x_TD, *more)

    @property
    def num_chosen(self) -> int:
        """Experts of a token."""
        return self.config.moe.k

    def uses(self) -> Counter[str]:
        """How often a token goes through each module that blocks may share, by the beginning of its name."""
        count: Counter[str] = Counter()
        for block in self.blocks:
            count[f"attention.{block.attention}."] += 1
            if block.ffn.startswith("moe"):
                count[f"ffn.{block.ffn}.gate."] += block.routes
            count[f"ffn.{block.ffn}."] += 1
        return count

    def attention_multiply_adds(self, tokens: int) -> int:
        """Of scores and of the values they weigh, in a sample of `tokens`; of no matrix of parameters."""
        return len(self.blocks) * 2 * tokens**2 * self.config.dim

    def activations_per_token(self, seen: int = 0) -> int:
        """Numbers kept for backward of a token, but for its rows: from what each operation saves. `seen`: tokens of the
        mask that attention is given."""
        config, kept = self.config, 2 * self.config.dim
        for block in self.blocks:
            # inputs of two LayerNorms and what they give, masks of dropout; queries, keys, values, what they give
            kept += (4 + 2 * (config.dropout > 0)) * config.dim
            kept += 0 if config.recompute else 4 * config.dim + seen
            if block.ffn.startswith("moe"):
                kept += 4 * config.moe.num_experts + 2 * config.moe.k  # scores, sums in float64
            else:
                kept += 0 if config.recompute else 2 * config.ffn_hidden_dim
        return kept

    @property
    def num_moe_uses(self) -> int:
        """How often a token goes to experts."""
        return sum(block.ffn.startswith("moe") for block in self.blocks)


class Attention(nn.Module):
    """Multi-head self-attention within each sample, no dropout on its weights.

    Keys have no bias: it would add the same to all scores of a token, which the softmax does not see, and Adam would
    move it by the rounding of a gradient that is zero.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        """Raises ValueError where `num_heads` does not divide `dim`."""
        super().__init__()
        if dim % num_heads:
            raise ValueError(
                f"model.encoder.dim={dim} is not a multiple of model.encoder.num_heads={num_heads}"
            )
        self.num_heads = num_heads
        self.query, self.value, self.out = (linear(dim, dim) for _ in range(3))
        self.key = linear(dim, dim, bias=False)

    def forward(
        self, x_TD: torch.Tensor, shape: tuple[int, int], mask_B1SS: torch.Tensor | None
    ) -> torch.Tensor:
        heads = (*shape, self.num_heads, x_TD.shape[1] // self.num_heads)
        q_BHSC, k_BHSC, v_BHSC = (
            layer(x_TD).view(heads).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        y_BHSC = F.scaled_dot_product_attention(q_BHSC, k_BHSC, v_BHSC, mask_B1SS)
        return self.out(y_BHSC.transpose(1, 2).reshape(x_TD.shape))


class LayerNorm(nn.Module):
    """(x - mean) / deviation * (1 + gain) + bias; both start at zero."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gain_D = uniform_parameter(dim, bound=0.0)
        self.bias_D = uniform_parameter(dim, bound=0.0)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x_TD, x_TD.shape[-1:], 1 + self.gain_D, self.bias_D, EPS)


def norm_divergence(named: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """How far the LayerNorms of an encoder's blocks are from each other (Xue et al. 2021), by part: "attention.gain",
    "attention.bias", "ffn.gain" and "ffn.bias".

        y = 1 / (M N^2) sum_i sum_j sum_n (gamma_i^j - gamma_i^n)^2 = 2 mean_i Var_j(gamma_i^j)

    over channels i of M and norms j, n of N; blocks that share a norm count as one.

    `named`: whole tensors by name, a model's parameters or a checkpoint's, whatever else is among them; what is before
    "norm_attention" and "norm_ffn" in a name does not matter, but they are of one encoder. Raises ValueError where none
    is a LayerNorm of a block.
    """
    parts: dict[str, list[torch.Tensor]] = defaultdict(list)
    for name, p_D in named.items():
        if found := re.search(r"\bnorm_(attention|ffn)\.\d+\.(gain|bias)_D$", name):
            parts[".".join(found.groups())].append(p_D.detach().double())
    if not parts:
        raise ValueError(
            f"no norm_attention.0.gain_D or its like among {len(named)} names: LayerNorms of blocks"
        )
    return {
        part: 2 * torch.stack(p_ND).var(0, correction=0).mean().item()
        for part, p_ND in sorted(parts.items())
    }


class Positions(nn.Module):
    """Adds what is learned for each place to samples (B, S, D) of at most `num_positions` tokens."""

    def __init__(self, num_positions: int, dim: int) -> None:
        super().__init__()
        self.w_SD = uniform_parameter(num_positions, dim, bound=EMBEDDING_BOUND)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        return x_BSD + self.w_SD[: x_BSD.shape[1]]


def linear(fan_in: int, fan_out: int, bound: float | None = None, bias: bool = True) -> nn.Linear:
    """With biases that start at zero, and weights of variance 1 / fan_in or drawn from U(-bound, bound). The paper does
    not say what it starts from."""
    layer = nn.Linear(fan_in, fan_out, bias)
    set_init_bound(layer.weight, math.sqrt(3 / fan_in) if bound is None else bound)
    if bias:
        set_init_bound(layer.bias, 0.0)
    return layer


def _ffn(config: EncoderConfig) -> nn.Module:
    # the paper does not say where its dropout is; ours is on what a block adds, not on hidden units too
    return nn.Sequential(
        linear(config.dim, config.ffn_hidden_dim),
        nn.GELU(),
        linear(config.ffn_hidden_dim, config.dim),
    )


def _moe(config: EncoderConfig) -> MoE:
    moe = config.moe
    gate = SoftmaxTopK(
        config.dim,
        moe.num_experts,
        moe.k,
        noise=moe.noise,
        capacity_factor=moe.capacity_factor,
        balance_loss_weight=moe.balance_loss_weight,
    )
    return MoE(
        gate, GeluExperts(moe.num_experts, config.dim, moe.expert_hidden_dim, config.recompute)
    )
