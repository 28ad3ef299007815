"""Text for language modelling: tokenizer, vocabulary, and lanes cut from one long token stream.

Legend: N tokens in a stream, V words in the vocabulary, B lanes, S timesteps.
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
# Characters without a visible form: soft hyphen, word joiner and similar ones, and direction marks.
INVISIBLE = dict.fromkeys(
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
INVISIBLE[0x200B] = " "  # zero-width space: separates words in Thai, Khmer and other scripts
JOINERS = "\u200c\u200d"  # inside a word they control how letters join


def _character_ranges(category: str) -> str:
    """Returns the characters of a Unicode category as ranges of a regular expression class."""
    ranges: list[list[int]] = []
    # Behind these two blocks there are only variation selectors.
    for code in (*range(0x20000), *range(0xE0100, 0xE01F0)):
        if not unicodedata.category(chr(code)).startswith(category):
            continue
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(f"{chr(first)}-{chr(last)}" for first, last in ranges)


@cache
def _unicode_token() -> re.Pattern[str]:
    r"""Returns the pattern of one token of a text that is not ASCII.

    "<unk>" stays one token, because published corpora often have their rare words already replaced
    by it. A combining mark is not in `\w`, so the pattern attaches it to the preceding letter or
    sign.
    """
    mark = _character_ranges("M")
    word = rf"[\w{mark}][\w{mark}{JOINERS}]*"
    sign = rf"[^\w\s{mark}{JOINERS}][{mark}]*"
    return re.compile(rf"<unk>|{word}(?:['\u2019]{word})*|--|{sign}(?:\u200d{sign})*")


def tokenize(line: str) -> list[str]:
    """Splits a line into words, "--" and single punctuation marks, in order.

    Words keep their case and their inner apostrophes ("don't"). The text is first brought to its
    composed form (NFC), and invisible characters are removed.
    """
    if line.isascii():
        return ASCII_TOKEN.findall(line)
    return _unicode_token().findall(unicodedata.normalize("NFC", line.translate(INVISIBLE)))


@dataclass(frozen=True)
class Vocabulary:
    """A word vocabulary: index 0 is `<unk>`, 1 is `<eos>` (end of line), then words by frequency.

    Attributes:
        words: The words by index, the most frequent first.
        counts: How often each word occurs in the lines from which the vocabulary was built. The
            `<unk>` count is for all words outside the vocabulary; the `<eos>` count is the number
            of lines.
    """

    words: tuple[str, ...]
    counts: tuple[int, ...]

    @classmethod
    def build(cls, lines: Iterable[str], size: int, exact: bool = True) -> "Vocabulary":
        """Builds a vocabulary from the most frequent words in one pass over the lines.

        Words with the same frequency are ordered alphabetically. A progress bar appears on stderr
        if the pass takes more than two seconds.

        Args:
            lines: The text.
            size: The number of words, `<unk>` and `<eos>` included.
            exact: If True, fewer different words are an error. If False, the vocabulary is smaller.

        Returns:
            The vocabulary.

        Raises:
            ValueError: The lines have too few different words, or `size` is less than 3.
        """
        counts: Counter[str] = Counter()
        num_lines = 0
        for line in with_progress(lines, "vocabulary", " lines"):
            counts.update(tokenize(line))
            num_lines += 1
        num_words = counts.total()
        counts.pop(UNK, None)
        max_size = len(counts) + 2
        if not exact and counts:
            size = min(size, max_size)
        if not 3 <= size <= max_size:
            raise ValueError(
                f"data.vocabulary_size={size} does not fit {len(counts)} different words: "
                f"use at least 3 and at most {max_size} (2 places are {UNK} and {EOS})"
            )
        kept_words = sorted(counts, key=lambda word: (-counts[word], word))[: size - 2]
        kept_counts = [counts[word] for word in kept_words]
        num_unknown = num_words - sum(kept_counts)
        return cls((UNK, EOS, *kept_words), (num_unknown, num_lines, *kept_counts))

    def __len__(self) -> int:
        """Returns V."""
        return len(self.words)

    @cached_property
    def _index(self) -> dict[str, int]:
        return {word: index for index, word in enumerate(self.words)}

    def encode(self, lines: Iterable[str]) -> np.ndarray:
        """Returns all lines as one token stream (int64, [N]), with `<eos>` after each line."""
        get = self._index.get
        ids: list[int] = []
        for line in lines:
            ids += [get(word, UNK_ID) for word in tokenize(line)]
            ids.append(EOS_ID)
        return np.array(ids, dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the words of token indices, joined by spaces."""
        return " ".join(self.words[index] for index in ids)


