"""Pre-training samples for text encoders: masked words and sentence order (Lan et al. 2020, 3.1).

    [CLS] a [SEP] b [SEP]      a and b: adjacent runs of lines, swapped in half of the samples

15 % of the tokens in a and b are prediction targets. 80 % of the targets are replaced by [MASK],
10 % by a random word, and 10 % stay (Devlin et al. 2019, Section 3.1). ALBERT masks n-grams; here
tokens are masked one by one.

Each line is assumed to continue the line before it. In a text with unordered lines, such as lm1b,
the sentence order cannot be learned.

Legend: N tokens in the text, P line pieces, M segments, B samples per step over all ranks,
b requested samples, S tokens per sample, V vocabulary, k target tokens per sample.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from moe_dist.data.sampling import SampleOrder
from moe_dist.data.text.wordpiece import (
    IGNORE_INDEX,
    MASK,
    PADDING_SAMPLE,
    SPECIAL,
    WordPieceTokenizer,
    join_segments,
    pad_and_stack,
)
from moe_dist.nn.prng import uniform

MLM_FRACTION = 0.15  # of the tokens are targets
MASK_FRACTION = 0.8  # of the targets become [MASK] ...
RANDOM_FRACTION = 0.1  # ... and this part a random word; the rest stays
NUM_MARKERS = 3  # [CLS] and two [SEP]
MIN_TOKENS = NUM_MARKERS + 2  # [CLS] a [SEP] b [SEP]


class Pretraining:
    """The pre-training samples for one split.

    The text is cut into segments once. An epoch has each segment once. The sample order,
    the boundary between a and b, the swap and the masks follow from seed, epoch and segment. In
    evaluation all of these follow from the segment alone.

    Attributes:
        tokens: The tokenizer.
        seed: The seed for order and masks; None for evaluation.
        token_N: The tokens in the text.
        piece_P1: The first token of each piece in token_N, and the end of the last piece.
        first_M1: The first piece of each segment, and the end of the last segment.
        order: The sample order.
        num_batches: The steps per epoch.
    """

    def __init__(
        self,
        lines: Iterable[str],
        tokens: WordPieceTokenizer,
        max_tokens: int,
        global_batch_size: int,
        seed: int | None = None,
    ) -> None:
        """Tokenizes the text and cuts it into segments.

        A line longer than half a sample is cut into parts with about equal length, so two parts
        always fit and no token is lost. A last part without a second part is left out.

        Args:
            lines: The text.
            tokens: The tokenizer.
            max_tokens: The maximum number of tokens per sample.
            global_batch_size: B.
            seed: The seed for order and masks; None for evaluation.

        Raises:
            ValueError: The text has fewer than two lines with tokens, or `max_tokens` is too small.
        """
        if max_tokens < MIN_TOKENS:
            raise ValueError(
                f"model.max_tokens={max_tokens}: use at least {MIN_TOKENS}, "
                "for [CLS] a [SEP] b [SEP]"
            )
        self.tokens = tokens
        self.seed = seed
        max_text_tokens = max_tokens - NUM_MARKERS
        pieces: list[np.ndarray] = []
        for line in tokens.encode_all(lines):
            pieces += _pieces(line, max_text_tokens // 2, tokens.is_inside_V)
        if len(pieces) < 2:
            raise ValueError(
                f"a split of data.text has {len(pieces)} lines with any token: give at least 2"
            )
        token_dtype = np.uint16 if len(tokens) <= 2**16 else np.int32
        self.token_N = np.concatenate(pieces).astype(token_dtype)
        self.piece_P1 = np.cumsum([0, *map(len, pieces)])
        self.first_M1 = _segments(self.piece_P1, max_text_tokens)
        length_M = np.diff(self.piece_P1[self.first_M1]) + NUM_MARKERS
        self.order = SampleOrder(length_M, global_batch_size, seed)
        self.num_batches = self.order.num_steps

    def batch(self, step: int, samples: range) -> tuple[torch.Tensor, ...]:
        """Returns the requested samples.

        Args:
            step: The step, from 0 on.
            samples: The requested samples, within 0 .. B - 1.

        Returns:
            token_bS and kind_bS (int64, see `wordpiece.join_segments`); valid_bS (bool); target_bS
            (int64), the original token of each target, -100 elsewhere; order_b (int64), 1 if a and
            b are swapped, as in ALBERT, 0 if not, -100 for padding.
        """
        epoch_b, index_b, width = self.order.select(step, samples)
        target_bS = np.full((len(index_b), width), IGNORE_INDEX)
        order_b = np.full(len(index_b), IGNORE_INDEX)
        rows = []
        for i, (epoch, index) in enumerate(zip(epoch_b.tolist(), index_b.tolist(), strict=True)):
            if index < 0:
                rows.append(PADDING_SAMPLE)
                continue
            token_S, kind_S, target_S, swapped = self._sample(epoch, index)
            target_bS[i, : len(target_S)] = target_S
            order_b[i] = swapped
            rows.append((token_S, kind_S))
        return (
            *pad_and_stack(rows, width),
            torch.from_numpy(target_bS),
            torch.from_numpy(order_b),
        )

    def _sample(self, epoch: int, segment: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
        """Returns token_S, kind_S, target_S and whether a and b are swapped."""
        begin_P1 = self.piece_P1[self.first_M1[segment] : self.first_M1[segment + 1] + 1]
        num_pieces = len(begin_P1) - 1
        num_tokens = begin_P1[-1] - begin_P1[0]
        key = ("pretraining", str(self.seed), epoch, segment)
        uniforms = uniform(2 + 3 * num_tokens, *key).numpy()
        boundary = begin_P1[1 + int(uniforms[0] * (num_pieces - 1))]
        a = self.token_N[begin_P1[0] : boundary]
        b = self.token_N[boundary : begin_P1[-1]]
        swapped = bool(uniforms[1] < 0.5)
        token_S, kind_S = join_segments(b, a) if swapped else join_segments(a, b)
        target_S = self._mask(token_S, uniforms[2:].reshape(3, num_tokens))
        return token_S, kind_S, target_S, swapped

    def _mask(self, token_S: np.ndarray, uniform_3n: np.ndarray) -> np.ndarray:
        """Chooses the targets, replaces them in `token_S` in place, and returns target_S."""
        place_n, action_n, word_n = uniform_3n
        # Special tokens are no targets; [UNK] is among them.
        (text_n,) = np.nonzero(token_S >= len(SPECIAL))
        num_targets = max(1, round(MLM_FRACTION * len(text_n)))
        target_k = text_n[np.argsort(place_n[: len(text_n)], kind="stable")[:num_targets]]
        target_S = np.full_like(token_S, IGNORE_INDEX)
        target_S[target_k] = token_S[target_k]
        action_k = action_n[: len(target_k)]
        num_words = len(self.tokens) - len(SPECIAL)
        random_k = len(SPECIAL) + (word_n[: len(target_k)] * num_words).astype(np.int64)
        token_S[target_k] = np.select(
            [action_k < MASK_FRACTION, action_k < MASK_FRACTION + RANDOM_FRACTION],
            [MASK, random_k],
            token_S[target_k],
        )
        return target_S


def _pieces(line: np.ndarray, max_tokens: int, is_inside_V: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the parts of a line, each of at most `max_tokens` tokens.

    A part begins at the start of a word, unless a word is longer than `max_tokens`.
    """
    while len(line) > max_tokens:
        num_parts = -(-len(line) // max_tokens)
        stop = -(-len(line) // num_parts)
        word_starts = np.nonzero(~is_inside_V[line[1 : stop + 1]])[0] + 1
        cut = word_starts[-1] if len(word_starts) else stop
        yield line[:cut]
        line = line[cut:]
    if len(line):
        yield line


def _segments(piece_P1: np.ndarray, max_tokens: int) -> np.ndarray:
    """Returns first_M1: each segment has as many pieces as fit into `max_tokens` tokens.

    These are at least two, because no piece is longer than half of `max_tokens`.
    """
    first = [0]
    while first[-1] < len(piece_P1) - 2:
        end_token = piece_P1[first[-1]] + max_tokens
        first.append(int(np.searchsorted(piece_P1, end_token, side="right")) - 1)
    return np.array(first)
