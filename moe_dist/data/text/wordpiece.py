"""Sub-word tokens (WordPiece): words cut into the longest pieces that a vocabulary has.

Text is lower-cased, accents of Latin, Greek and Cyrillic letters are dropped and punctuation stands
alone, as in uncased BERT. Marks of other scripts stay, of which BERT drops most: in Hindi, Thai and
others they are vowels. ALBERT's own pieces are SentencePiece's (Kudo and Richardson 2018);
WordPiece's can be found the same in every process.

Legend: b samples, S tokens of each.
"""

import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, pairwise
from typing import Any

import numpy as np
import torch
from tokenizers import Encoding, Regex, Tokenizer, decoders
from tokenizers.models import WordPiece
from tokenizers.normalizers import NFD, BertNormalizer, Replace
from tokenizers.normalizers import Sequence as Normalizers
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.trainers import WordPieceTrainer

from moe_dist.monitoring.progress_bar import with_progress

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD, UNK, CLS, SEP, MASK = range(len(SPECIAL))
INSIDE = "##"  # before a piece that goes on with a word
COVERAGE = 0.99995  # of a text's characters, the most frequent ones: what ALBERT's vocabulary was made with
LEAST_COUNT = 2  # of a pair of pieces that is made one
ACCENTS = "[\u0300-\u036f\u0483-\u0487]"  # as marks of their own
IGNORE_INDEX = -100  # the target of what is not to be told: `F.cross_entropy` passes over it