class Lanes:
    """A token stream cut into B global lanes, each of which is read in order with its own state.

    A lane's rank and micro-batch follow from its index alone, so a window's tokens do not depend on
    the layout.

    Cyclic lanes (training): `lane_len = N // B`, and position p of lane b is token
    (b * lane_len + p) mod N. At its end a lane continues with the text of the next lane, so a new
    pass needs no reset of the state and no padding.

    Lanes that are not cyclic (evaluation): the N - 1 (input, target) pairs are cut into lanes of
    `lane_len = ceil((N - 1) / B)`, so each token but the first is a target exactly once. Positions
    after the end are padding.

    Attributes:
        token_N: The token stream (int64).
        num_lanes: B.
        cyclic: True for training, False for evaluation.
        lane_len: The positions per lane.
    """

    def __init__(self, token_N: np.ndarray, num_lanes: int, cyclic: bool) -> None:
        """Cuts the stream.

        Args:
            token_N: The token stream (int64).
            num_lanes: B.
            cyclic: True for training, False for evaluation.

        Raises:
            ValueError: `num_lanes` is less than 1, or the stream has too few tokens for one step.
        """
        if num_lanes < 1:
            raise ValueError(f"num_lanes={num_lanes}: use at least 1")
        min_tokens = num_lanes if cyclic else 2
        num_tokens = len(token_N)
        if num_tokens < min_tokens:
            raise ValueError(
                f"a split of data.text has {num_tokens} tokens, too few for {num_lanes} lanes: "
                f"give at least {min_tokens}, or use a smaller batch.global_batch_size"
            )
        self.token_N = token_N
        self.num_lanes = num_lanes
        self.cyclic = cyclic
        self.lane_len = num_tokens // num_lanes if cyclic else -(-(num_tokens - 1) // num_lanes)

    def num_windows(self, steps: int) -> int:
        """Returns the number of windows in one pass, each with `steps` timesteps.

        Cyclic lanes count complete windows only; other lanes count enough windows to score every
        token.
        """
        return self.lane_len // steps if self.cyclic else -(-self.lane_len // steps)

    def window(
        self, start: int, steps: int, lane_B: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns tokens from some lanes at consecutive positions.

        Args:
            start: The first position.
            steps: S.
            lane_B: The lanes to read (integers).

        Returns:
            input_BS and target_BS (int64), and valid_BS (bool). Padding is False in valid_BS and 0
            in the other two.

        Raises:
            ValueError: A lane is outside 0 .. num_lanes - 1.
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
    """Returns the perplexity of the add-one-smoothed unigram model on a test stream.

    Args:
        count_V: The count of each word in the training text.
        test_N: The test stream (int64). All its tokens but the first are targets.

    Returns:
        The perplexity per target.

    Raises:
        ValueError: `test_N` has no target, or a token index is outside the vocabulary.
    """
    if len(test_N) < 2:
        raise ValueError(f"the test stream has {len(test_N)} tokens: give at least 2")
    if test_N.max() >= len(count_V):
        raise ValueError(
            f"token {test_N.max()} is outside a vocabulary of {len(count_V)} words: "
            f"use at least {test_N.max() + 1}"
        )
    smoothed_V = np.array(count_V) + 1
    log_probability_V = np.log(smoothed_V / smoothed_V.sum())
    return float(np.exp(-log_probability_V[test_N[1:]].mean()))
