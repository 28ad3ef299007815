"""Noise and dropout that belong to a token, not to a rank.

Every number follows from (seed, step, layer call, gate level, use, sample, position, channel)
alone. So noise and dropout are the same on any layout, and in a forward that is recomputed.

They are a counter-based hash in integer tensor operations, with the same bits on CPU and CUDA. Its
finaliser is Wellons' "lowbias32": two rounds of multiply and xor-shift. A token's second key word
enters between the rounds, so that two tokens share their noise only if 64 bits collide.

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
        use: What the numbers are for; another use has other numbers.
        channel_C: Global ids of the channels, for example of experts, int64; (C,) or (T, C).
        dtype: Dtype of the result.

    Returns:
        (T, C), independent for each token and channel; no absolute value is above 5.2.
    """
    return _to_normal(_bits(ctx, use, channel_C), dtype)


def token_dropout(x_TD: torch.Tensor, p: float, ctx: TokenContext) -> torch.Tensor:
    """Sets each element to zero with probability `p` and scales the others by 1 / (1 - p).

    Args:
        x_TD: Tokens (T, D).
        p: The probability.
        ctx: The tokens' context; outside training nothing changes.

    Returns:
        (T, D), in the dtype of `x_TD`; `x_TD` itself if p is 0, and outside training.
    """
    if p == 0 or not ctx.train:
        return x_TD
    threshold = round(p * 2**32) - 2**31  # the bits are uniform on [-2^31, 2^31)
    channel_D = torch.arange(x_TD.shape[1], device=x_TD.device)
    keep_TD = _bits(ctx, "dropout", channel_D) >= threshold
    return x_TD * keep_TD.to(x_TD.dtype).mul_(1 / (1 - p))


def _bits(ctx: TokenContext, use: str, channel_C: torch.Tensor) -> torch.Tensor:
    """Returns uniform int32 words (T, C)."""
    word_a, word_b = fold_in(ctx.seed, ctx.step, ctx.layer_call, ctx.gate_level, use)
    low_T = _mix(_mix(_low_word(ctx.sample_T + word_a)) ^ _low_word(ctx.position_T))
    high_T = _mix(
        _mix(_low_word(ctx.sample_T + (word_a >> 31))) + _low_word(ctx.position_T + word_b)
    )
    channel_C = _mix(_low_word(channel_C + (word_b >> 31)))
    return _mix(low_T[:, None] ^ channel_C, high_T[:, None])


def _to_normal(bits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns the inverse CDF of 23 bits, centered in their cells; |z| <= 5.2.

    They are odd multiples of 2^-23 in (-1, 1), which float32 represents exactly. With one bit more
    the last cell would round to 1, and its normal to infinity.
    """
    centered = ((bits >> 9) & 0x7FFFFF).to(dtype).mul_(2).add_(1 - 2**23).mul_(2.0**-23)
    return centered.erfinv_().mul_(2**0.5)


def _mix(x: torch.Tensor, between: torch.Tensor | int = 0) -> torch.Tensor:
    """Mixes the bits of each word, so that every input bit affects the whole word.

    `>>` keeps the sign, so the shifted words are masked. Multiplication wraps.

    Args:
        x: int32.
        between: Added after the first round; broadcast to the shape of `x`.

    Returns:
        New int32 words in the shape of `x`; for a given `between` a bijection of `x`.
    """
    x = x ^ ((x >> 16) & 0xFFFF)
    x.mul_(0x7FEB352D).add_(between)
    x.bitwise_xor_((x >> 15) & 0x1FFFF)
    x.mul_(0x846CA68B - 2**32)
    return x.bitwise_xor_((x >> 16) & 0xFFFF)


def _low_word(x: torch.Tensor) -> torch.Tensor:
    """Returns the low 32 bits as int32."""
    return (((x & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000).to(torch.int32)
