"""Keyed randomness: its keys, and its statistics. Bounds are 4 standard errors.

Legend: T tokens, C channels, D width, B samples, S positions.
"""

import dataclasses
import hashlib
import itertools
from typing import Any

import pytest
import torch

from moe_dist.nn import prng, token_noise
from moe_dist.nn.token_context import TokenContext

FLOAT64 = torch.float64
B, S, C = 64, 64, 128


def context(num_samples: int = B, positions: int = S, **changes: Any) -> TokenContext:
    ctx = TokenContext(
        sample_T=torch.arange(num_samples).repeat_interleave(positions),
        position_T=torch.arange(positions).repeat(num_samples),
        valid_T=torch.ones(num_samples * positions, dtype=torch.bool),
        seed=7,
        step=3,
        train=True,
        first_sample=0,
        num_samples=num_samples,
        balance_loss_group_size=num_samples,
        capacity_group_size=1,
        layer_call=1,
    )
    return dataclasses.replace(ctx, **changes)


def normal(ctx: TokenContext, use: str = "gate", channels: int = C) -> torch.Tensor:
    return token_noise.token_normal(ctx, use, torch.arange(channels), FLOAT64)


def bits(ctx: TokenContext, channels: int = C) -> torch.Tensor:
    """Returns words 0 to 2^32 - 1."""
    return token_noise._bits(ctx, "gate", torch.arange(channels)).long() & 0xFFFFFFFF


# what a number follows from


def test_noise_and_dropout_belong_to_the_token() -> None:
    """The other tokens of a call, their order, and the other channels do not matter."""
    ctx = context(8, 8)
    z_TC = normal(ctx)
    kept_TD = token_noise.token_dropout(torch.ones(64, C), 0.5, ctx)
    for rows in (
        torch.tensor([17]),
        torch.arange(64).flip(0),
        torch.tensor([5, 40, 5]),
        torch.zeros(0, dtype=torch.long),
    ):
        assert torch.equal(normal(ctx.select(rows)), z_TC[rows])
        assert torch.equal(
            token_noise.token_dropout(torch.ones(len(rows), C), 0.5, ctx.select(rows)),
            kept_TD[rows],
        )
    channel_C = torch.tensor([3, 100, 0])
    assert torch.equal(
        token_noise.token_normal(ctx, "gate", channel_C, FLOAT64), z_TC[:, channel_C]
    )


def test_noise_does_not_depend_on_the_batch_layout() -> None:
    ctx = context(8, 8)
    other = context(
        8, 8, train=False, valid_T=~ctx.valid_T, first_sample=4, balance_loss_group_size=1
    )
    assert torch.equal(normal(ctx), normal(other))


def test_every_part_of_the_key_changes_the_noise() -> None:
    ctx = context()
    one = normal(ctx)
    others = {
        "seed": normal(dataclasses.replace(ctx, seed=8)),
        "step": normal(dataclasses.replace(ctx, step=4)),
        "site": normal(ctx.at_layer(2)),
        "level": normal(dataclasses.replace(ctx, gate_level=1)),
        "use": normal(ctx, "dropout"),
        "sample": normal(dataclasses.replace(ctx, sample_T=ctx.sample_T + B)),
        "position": normal(dataclasses.replace(ctx, position_T=ctx.position_T + S)),
        "channel": token_noise.token_normal(ctx, "gate", torch.arange(C) + C, FLOAT64),
        "sample for position": normal(
            dataclasses.replace(ctx, sample_T=ctx.position_T, position_T=ctx.sample_T)
        )[1:S],
        "step for site": normal(dataclasses.replace(ctx, step=1, layer_call=3)),
    }
    for name, other in others.items():
        same = one[1:S] if len(other) < len(one) else one
        assert (same == other).double().mean() < 1e-4, name
        assert abs((same * other).mean()) < 4 / same.numel() ** 0.5, name


