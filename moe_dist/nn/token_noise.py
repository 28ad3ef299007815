"""Randomness that belongs to a token, not to a rank: every number follows from (seed, step, site, level, use, sample,
position, channel) alone, so noise and dropout are the same on any layout and in a recomputed forward.

A counter hash in integer tensor operations gives the same bits on CPU and CUDA. The finaliser is Wellons' "lowbias32"
(two multiply and xor-shift rounds); a token's second key word enters between the rounds, so that two tokens share
their noise only where 64 bits collide. Generators for initial weights are keyed by name in the same spirit.

Legend: T tokens, C channels.
"""

import torch

from moe_dist.nn.prng import fold_in
from moe_dist.nn.token_context import TokenContext


def token_normal(
    ctx: TokenContext, use: str, channel_C: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Standard normal numbers (T, C) for the channels named: int64 global ids, experts for example; (C,) or (T, C)."""
    return _normal_of(_bits(ctx, use, channel_C), dtype)


def token_dropout(x_TD: torch.Tensor, p: float, ctx: TokenContext) -> torch.Tensor:
    """Zeroes each element with probability `p` and scales the rest by 1 / (1 - p); the identity outside training."""
    if p == 0 or not ctx.train:
        return x_TD
    threshold = round(p * 2**32) - 2**31  # the bits are uniform on [-2^31, 2^31)
    keep_TD = _bits(ctx, "dropout", torch.arange(x_TD.shape[1], device=x_TD.device)) >= threshold
    return x_TD * keep_TD.to(x_TD.dtype).mul_(1 / (1 - p))


def _bits(ctx: TokenContext, use: str, channel_C: torch.Tensor) -> torch.Tensor:
    """Uniform int32 words (T, C)."""
    word_a, word_b = fold_in(ctx.seed, ctx.step, ctx.layer_call, ctx.gate_level, use)
    low_T = _mix(_mix(_int32(ctx.sample_T + word_a)) ^ _int32(ctx.position_T))
    high_T = _mix(_mix(_int32(ctx.sample_T + (word_a >> 31))) + _int32(ctx.position_T + word_b))
    channel_C = _mix(_int32(channel_C + (word_b >> 31)))
    return _mix(low_T[:, None] ^ channel_C, high_T[:, None])


def _normal_of(bits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Inverse CDF of 23 bits, centred in their cells: odd multiples of 2^-23 in (-1, 1), which float32 holds exactly.
    With one bit more the last cell would round to 1, and its normal to infinity. |z| <= 5.2."""
    centred = ((bits >> 9) & 0x7FFFFF).to(dtype).mul_(2).add_(1 - 2**23).mul_(2.0**-23)
    return centred.erfinv_().mul_(2**0.5)


def _mix(x: torch.Tensor, between: torch.Tensor | int = 0) -> torch.Tensor:
    """A bijection of int32 that spreads every input bit over the word; `between` is added after the first round.

    `>>` keeps the sign, so the shifted words are masked. Multiplication wraps.
    """
    x = x ^ ((x >> 16) & 0xFFFF)
    x.mul_(0x7FEB352D).add_(between)
    x.bitwise_xor_((x >> 15) & 0x1FFFF)
    x.mul_(0x846CA68B - 2**32)
    return x.bitwise_xor_((x >> 16) & 0xFFFF)


def _int32(x: torch.Tensor) -> torch.Tensor:
    """The low 32 bits."""
    return (((x & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000).to(torch.int32)
