"""Text for language modelling: lines, tokens, a vocabulary, and lanes of one long token stream.

Dimensions: N tokens in a stream, B lanes, S timesteps.
"""

import glob
import lzma
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

SPLITS = ("train", "valid", "test")
UNK, EOS = "<unk>", "<eos>"
UNK_ID, EOS_ID = 0, 1
# "<unk>" stays whole, because published corpora often come with their rare words already replaced by it.
TOKEN = re.compile(r"<unk>|\w+(?:['\u2019]\w+)*|--|[^\w\s]")
MIN_LINES = 20  # the fewest lines of which 5 % are one whole line


def read_lines(source: str, split: str) -> list[str]:
    """Non-empty stripped lines of one split ("train", "valid" or "test").

    `source` "embedded" is the bundled corpus, split by whole books and plays. Any other source is a path or a glob of
    UTF-8 text files, read in sorted order; the first 90 % of their lines are train, the next 5 % valid, the last 5 %
    test. Raises ValueError for an unknown split, no matching file, a file that is not text, or fewer than 20 lines.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown: give one of {', '.join(SPLITS)}")
    if source == "embedded":
        packed = (Path(__file__).parent / "embedded" / f"{split}.txt.xz").read_bytes()
        return _non_empty(lzma.decompress(packed).decode())
    # A path that exists is taken literally, so that names holding [ or * need no escaping.
    names = [source] if Path(source).is_file() else sorted(glob.glob(source, recursive=True))
    paths = [path for path in map(Path, names) if path.is_file()]
    if not paths:
        raise ValueError(f"no file matches {source!r}: give 'embedded', a text file or a glob such as 'corpus/*.txt'")
    lines = [line for path in paths for line in _non_empty(_read_utf8(path))]
    if not lines:
        raise ValueError(f"{source!r} is empty: give files with at least {MIN_LINES} lines of text")
    if len(lines) < MIN_LINES:
        raise ValueError(f"{source!r} has {len(lines)} lines, too few to split: give at least {MIN_LINES}")
    cuts = [len(lines) * percent // 100 for percent in (0, 90, 95, 100)]
    which = SPLITS.index(split)
    return lines[cuts[which] : cuts[which + 1]]


def _read_utf8(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not UTF-8 text ({error}): give plain text files") from error
    if "\0" in text:  # bytes below 128 are all valid UTF-8, yet text holds no NUL
        raise ValueError(f"{str(path)!r} is not UTF-8 text (it holds a NUL byte): give plain text files")
    return text


def _non_empty(text: str) -> list[str]:
    return [stripped for line in text.split("\n") if (stripped := line.strip())]


def tokenize(line: str) -> list[str]:
    """Words (case kept, inner apostrophes kept: "don't"), "--" and single punctuation marks, in order."""
    return TOKEN.findall(line)


@dataclass(frozen=True)
class Vocabulary:
    """Words by index: 0 is `<unk>`, 1 is `<eos>` (end of a line), then the most frequent words first."""

    words: tuple[str, ...]

    @classmethod
    def build(cls, lines: Iterable[str], size: int) -> "Vocabulary":
        """The `size - 2` most frequent words of `lines` behind `<unk>` and `<eos>`; ties go by the word.

        Raises ValueError if `lines` hold fewer different words than that, or `size` leaves room for none.
        """
        counts = Counter(word for line in lines for word in tokenize(line))
        counts.pop(UNK, None)
        if not 3 <= size <= len(counts) + 2:
            raise ValueError(
                f"data.vocabulary_size={size} does not fit {len(counts)} different words: "
                f"at least 3 and at most {len(counts) + 2} (2 places are {UNK} and {EOS}) would do"
            )
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        return cls((UNK, EOS, *ranked[: size - 2]))

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
                f"the stream has {len(token_N)} tokens, too few for {num_lanes} lanes: at least {needed} would do"
            )
        self.token_N, self.num_lanes, self.cyclic = token_N, num_lanes, cyclic
        self.lane_len = len(token_N) // num_lanes if cyclic else -(-(len(token_N) - 1) // num_lanes)

    def num_windows(self, steps: int) -> int:
        """Windows of `steps` timesteps in one pass: whole ones only if cyclic, else enough to score every token."""
        return self.lane_len // steps if self.cyclic else -(-self.lane_len // steps)

    def window(self, start: int, steps: int, lane_B: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """input_BS and target_BS (int64), valid_BS (bool) at positions start .. start + steps - 1 of lanes `lane_B`.

        Padding has valid False and input and target 0. Raises ValueError for a lane outside 0 .. num_lanes - 1.
        """
        lane_B = np.asarray(lane_B, dtype=np.int64)
        if ((lane_B < 0) | (lane_B >= self.num_lanes)).any():
            raise ValueError(f"lanes {lane_B.tolist()} are not all within 0 .. {self.num_lanes - 1}")
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


def unigram_perplexity(train_N: np.ndarray, test_N: np.ndarray, vocabulary_size: int) -> float:
    """Perplexity of the add-one-smoothed unigram of `train_N` over the targets of `test_N`, its tokens but the first.

    Raises ValueError if `test_N` has no target or a token index is outside the vocabulary.
    """
    if len(test_N) < 2:
        raise ValueError(f"the test stream has {len(test_N)} tokens: at least 2 would do")
    highest = max(train_N.max(initial=0), test_N.max())
    if highest >= vocabulary_size:
        raise ValueError(f"token {highest} is outside a vocabulary of {vocabulary_size}: {highest + 1} would do")
    count_V = np.bincount(train_N, minlength=vocabulary_size) + 1
    log_probability_V = np.log(count_V / count_V.sum())
    return float(np.exp(-log_probability_V[test_N[1:]].mean()))
