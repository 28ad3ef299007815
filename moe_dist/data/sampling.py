"""Held-out splits, and the order in which a training run reads its samples.

Legend: N examples, B samples per step over all ranks, b requested samples.
"""

import hashlib
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import TypeVar

import numpy as np

from moe_dist.nn.prng import uniform

T = TypeVar("T")
HELD_OUT_DIVISOR = 10  # a held-out split takes one text in ten ...
MAX_HELD_OUT = 5000  # ... but not more texts than this


def hold_out_splits(
    examples: list[T], missing: Iterable[str], text_of: Callable[[T], str]
) -> dict[str, list[T]]:
    """Splits examples into "train" and held-out splits.

    Each held-out split has a tenth of the distinct texts, at most `MAX_HELD_OUT`. All examples with
    the same text are in the same split, and the split of a text does not depend on the order of the
    examples.

    Args:
        examples: The examples to split.
        missing: The names of the splits to create besides "train".
        text_of: Returns the text of an example.

    Returns:
        The examples of each split, in their original order.

    Raises:
        ValueError: There are fewer than `HELD_OUT_DIVISOR` distinct texts.
    """
    names = list(missing)
    texts = sorted({text_of(example) for example in examples}, key=_shuffle_key)
    size = min(len(texts) // HELD_OUT_DIVISOR, MAX_HELD_OUT)
    if names and not size:
        raise ValueError(
            f"{len(texts)} different texts, too few to hold some out: "
            f"give at least {HELD_OUT_DIVISOR}"
        )
    split_of_text: dict[str, str] = {}
    for i, text in enumerate(texts[: size * len(names)]):
        split_of_text[text] = names[i // size]
    splits: dict[str, list[T]] = {split: [] for split in ("train", *names)}
    for example in examples:
        splits[split_of_text.get(text_of(example), "train")].append(example)
    return splits


def _shuffle_key(text: str) -> bytes:
    """Returns a sort key that depends on the text alone.

    A hash is used because a random generator for each of a million texts takes a minute.
    """
    return hashlib.blake2b(text.encode(), digest_size=16, key=b"held out").digest()


class SampleOrder:
    """An assignment of examples to the samples of each step, which does not depend on the ranks.

    Training runs through epochs without end. Each epoch is a new permutation of the examples, and
    sample b of step s is number s B + b in the sequence over all epochs. Evaluation reads each
    example once, in order; samples after the last example are padding.

    Attributes:
        length_N: The tokens of each example (int64).
        global_batch_size: B.
        seed: The seed for the permutations; None for evaluation.
        num_steps: The steps of one epoch, the last of which may be partial.
    """

    def __init__(self, length_N: Iterable[int], global_batch_size: int, seed: int | None) -> None:
        """Creates the order.

        Args:
            length_N: The tokens of each example; there is at least one example.
            global_batch_size: B.
            seed: The seed for the permutations; None for evaluation.
        """
        self.length_N = np.fromiter(length_N, dtype=np.int64)
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.num_steps = -(-len(self.length_N) // global_batch_size)

    def select(self, step: int, samples: range) -> tuple[np.ndarray, np.ndarray, int]:
        """Returns the examples of some samples of a step.

        Args:
            step: The step, from 0 on.
            samples: The requested samples, within 0 .. B - 1.

        Returns:
            epoch_b (int64); index_b (int64), the example of each sample, -1 for padding; and the
            tokens of the longest example of the whole step.
        """
        num_examples = len(self.length_N)
        number_B = step * self.global_batch_size + np.arange(self.global_batch_size)
        epoch_B, index_B = np.divmod(number_B, num_examples)
        if self.seed is None:
            index_B = np.where(epoch_B == 0, index_B, -1)
        else:
            for epoch in np.unique(epoch_B).tolist():
                in_epoch_B = epoch_B == epoch
                permutation_N = _permutation(num_examples, self.seed, epoch)
                index_B[in_epoch_B] = permutation_N[index_B[in_epoch_B]]
        width = int(self.length_N[index_B[index_B >= 0]].max(initial=1))
        sample_b = np.array(samples, dtype=np.int64)
        return epoch_B[sample_b], index_B[sample_b], width


# Two entries, because a step spans at most two epochs unless there are fewer examples than samples.
@lru_cache(maxsize=2)
def _permutation(num: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the permutation of an epoch (int64, shape (num,))."""
    return np.argsort(uniform(num, seed, "order", epoch).numpy(), kind="stable")
