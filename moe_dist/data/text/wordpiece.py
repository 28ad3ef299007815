"""Sub-word tokenizer (WordPiece): cuts words into the longest pieces in a vocabulary.

The text is lower-cased, accents of Latin, Greek and Cyrillic letters are removed, and punctuation
marks are separate words, as in uncased BERT. Combining marks in other scripts stay: in Hindi, Thai
and others they are vowels. BERT removes most. ALBERT uses SentencePiece instead (Kudo and
Richardson 2018); WordPiece training gives the same result in every process.

Legend: V vocabulary size, b samples, S tokens per sample.
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
CONTINUATION_PREFIX = "##"  # marks a piece that continues a word
COVERAGE = 0.99995  # part of a text's characters in the alphabet, as for ALBERT's vocabulary
MIN_PAIR_COUNT = 2  # a pair of pieces that occurs less often is not merged
ACCENTS = "[\u0300-\u036f\u0483-\u0487]"  # as combining marks
IGNORE_INDEX = -100  # target of a token without a loss, the default of `F.cross_entropy`
ENCODE_BATCH_SIZE = 1000  # texts


@dataclass(frozen=True)
class WordPieceTokenizer:
    """A WordPiece tokenizer, defined by its list of pieces.

    No text is ever encoded as a special token other than [UNK], even if it contains "[SEP]".

    Attributes:
        words: The pieces by index. The special tokens are 0 .. 4, in the order of `SPECIAL`.
    """

    words: tuple[str, ...]

    @classmethod
    def build(cls, lines: Iterable[str], size: int, exact: bool = True) -> "WordPieceTokenizer":
        """Trains a tokenizer on lines of text, with the same result in every process.

        The lines are read twice, once for the characters and once for the pieces. A progress bar
        appears on stderr if this takes more than two seconds.

        Args:
            lines: The text, which must allow repeated iteration.
            size: The vocabulary size.
            exact: If True, a size that the text does not allow is an error. If False, the
                vocabulary has the nearest size that the text allows.

        Returns:
            The tokenizer.

        Raises:
            ValueError: `exact` is true, and the size is too small for the text's characters or
                larger than the number of pieces in the text.
        """
        tokenizer = _tokenizer({})
        character_counts = Counter[str]()
        for line in with_progress(lines, "characters", " lines"):
            character_counts.update(tokenizer.normalizer.normalize_str(line))
        alphabet = _alphabet(character_counts)
        continuations = _continuations(tokenizer, alphabet)
        min_size = len(SPECIAL) + len(alphabet) + len(continuations)
        if not exact:
            size = max(size, min_size)
        if size < min_size:
            raise ValueError(
                f"model.vocabulary_size={size} is too small for the {len(alphabet)} characters of "
                f"this text: use at least {min_size} ({len(SPECIAL)} special tokens, each "
                "character, and each character that continues a word)"
            )
        # FENCE: the trainer numbers continuation pieces in the order of a hash table, which differs
        # between processes, and it breaks ties between pairs by number. Pieces that are passed as
        # special tokens keep their numbers, so the result is the same in every process.
        # Tried with tokenizers 0.23.3; held by
        # test_training_equals_a_slow_reference_and_is_deterministic.
        trainer = WordPieceTrainer(
            vocab_size=size,
            min_frequency=MIN_PAIR_COUNT,
            special_tokens=[*SPECIAL, *continuations],
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet),
            continuing_subword_prefix=CONTINUATION_PREFIX,
            show_progress=False,
        )
        tokenizer.train_from_iterator(with_progress(lines, "pieces", " lines"), trainer)
        index = tokenizer.get_vocab(with_added_tokens=False)
        if exact and len(index) < size:
            raise ValueError(
                f"model.vocabulary_size={size} is more than this text fills: "
                f"use at most {len(index)}, or give more text"
            )
        return cls(tuple(sorted(index, key=index.__getitem__)))

    @classmethod
    def from_json(cls, text: str) -> "WordPieceTokenizer":
        """Returns the tokenizer that `to_json` wrote.

        Args:
            text: The result of `to_json`.

        Returns:
            The tokenizer.

        Raises:
            ValueError: The text is not the JSON of a tokenizer.
        """
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
        """Returns the pieces as a JSON list."""
        return json.dumps(self.words)

    def __len__(self) -> int:
        """Returns V."""
        return len(self.words)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return _tokenizer({word: index for index, word in enumerate(self.words)})

    @cached_property
    def is_inside_V(self) -> np.ndarray:
        """Marks the tokens that continue a word (bool)."""
        return np.array([word.startswith(CONTINUATION_PREFIX) for word in self.words])

    def encode(self, text: str) -> list[int]:
        """Returns the token indices of a text, without [CLS] and [SEP].

        A word that the pieces cannot form is [UNK].
        """
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Returns the token indices of a text and the characters of each token.

        Args:
            text: The text.

        Returns:
            The indices, and for each token the first character and the end (exclusive) of its part
            of `text`. The part includes removed accents that are separate characters.
        """
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        spans = []
        for (start, end), (limit, _) in pairwise([*encoding.offsets, (len(text), len(text))]):
            while end < limit and unicodedata.category(text[end]).startswith("M"):
                end += 1
            spans.append((start, end))
        return encoding.ids, spans

    def encode_all(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """Yields the token indices of each text (int32), encoded in batches by several threads."""
        remaining = iter(texts)
        while batch := list(islice(remaining, ENCODE_BATCH_SIZE)):
            encodings: list[Encoding] = self._tokenizer.encode_batch_fast(
                batch, add_special_tokens=False
            )
            for encoding in encodings:
                yield np.array(encoding.ids, dtype=np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the words of token indices, joined by spaces, with the special tokens.

        Letter case, accents and spaces of the original text are lost.
        """
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)


def join_segments(a: np.ndarray, b: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Adds the special tokens: [CLS] a [SEP], or [CLS] a [SEP] b [SEP].

    Args:
        a: The tokens of the first segment.
        b: The tokens of the second segment, or None.

    Returns:
        token_S, and the token type kind_S: 0 up to the first [SEP], then 1 (both int64).
    """
    parts: list[Any] = [[CLS], a, [SEP]]
    if b is not None:
        parts += [b, [SEP]]
    token_S = np.concatenate(parts, dtype=np.int64)
    kind_S = np.zeros_like(token_S)
    kind_S[len(a) + 2 :] = 1
    return token_S, kind_S


def pad_and_stack(
    samples: Iterable[tuple[np.ndarray, np.ndarray]], width: int
) -> tuple[torch.Tensor, ...]:
    """Pads samples to the same width and stacks them.

    Args:
        samples: The tokens and kinds of each sample, as `join_segments` returns them.
        width: S; no sample is longer.

    Returns:
        token_bS and kind_bS (int64), and valid_bS (bool). Padding is [PAD], kind 0 and False.
    """
    rows = list(samples)
    token_bS = np.full((len(rows), width), PAD)
    kind_bS = np.zeros((len(rows), width), dtype=np.int64)
    valid_bS = np.zeros((len(rows), width), dtype=bool)
    for i, (token_s, kind_s) in enumerate(rows):
        length = len(token_s)
        token_bS[i, :length] = token_s
        kind_bS[i, :length] = kind_s
        valid_bS[i, :length] = True
    return torch.from_numpy(token_bS), torch.from_numpy(kind_bS), torch.from_numpy(valid_bS)


# the tokens and kinds of a sample that is padding only
PADDING_SAMPLE = (np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))


def _tokenizer(index: dict[str, int]) -> Tokenizer:
    """Returns the library's tokenizer for a vocabulary.

    The special tokens are not registered as added tokens, because the library would then find them
    inside texts.
    """
    model = WordPiece(index, unk_token=SPECIAL[UNK], continuing_subword_prefix=CONTINUATION_PREFIX)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = Normalizers(
        [
            # zero-width space: separates words in Thai, Khmer and other scripts
            Replace("\u200b", " "),
            BertNormalizer(lowercase=True, strip_accents=False),
            NFD(),
            Replace(Regex(ACCENTS), ""),
        ]
    )
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=CONTINUATION_PREFIX, cleanup=False)
    return tokenizer


def _continuations(tokenizer: Tokenizer, alphabet: Iterable[str]) -> list[str]:
    """Returns a piece for each character of the alphabet that can continue a word."""
    pieces = []
    for character in alphabet:
        if len(tokenizer.pre_tokenizer.pre_tokenize_str("a" + character)) == 1:
            pieces.append(CONTINUATION_PREFIX + character)
    return pieces


def _alphabet(counts: Counter[str]) -> list[str]:
    """Returns the most frequent characters, in code point order, that cover `COVERAGE` of a text.

    Characters of the same frequency are chosen in code point order. Removes white space from
    `counts`.
    """
    for space in [character for character in counts if character.isspace()]:
        del counts[space]
    required = COVERAGE * counts.total()
    covered = 0
    alphabet = []
    for character in sorted(counts, key=lambda c: (-counts[c], c)):
        if covered >= required:
            break
        covered += counts[character]
        alphabet.append(character)
    return sorted(alphabet)