def test_bits_equal_the_hash_in_plain_integers() -> None:
    """The numbers are the same on every device and in every version: a change of them changes
    every run."""

    def mix(x: int, between: int = 0) -> int:  # lowbias32
        x ^= x >> 16
        x = (x * 0x7FEB352D + between) % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ (x >> 16)

    digest = hashlib.blake2b(
        b"7/3/1/0/gate", digest_size=16
    ).digest()  # seed, step, site, level, use
    word_a, word_b = (int.from_bytes(half, "big") >> 1 for half in (digest[:8], digest[8:]))
    actual_TC = bits(context(3, 2), 4)
    for t, (sample, position) in enumerate(itertools.product(range(3), range(2))):
        low = mix(mix((sample + word_a) % 2**32) ^ position)
        high = mix((mix((sample + (word_a >> 31)) % 2**32) + (position + word_b)) % 2**32)
        for channel in range(4):
            assert actual_TC[t, channel] == mix(low ^ mix((channel + (word_b >> 31)) % 2**32), high)


def test_no_two_tokens_share_their_noise() -> None:
    # 2^15 samples of 2^6 positions. If a token were known by 32 bits, two samples would share the
    # noise of their positions wherever they agree in the other 26 bits: 2^29 pairs / 2^26 = 8 pairs
    # of samples.
    word_T2 = bits(context(2**15, 2**6), 2)
    assert len(torch.unique(word_T2[:, 0] << 32 | word_T2[:, 1])) == 2**21


def test_generators_follow_from_their_key() -> None:
    def draw(*key: int | str) -> float:
        return torch.rand((), generator=prng.generator(*key)).item()

    assert draw(0, "w", 1) == draw(0, "w", 1)
    assert (
        len({draw(0, "w", 1), draw(1, "w", 1), draw(0, "v", 1), draw(0, "w", 2), draw(0, "w")}) == 5
    )


def test_default_generator_is_seeded_and_restored() -> None:
    before = torch.get_rng_state()
    drawn = []
    with pytest.raises(ZeroDivisionError), prng.default_generator() as reseed:
        for key in ((0, "w", 1), (0, "w", 2), (0, "w", 1)):
            reseed(*key)
            drawn.append(torch.rand(()).item())
        raise ZeroDivisionError
    assert drawn[0] == drawn[2] != drawn[1]
    assert drawn[0] == torch.rand((), generator=prng.generator(0, "w", 1)).item()
    assert torch.equal(torch.get_rng_state(), before)


# how random it is


def test_bits_are_uniform() -> None:
    # n words over 256 cells: chi-square has mean 255 and deviation sqrt(2 x 255) = 22.6
    word_N = bits(context()).flatten()
    expected = len(word_N) / 256
    for shift in (0, 8, 16, 24):
        count = torch.bincount(word_N >> shift & 0xFF, minlength=256)
        assert abs((count - expected).square().sum() / expected - 255) < 4 * 22.6
    # the upper half-bytes of neighbours: 16 x 16 cells
    word_BSC = word_N.view(B, S, C)
    for dim in range(3):
        upper, next_upper = (word_BSC >> 28).unfold(dim, 2, 2).unbind(-1)
        count = torch.bincount((upper * 16 + next_upper).flatten(), minlength=256)
        assert abs((count - expected / 2).square().sum() / (expected / 2) - 255) < 4 * 22.6
    # every bit is set in half of the words
    rate = torch.stack([(word_N >> bit & 1).double().mean() for bit in range(32)])
    assert (rate - 0.5).abs().max() < 4 * 0.5 / len(word_N) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64])
def test_normal_has_the_moments_of_a_normal(dtype: torch.dtype) -> None:
    z = token_noise.token_normal(context(), "gate", torch.arange(C), dtype).double()
    n = z.numel()
    assert abs(z.mean()) < 4 / n**0.5
    assert abs(z.square().mean() - 1) < 4 * (2 / n) ** 0.5  # the variance of z² is 2
    assert abs(z.pow(3).mean()) < 4 * (15 / n) ** 0.5  # E z^6 = 15
    assert abs(z.pow(4).mean() - 3) < 4 * (96 / n) ** 0.5  # E z^8 - 9 = 105 - 9
    for bound, share in ((1, 0.317311), (2, 0.045500), (3, 0.002700)):
        assert abs((z.abs() > bound).double().mean() - share) < 4 * (share / n) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64])
