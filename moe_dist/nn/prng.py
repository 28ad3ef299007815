"""Randomness that belongs to a token, not to a rank: every number follows from (seed, step, site, level, use, sample,
position, channel) alone, so noise and dropout are the same on any layout and in a recomputed forward.

A counter hash in integer tensor operations gives the same bits on CPU and CUDA. The finaliser is Wellons' "lowbias32"
(two multiply and xor-shift rounds); a token's second key word enters between the rounds, so that two tokens share
their noise only where 64 bits collide. Generators for initial weights are keyed by name in the same spirit.

Legend: T tokens, C channels.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by `key`."""
    return torch.Generator().manual_seed(fold_in(*key)[0])


def uniform(num: int, *key: int | str) -> torch.Tensor:
    """Uniform numbers on [0, 1) (float64, on CPU) that follow from `key` alone."""
    return torch.empty(num, dtype=torch.float64).uniform_(generator=generator(*key))


@contextmanager
def default_generator() -> Iterator[Callable[..., None]]:
    """Lends torch's default CPU generator, for libraries that can draw from no other: yields a function that seeds it
    by a key, as often as is needed, and gives it back as it was."""
    before = torch.get_rng_state()

    def seed(*key: int | str) -> None:
        torch.default_generator.manual_seed(fold_in(*key)[0])

    try:
        yield seed
    finally:
        torch.set_rng_state(before)


def fold_in(*key: int | str) -> tuple[int, int]:
    """Two independent 63-bit words from a key."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "big") >> 1, int.from_bytes(digest[8:], "big") >> 1
