"""Pre-training of text encoders from any text: masked words, and whether two runs of lines are in order (Lan et al.
2020, Section 3.1).

    [CLS] a [SEP] b [SEP]          a and b: neighbouring runs of lines, swapped in half of the samples

15 % of the tokens of a and b are to be told. Of them 80 % are [MASK], 10 % any word and 10 % themselves (Devlin et al.
2019, Section 3.1). ALBERT masks n-grams; here tokens are masked one by one.

Lines are taken to go on where the one before ended: a text whose lines come in no order, such as lm1b, has no order to
be found.

Legend: N tokens of a text, P pieces of lines, M segments, B samples of a step over all ranks, b of them, S tokens of
each.
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

MLM_FRACTION = 0.15  # of the tokens
MASKED, RANDOM = 0.8, 0.1  # of those, the rest stays
LEAST_TOKENS = 5  # of a sample: [CLS] a [SEP] b [SEP]


class Pretraining:
    """Samples of one split. The text is cut into segments once; an epoch has each of them once, in an order, with a
    place between a and b, swapped or not, and with masks that follow from seed, epoch and segment. In evaluation all of
    this follows from the segment alone."""

    def __init__(
        self,
        lines: Iterable[str],
        tokens: WordPieceTokenizer,
        max_tokens: int,
        global_batch_size: int,
        seed: int | None = None,
    ) -> None:
        """`global_batch_size`: B. `seed`: None for evaluation.

        A line that is longer than half a sample is cut into parts of about equal length, so that two always fit and
        nothing is lost. A last part that has no other beside it is left out. Raises ValueError for fewer than two
        lines, or `max_tokens` that hold no sample.
        """
        if max_tokens < LEAST_TOKENS:
            raise ValueError(
                f"model.max_tokens={max_tokens}: at least {LEAST_TOKENS}, for [CLS] a [SEP] b [SEP]"
            )
        self.tokens, self.seed = tokens, seed
        room = max_tokens - 3
        pieces = [
            piece
            for line in tokens.encode_all(lines)
            for piece in _pieces(line, room // 2, tokens.is_inside_V)
        ]
        if len(pieces) < 2:
            raise ValueError(
                f"a split of data.text has {len(pieces)} lines with any token: at least 2 would do"
            )
        self.token_N = np.concatenate(pieces).astype(
            np.uint16 if len(tokens) <= 2**16 else np.int32
        )
        self.piece_P1 = np.cumsum(
            [0, *map(len, pieces)]
        )  # where each begins, and the end of the last
        self.first_M1 = _segments(
            self.piece_P1, room
        )  # piece that each begins with, and the end of the last
        self.order = SampleOrder(np.diff(self.piece_P1[self.first_M1]) + 3, global_batch_size, seed)
        self.num_batches = self.order.num_steps  # of an epoch

    def batch(self, step: int, samples: range) -> tuple[torch.Tensor, ...]:
        """Samples of a step -> token_bS, kind_bS (int64), valid_bS (bool), target_bS (int64, the true word where it is
        to be told, else -100), order_b (int64, 1 where a and b are swapped, as in ALBERT; -100 for padding)."""
        epoch_b, index_b, width = self.order.select(step, samples)
        target_bS, order_b = (
            np.full((len(index_b), width), IGNORE_INDEX),
            np.full(len(index_b), IGNORE_INDEX),
        )
        rows = []
        for i, (epoch, index) in enumerate(zip(epoch_b.tolist(), index_b.tolist(), strict=True)):
            if index < 0:
                rows.append(PADDING_SAMPLE)
                continue
            token_s, kind_s, target_s, order_b[i] = self._sample(epoch, index)
            target_bS[i, : len(target_s)] = target_s
            rows.append((token_s, kind_s))
        return *pad_and_stack(rows, width), torch.from_numpy(target_bS), torch.from_numpy(order_b)

    def _sample(self, epoch: int, segment: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
        begin_p1 = self.piece_P1[self.first_M1[segment] : self.first_M1[segment + 1] + 1]
        num_pieces, num_tokens = len(begin_p1) - 1, begin_p1[-1] - begin_p1[0]
        u = uniform(2 + 3 * num_tokens, "pretraining", str(self.seed), epoch, segment).numpy()
        between = begin_p1[1 + int(u[0] * (num_pieces - 1))]
        a, b = self.token_N[begin_p1[0] : between], self.token_N[between : begin_p1[-1]]
        swapped = bool(u[1] < 0.5)
        token_S, kind_S = join_segments(b, a) if swapped else join_segments(a, b)
        place_u, action_u, word_u = u[2:].reshape(3, num_tokens)
        (text_n,) = np.nonzero(token_S >= len(SPECIAL))  # [UNK] is nothing to tell
        told_k = text_n[
            np.argsort(place_u[: len(text_n)], kind="stable")[
                : max(1, round(MLM_FRACTION * len(text_n)))
            ]
        ]
        target_S = np.full_like(token_S, IGNORE_INDEX)
        target_S[told_k] = token_S[told_k]
        action_k, word_k = action_u[: len(told_k)], word_u[: len(told_k)]
        any_k = len(SPECIAL) + (word_k * (len(self.tokens) - len(SPECIAL))).astype(np.int64)
        token_S[told_k] = np.select(
            [action_k < MASKED, action_k < MASKED + RANDOM], [MASK, any_k], token_S[told_k]
        )
        return token_S, kind_S, target_S, swapped


def _pieces(line: np.ndarray, most: int, is_inside_V: np.ndarray) -> Iterator[np.ndarray]:
    """Parts of a line of at most so many tokens, which begin where a word does unless a word is longer than that."""
    while len(line) > most:
        stop = -(-len(line) // -(-len(line) // most))
        words = np.nonzero(~is_inside_V[line[1 : stop + 1]])[0] + 1
        cut = words[-1] if len(words) else stop
        yield line[:cut]
        line = line[cut:]
    if len(line):
        yield line


def _segments(piece_P1: np.ndarray, room: int) -> np.ndarray:
    """As many pieces as fit for each segment, at least two, of which none is longer than half of it."""
    first = [0]
    while first[-1] < len(piece_P1) - 2:
        stop = int(np.searchsorted(piece_P1, piece_P1[first[-1]] + room, side="right")) - 1
        first.append(stop)
    return np.array(first)
