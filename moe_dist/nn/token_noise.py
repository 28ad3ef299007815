"""Noise and dropout keyed by token, not by rank.

Every number depends only on (seed, step, layer call, gate level, use, sample, position, channel).
So noise and dropout are equal on every layout, and in a recomputed forward.

The generator is a counter-based hash in integer tensor operations, with the same bits on CPU and
CUDA. Its finaliser is Wellons' "lowbias32": two rounds of multiply and xor-shift. A token's second
key word enters between the rounds, so two tokens share their noise only if 64 bits collide.

Legend: T tokens, C channels, D width.
"""

import torch

from moe_dist.nn.prng import fold_in
from moe_dist.nn.token_context import TokenContext


def token_normal(
    ctx: TokenContext, use: str, channel_C: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Returns standard normal numbers for tokens and channels.

    Args:
        ctx: The tokens' context.
        use: Purpose, a part of the key; two uses get independent numbers.
        channel_C: Global channel ids, for example expert ids, int64; (C,) or (T, C).
        dtype: Result dtype.

    Returns:
        (T, C), independent for each token and channel; |z| <= 5.2.
    """
    return _to_normal(_bits(ctx, use, channel_C), dtype)


def token_dropout(x_TD: torch.Tensor, p: float, ctx: TokenContext) -> torch.Tensor:
    """Sets each element to zero with probability `p` and scales the others by 1 / (1 - p).

    Args:
        x_TD: Tokens (T, D).
        p: Drop probability.
        ctx: The tokens' context; if `ctx.train` is False, nothing is dropped.

    Returns:
        (T, D), in `x_TD`'s dtype; `x_TD` itself if nothing is dropped.
    """
    if p == 0 or not ctx.train:
        return x_TD
    threshold = round(p * 2**32) - 2**31  # the bits are uniform on [-2^31, 2^31)
    channel_D = torch.arange(x_TD.shape[1], device=x_TD.device)
    keep_TD = _bits(ctx, "dropout", channel_D) >= threshold
    return x_TD * keep_TD.to(x_TD.dtype).mul_(1 / (1 - p))


def _bits(ctx: TokenContext, use: str, channel_C: torch.Tensor) -> torch.Tensor:
    """Hashes tokens and channels into uniform int32 words (T, C)."""
    word_a, word_b = fold_in(ctx.seed, ctx.step, ctx.layer_call, ctx.gate_level, use)
    low_T = _mix(_mix(_low_word(ctx.sample_T + word_a)) ^ _low_word(ctx.position_T))
    high_T = _mix(
        _mix(_low_word(ctx.sample_T + (word_a >> 31))) + _low_word(ctx.position_T + word_b)
    )
    channel_C = _mix(_low_word(channel_C + (word_b >> 31)))
    return _mix(low_T[:, None] ^ channel_C, high_T[:, None])


def _to_normal(bits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Maps the upper 23 bits to standard normal numbers by the inverse CDF; |z| <= 5.2.

    The bits number cells in (-1, 1). The cells' centers are odd multiples of 2^-23, which float32
    represents exactly. With 24 bits the last center would round to 1, and its normal number would
    be infinite.
    """
    centered = ((bits >> 9) & 0x7FFFFF).to(dtype).mul_(2).add_(1 - 2**23).mul_(2.0**-23)
    return centered.erfinv_().mul_(2**0.5)


def _mix(x: torch.Tensor, between: torch.Tensor | int = 0) -> torch.Tensor:
    """Mixes the bits within each word: every input bit affects the whole word.

    `>>` keeps the sign, so the shifted words are masked. Multiplication wraps.

    Args:
        x: int32.
        between: Added after the first round; broadcast to `x.shape`.

    Returns:
        New int32 words, shaped as `x`. For a fixed `between` the map is a bijection.
    """
    x = x ^ ((x >> 16) & 0xFFFF)
    x.mul_(0x7FEB352D).add_(between)
    x.bitwise_xor_((x >> 15) & 0x1FFFF)
    x.mul_(0x846CA68B - 2**32)
    return x.bitwise_xor_((x >> 16) & 0xFFFF)


def _low_word(x: torch.Tensor) -> torch.Tensor:
    """Returns the low 32 bits as int32."""
    return (((x & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000).to(torch.int32)