@dataclass(frozen=True)
class WordPieceTokenizer:
    """Pieces by index: the special ones are 0 .. 4, in the order of SPECIAL. No text is ever read as a special one but
    [UNK], even where it says "[SEP]"."""

    words: tuple[str, ...]

    @classmethod
    def build(cls, lines: Iterable[str], size: int, exact: bool = True) -> "WordPieceTokenizer":
        """Builds tokens for `lines`, the same in every process. Reads the lines twice, for characters and for pieces;
        the progress is shown on stderr where it takes more than two seconds.

        Args:
            lines: The text.
            size: Number of tokens.
            exact: Whether a size that is too small for the text's characters, or more than the text fills, is an
                error. Otherwise the size is the nearest one that the text allows.

        Raises:
            ValueError: `exact`, and the text does not allow this size.
        """
        tokenizer, count = _tokenizer({}), Counter[str]()
        for line in with_progress(lines, "characters", " lines"):
            count.update(tokenizer.normalizer.normalize_str(line))
        alphabet = _alphabet(count)
        # The trainer numbers pieces inside a word as it meets them in a hash table, which is in another order in every
        # process, and ties between pairs go by number. Those that it is given first keep their number.
        inside = [
            INSIDE + c
            for c in alphabet
            if len(tokenizer.pre_tokenizer.pre_tokenize_str("a" + c)) == 1
        ]
        least = len(SPECIAL) + len(alphabet) + len(inside)
        if not exact:
            size = max(size, least)
        if size < least:
            raise ValueError(
                f"model.vocabulary_size={size} is too small for the {len(alphabet)} characters of this text: at least "
                f"{least} would do ({len(SPECIAL)} special tokens, each character, and those that go on with a word)"
            )
        trainer = WordPieceTrainer(
            vocab_size=size,
            min_frequency=LEAST_COUNT,
            special_tokens=[*SPECIAL, *inside],
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet),
            continuing_subword_prefix=INSIDE,
            show_progress=False,
        )
        tokenizer.train_from_iterator(with_progress(lines, "pieces", " lines"), trainer)
        index = tokenizer.get_vocab(with_added_tokens=False)
        if exact and len(index) < size:
            raise ValueError(
                f"model.vocabulary_size={size} is more than this text fills: at most {len(index)} would do, or more "
                f"text"
            )
        return cls(tuple(sorted(index, key=index.__getitem__)))

    @classmethod
    def from_json(cls, text: str) -> "WordPieceTokenizer":
        """Inverse of `to_json`. Raises ValueError for text that holds no tokens."""
        try:
            words = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"tokens: no JSON ({error})") from None
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError("tokens: not a list of words, as WordPieceTokenizer.to_json writes")
        if tuple(words[: len(SPECIAL)]) != SPECIAL or len(set(words)) < len(words):
            raise ValueError(
                f"tokens: the first are not {', '.join(SPECIAL)}, or some word is there twice"
            )
        return cls(tuple(words))

    def to_json(self) -> str:
        return json.dumps(self.words)

    def __len__(self) -> int:
        return len(self.words)

    @cached_property
    def _whole(self) -> Tokenizer:
        return _tokenizer({word: index for index, word in enumerate(self.words)})

    @cached_property
    def is_inside_V(self) -> np.ndarray:
        """Which tokens go on with a word (bool)."""
        return np.array([word.startswith(INSIDE) for word in self.words])

    def encode(self, text: str) -> list[int]:
        """Token indices. What the vocabulary has no pieces for is [UNK]; no special token is added."""
        return self._whole.encode(text, add_special_tokens=False).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Returns token indices, and the characters of `text` that each stands for: from the first to before the
        second, with the accents that are characters of their own and were dropped."""
        encoding = self._whole.encode(text, add_special_tokens=False)
        spans = []
        for (start, end), (limit, _) in pairwise([*encoding.offsets, (len(text), len(text))]):
            while end < limit and unicodedata.category(text[end]).startswith("M"):
                end += 1
            spans.append((start, end))
        return encoding.ids, spans

    def encode_all(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """The tokens of each text (int32), a thousand texts at a time, by as many threads as there are."""
        rest = iter(texts)
        while some := list(islice(rest, 1000)):
            encodings: list[Encoding] = self._whole.encode_batch_fast(
                some, add_special_tokens=False
            )
            for encoding in encodings:
                yield np.array(encoding.ids, dtype=np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """Words joined by spaces, the special ones too. Lower case, accents and spaces are as `encode` saw them."""
        return self._whole.decode(list(ids), skip_special_tokens=False)


def join_segments(a: np.ndarray, b: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """[CLS] a [SEP], or [CLS] a [SEP] b [SEP] -> tokens, and their kinds: 0 up to the first [SEP], then 1 (int64)."""
    parts: list[Any] = [[CLS], a, [SEP]] if b is None else [[CLS], a, [SEP], b, [SEP]]
    token_S = np.concatenate(parts, dtype=np.int64)
    kind_S = np.zeros_like(token_S)
    kind_S[len(a) + 2 :] = 1
    return token_S, kind_S


def pad_and_stack(
    samples: Iterable[tuple[np.ndarray, np.ndarray]], width: int
) -> tuple[torch.Tensor, ...]:
    """Tokens and kinds of each sample, at most `width` -> token_bS, kind_bS (int64), valid_bS (bool). Behind a sample's
    end are [PAD], kind 0 and False."""
    rows = list(samples)
    token_bS, kind_bS = (
        np.full((len(rows), width), PAD),
        np.zeros((len(rows), width), dtype=np.int64),
    )
    valid_bS = np.zeros((len(rows), width), dtype=bool)
    for i, (token_s, kind_s) in enumerate(rows):
        token_bS[i, : len(token_s)], kind_bS[i, : len(token_s)], valid_bS[i, : len(token_s)] = (
            token_s,
            kind_s,
            True,
        )
    return torch.from_numpy(token_bS), torch.from_numpy(kind_bS), torch.from_numpy(valid_bS)


PADDING_SAMPLE = (
    np.empty(0, dtype=np.int64),
    np.empty(0, dtype=np.int64),
)  # the tokens and kinds of a sample of padding


def _tokenizer(index: dict[str, int]) -> Tokenizer:
    # Special tokens are left out of its list of added ones, which it would look for in every text.
    tokenizer = Tokenizer(
        WordPiece(index, unk_token=SPECIAL[UNK], continuing_subword_prefix=INSIDE)
    )
    tokenizer.normalizer = Normalizers(
        [
            Replace("\u200b", " "),  # zero width space: Thai, Khmer and others divide words with it
            BertNormalizer(lowercase=True, strip_accents=False),
            NFD(),
            Replace(Regex(ACCENTS), ""),
        ]
    )
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=INSIDE, cleanup=False)
    return tokenizer


def _alphabet(count: Counter[str]) -> list[str]:
    """The most frequent characters that make up COVERAGE of all; ties go by the character. In order of their number."""
    for space in [c for c in count if c.isspace()]:
        del count[space]
    least, covered, kept = COVERAGE * count.total(), 0, []
    for character in sorted(count, key=lambda c: (-count[c], c)):
        if covered >= least:
            break
        covered += count[character]
        kept.append(character)
    return sorted(kept)
