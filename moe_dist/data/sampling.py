"""What sets of examples have in common: which are held out, and which one is sample b of a step.

Legend: N examples, B samples of a step over all ranks, b those asked for.
"""

import hashlib
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import TypeVar

import numpy as np

from moe_dist.nn.prng import uniform

T = TypeVar("T")
ONE_OF, AT_MOST = 10, 5000  # texts: a tenth is held out for a split, but no more


def hold_out_splits(
    examples: list[T], missing: Iterable[str], text_of: Callable[[T], str]
) -> dict[str, list[T]]:
    """`missing` splits out of `examples`, each a tenth of the different texts but at most 5,000, and "train", what is
    left. A text is in one split, whichever order the examples come in.

    Raises ValueError for fewer texts than that is one of.
    """
    missing = list(missing)
    texts = sorted({text_of(example) for example in examples}, key=_shuffled)
    size = min(len(texts) // ONE_OF, AT_MOST)
    if missing and not size:
        raise ValueError(
            f"{len(texts)} different texts, too few to hold some out: give at least {ONE_OF}"
        )
    split_of = {text: missing[i // size] for i, text in enumerate(texts[: size * len(missing)])}
    splits: dict[str, list[T]] = {split: [] for split in ("train", *missing)}
    for example in examples:
        splits[split_of.get(text_of(example), "train")].append(example)
    return splits


def _shuffled(text: str) -> bytes:
    """A place in an order that belongs to the text. A generator for each of a million texts would take a minute."""
    return hashlib.blake2b(text.encode(), digest_size=16, key=b"held out").digest()


class SampleOrder:
    """Which example is sample b of step s, and how long the step's samples are, whoever has them.

    Training goes through epochs without end, each a permutation of its own: that sample is number s B + b of them all.
    Evaluation takes every example once, in order; behind the last one are samples of padding.
    """

    def __init__(self, length_N: Iterable[int], global_batch_size: int, seed: int | None) -> None:
        """`length_N`: tokens of each example, there is at least one. `global_batch_size`: B. `seed`: None for evaluation."""
        self.length_N, self.global_batch_size, self.seed = (
            np.fromiter(length_N, dtype=np.int64),
            global_batch_size,
            seed,
        )
        self.num_steps = -(
            -len(self.length_N) // global_batch_size
        )  # of one epoch, the last one perhaps not whole

    def select(self, step: int, samples: range) -> tuple[np.ndarray, np.ndarray, int]:
        """Epochs and indices of these samples (int64), index -1 for padding, and the tokens of the step's longest
        example."""
        number_B = step * self.global_batch_size + np.arange(self.global_batch_size)
        epoch_B, index_B = np.divmod(number_B, len(self.length_N))
        if self.seed is None:
            index_B = np.where(epoch_B == 0, index_B, -1)
        else:
            for epoch in np.unique(epoch_B).tolist():
                here_B = epoch_B == epoch
                index_B[here_B] = _permutation(len(self.length_N), self.seed, epoch)[
                    index_B[here_B]
                ]
        width = int(self.length_N[index_B[index_B >= 0]].max(initial=1))
        mine_b = np.array(samples, dtype=np.int64)
        return epoch_B[mine_b], index_B[mine_b], width


@lru_cache(
    maxsize=2
)  # a step is in two epochs at most, unless there are fewer examples than samples
def _permutation(num: int, seed: int, epoch: int) -> np.ndarray:
    return np.argsort(uniform(num, seed, "order", epoch).numpy(), kind="stable")