def test_normal_is_finite_for_any_bits(dtype: torch.dtype) -> None:
    word = torch.tensor([0, 1, 2**31 - 1, -(2**31), -1], dtype=torch.int32)
    z = token_noise._to_normal(word, dtype)
    assert z.dtype == dtype
    assert z.isfinite().all()
    assert 5 < z.max() < 5.5
    assert -5.5 < z.min() < -5


def test_normal_is_equal_in_any_precision() -> None:
    narrow = token_noise.token_normal(context(), "gate", torch.arange(C), torch.float32)
    torch.testing.assert_close(narrow.double(), normal(context()), atol=1e-5, rtol=1e-5)


def test_neighbours_are_not_correlated() -> None:
    """Along samples, positions, channels, steps and layer calls: the numbers, products of
    signs, and squares."""
    z_BSC = normal(context()).view(B, S, C)
    pairs = [
        (
            z_BSC.narrow(dim, 0, z_BSC.shape[dim] - lag),
            z_BSC.narrow(dim, lag, z_BSC.shape[dim] - lag),
        )
        for dim, lag in itertools.product(range(3), (1, 2, 4, 32))
    ]
    pairs += [
        (z_BSC, normal(context(step=4)).view_as(z_BSC)),
        (z_BSC, normal(context(layer_call=2)).view_as(z_BSC)),
    ]
    pairs += [(z_BSC[:, :-1, :-1], z_BSC[:, 1:, 1:]), (z_BSC[:-1, 1:], z_BSC[1:, :-1])]  # diagonals
    for a, b in pairs:
        n = a.numel()
        assert abs((a * b).mean()) < 4 / n**0.5
        assert abs((a.sign() * b.sign()).mean()) < 4 / n**0.5
        assert abs(((a.square() - 1) * (b.square() - 1)).mean()) < 4 * 2 / n**0.5


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 0.9])
def test_dropout_keeps_its_share_and_the_mean(p: float) -> None:
    x_TD = torch.full((B * S, C), 3.0, dtype=FLOAT64)
    y_TD = token_noise.token_dropout(x_TD, p, context())
    n = y_TD.numel()
    kept = y_TD != 0
    torch.testing.assert_close(y_TD[kept], x_TD[kept] / (1 - p))
    error = (p * (1 - p) / n) ** 0.5
    assert abs(kept.double().mean() - (1 - p)) < 4 * error
    assert abs(y_TD.mean() - 3) < 4 * 3 * error / (1 - p)
    # no token and no channel is kept more than others: shares of n' elements each
    for dim, size in ((0, B * S), (1, C)):
        assert (kept.double().mean(dim) - (1 - p)).abs().max() < 5 * (p * (1 - p) / size) ** 0.5


def test_dropout_scales_the_gradient_like_the_value() -> None:
    x_TD = torch.ones(B * S, C, requires_grad=True)
    y_TD = token_noise.token_dropout(x_TD, 0.5, context())
    y_TD.sum().backward()
    assert torch.equal(x_TD.grad, y_TD)


def test_dropout_is_the_identity_in_evaluation_and_at_0() -> None:
    x_TD = torch.randn(B * S, C)
    assert token_noise.token_dropout(x_TD, 0.5, context(train=False)) is x_TD
    assert token_noise.token_dropout(x_TD, 0.0, context()) is x_TD


def test_dropout_keeps_the_dtype() -> None:
    for dtype in (torch.bfloat16, torch.float32, FLOAT64):
        y_TD = token_noise.token_dropout(torch.ones(4, 8, dtype=dtype), 0.5, context(2, 2))
        assert y_TD.dtype == dtype
        assert set(y_TD.flatten().tolist()) == {0.0, 2.0}
