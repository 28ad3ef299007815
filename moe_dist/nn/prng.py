"""Random numbers that depend only on a key, such as (seed, step, "negatives").

They are therefore equal on every layout. A key is hashed into a generator's seed, as
`jax.random.fold_in` does. `nn.token_noise` generates the numbers keyed by token.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


def generator(*key: int | str) -> torch.Generator:
    """Returns a CPU generator that is seeded by `key`."""
    return torch.Generator().manual_seed(fold_in(*key)[0])


def uniform(num: int, *key: int | str) -> torch.Tensor:
    """Returns `num` uniform numbers on [0, 1), seeded by `key` (float64, on CPU)."""
    return torch.empty(num, dtype=torch.float64).uniform_(generator=generator(*key))


@contextmanager
def default_generator() -> Iterator[Callable[..., None]]:
    """Seeds torch's default CPU generator for libraries that use it; restores its state at exit.

    Yields:
        A function `seed(*key)` to seed the generator.
    """
    state_before = torch.get_rng_state()

    def seed(*key: int | str) -> None:
        torch.default_generator.manual_seed(fold_in(*key)[0])

    try:
        yield seed
    finally:
        torch.set_rng_state(state_before)


def fold_in(*key: int | str) -> tuple[int, int]:
    """Hashes a key into two independent 63-bit words."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    first_word = int.from_bytes(digest[:8], "big") >> 1
    second_word = int.from_bytes(digest[8:], "big") >> 1
    return first_word, second_word
