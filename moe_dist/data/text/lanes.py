"""Text for language modelling: tokens, a vocabulary, and lanes of one long token stream.

Dimensions: N tokens in a stream, V words, B lanes, S timesteps.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch

from moe_dist.monitoring.progress_bar import with_progress

UNK, EOS = "<unk>", "<eos>"
UNK_ID, EOS_ID = 0, 1
ASCII_TOKEN = re.compile(r"<unk>|\w+(?:'\w+)*|--|[^\w\s]")
# Characters that are seen nowhere: soft hyphen, word joiner and the like, and marks of direction.
UNSEEN = dict.fromkeys(
    [
        0xAD,
        0x61C,
        0x180E,
        *range(0x200E, 0x2010),
        *range(0x202A, 0x202F),
        *range(0x2060, 0x2070),
        0xFEFF,
    ]
)
UNSEEN[0x200B] = " "  # zero width space: Thai, Khmer and others divide words with it
JOINERS = "\u200c\u200d"  # within a word they tell how its letters join


def _ranges(category: str) -> str:
    """Characters of a Unicode category as ranges for a class of a regular expression."""
    parts: list[list[int]] = []
    for code in (
        *range(0x20000),
        *range(0xE0100, 0xE01F0),
    ):  # behind these are none but variation selectors
        if unicodedata.category(chr(code)).startswith(category):
            if parts and parts[-1][1] == code - 1:
                parts[-1][1] = code
            else:
                parts.append([code, code])
    return "".join(f"{chr(first)}-{chr(last)}" for first, last in parts)


@cache
def _token() -> re.Pattern[str]:
    """ "<unk>" stays whole, because published corpora often come with their rare words already replaced by it. A mark,
    which `\\w` does not comprise, goes with the letter or sign before it."""
    mark = _ranges("M")
    word, sign = rf"[\w{mark}][\w{mark}{JOINERS}]*", rf"[^\w\s{mark}{JOINERS}][{mark}]*"
    return re.compile(rf"<unk>|{word}(?:['\u2019]{word})*|--|{sign}(?:\u200d{sign})*")


def tokenize(line: str) -> list[str]:
    """Returns the words of a line (case kept, inner apostrophes kept: "don't"), "--" and single punctuation marks, in
    order. Text is brought to its composed form (NFC), and what is seen nowhere is left out."""
    if line.isascii():
        return ASCII_TOKEN.findall(line)
    return _token().findall(unicodedata.normalize("NFC", line.translate(UNSEEN)))


@dataclass(frozen=True)
class Vocabulary:
    """Words by index: 0 is `<unk>`, 1 is `<eos>` (end of a line), then the most frequent words first.

    `count_params_and_flops` are theirs in the lines that it was built from: `<unk>`'s is that of all other words, `<eos>`'s that of
    lines.
    """

    words: tuple[str, ...]
    counts: tuple[int, ...]

    @classmethod
    def build(cls, lines: Iterable[str], size: int, exact: bool = True) -> "Vocabulary":
        """Builds the vocabulary of the `size - 2` most frequent words of `lines`, behind `<unk>` and `<eos>`; ties go
        by the word. One pass, whose progress is shown on stderr where it takes more than two seconds.

        Args:
            lines: The text.
            size: Number of words, the two special ones included.
            exact: Whether fewer words are an error. Otherwise the vocabulary is smaller.

        Raises:
            ValueError: `lines` hold too few different words, or `size` leaves room for none.
        """
        counts: Counter[str] = Counter()
        num_lines = 0
        for line in with_progress(lines, "vocabulary", " lines"):
            counts.update(tokenize(line))
            num_lines += 1
        num_words = counts.total()
        counts.pop(UNK, None)
        if not exact and counts:
            size = min(size, len(counts) + 2)
        if not 3 <= size <= len(counts) + 2:
            raise ValueError(
                f"data.vocabulary_size={size} does not fit {len(counts)} different words: "
                f"at least 3 and at most {len(counts) + 2} (2 places are {UNK} and {EOS}) would do"
            )
        kept = sorted(counts, key=lambda word: (-counts[word], word))[: size - 2]
        num_kept = [counts[word] for word in kept]
        return cls((UNK, EOS, *kept), (num_words - sum(num_kept), num_lines, *num_kept))

    def __len__(self) -> int:
        return len(self.words)

    @cached_property
    def _index(self) -> dict[str, int]:
        return {word: index for index, word in enumerate(self.words)}

    def encode(self, lines: Iterable[str]) -> np.ndarray:
        """Token indices of all lines in one int64 stream [N], each line followed by `<eos>`."""
        get = self._index.get
        ids: list[int] = []
        for line in lines:
            ids += [get(word, UNK_ID) for word in tokenize(line)]
            ids.append(EOS_ID)
        return np.array(ids, dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """The words of token indices, joined by spaces."""
        return " ".join(self.words[index] for index in ids)


class Lanes:
    """A token stream cut into B global lanes, each read from position 0 on and carrying its state.

    Which rank and micro-batch holds a lane follows from its index alone, so a window depends on nothing else.

    Cyclic (training): `lane_len = N // B` and position p of lane b is token (b * lane_len + p) mod N. Past its own text
    a lane flows on into its neighbour's, so that a next pass needs no reset of the state and nothing is padded.
    Not cyclic (evaluation): the N - 1 (input, target) pairs are cut into lanes of `lane_len = ceil((N - 1) / B)`, so
    that every token but the first is a target exactly once; positions past the end are padding.
    """

    def __init__(self, token_N: np.ndarray, num_lanes: int, cyclic: bool) -> None:
        """Raises ValueError if `num_lanes` is not positive or the stream has too few tokens for one step per lane."""
        if num_lanes < 1:
            raise ValueError(f"num_lanes is {num_lanes}: at least 1 would do")
        needed = num_lanes if cyclic else 2
        if len(token_N) < needed:
            raise ValueError(
                f"a split of data.text has {len(token_N)} tokens, too few for {num_lanes} lanes: at least {needed} "
                f"would do, or a smaller batch.global_batch_size"
            )
        self.token_N, self.num_lanes, self.cyclic = token_N, num_lanes, cyclic
        self.lane_len = len(token_N) // num_lanes if cyclic else -(-(len(token_N) - 1) // num_lanes)

    def num_windows(self, steps: int) -> int:
        """Windows of `steps` timesteps in one pass: whole ones only if cyclic, else enough to score every token."""
        return self.lane_len // steps if self.cyclic else -(-self.lane_len // steps)

    def window(
        self, start: int, steps: int, lane_B: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """input_BS and target_BS (int64), valid_BS (bool) at positions start .. start + steps - 1 of lanes `lane_B`.

        Padding has valid False and input and target 0. Raises ValueError for a lane outside 0 .. num_lanes - 1.
        """
        lane_B = np.asarray(lane_B, dtype=np.int64)
        if ((lane_B < 0) | (lane_B >= self.num_lanes)).any():
            raise ValueError(
                f"lanes {lane_B.tolist()} are not all within 0 .. {self.num_lanes - 1}"
            )
        position_S = np.arange(start, start + steps)
        index_BS = lane_B[:, None] * self.lane_len + position_S
        num_tokens = len(self.token_N)
        if self.cyclic:
            valid_BS = np.ones_like(index_BS, dtype=bool)
        else:
            valid_BS = (position_S < self.lane_len) & (index_BS < num_tokens - 1)
        input_BS = np.where(valid_BS, self.token_N[index_BS % num_tokens], 0)
        target_BS = np.where(valid_BS, self.token_N[(index_BS + 1) % num_tokens], 0)
        return torch.from_numpy(input_BS), torch.from_numpy(target_BS), torch.from_numpy(valid_BS)


def unigram_perplexity(count_V: Sequence[int], test_N: np.ndarray) -> float:
    """Perplexity of the add-one-smoothed unigram of word counts over the targets of `test_N`, its tokens but the first.

    Raises ValueError if `test_N` has no target or a token index is outside the vocabulary.
    """
    if len(test_N) < 2:
        raise ValueError(f"the test stream has {len(test_N)} tokens: at least 2 would do")
    if test_N.max() >= len(count_V):
        raise ValueError(
            f"token {test_N.max()} is outside a vocabulary of {len(count_V)}: {test_N.max() + 1} would do"
        )
    smoothed_V = np.array(count_V) + 1
    log_probability_V = np.log(smoothed_V / smoothed_V.sum())
    return float(np.exp(-log_probability_V[test_N[1:]].mean()))
