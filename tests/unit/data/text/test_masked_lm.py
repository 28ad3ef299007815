"""Pre-training samples: pieces and segments by hand, masks and sentence order, the same on any
layout. Bounds of random quantities are 4 standard errors."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch

from moe_dist.data.sampling import SampleOrder
from moe_dist.data.text.corpus import open_text
from moe_dist.data.text.masked_lm import Pretraining, _pieces, _segments
from moe_dist.data.text.wordpiece import (
    CLS,
    IGNORE_INDEX,
    MASK,
    PAD,
    SEP,
    SPECIAL,
    UNK,
    WordPieceTokenizer,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TOKENS = WordPieceTokenizer((*SPECIAL, *LETTERS))  # a is 5: only words of one letter are known


def text(*sizes: int) -> list[str]:
    """Returns lines with the given numbers of words, letters in order over all of them."""
    letters = iter(LETTERS * 100)
    return [" ".join(islice(letters, size)) for size in sizes]


@pytest.fixture(scope="module")
def verses() -> tuple[list[str], WordPieceTokenizer]:
    lines = list(islice(open_text("bundled", streamed=True)["train"], 600))
    return lines, WordPieceTokenizer.build(lines, 800)


def unmasked(batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    token_bS, _, _, target_bS, _ = batch
    return torch.where(target_bS == IGNORE_INDEX, token_bS, target_bS)


def test_long_lines_are_cut_at_word_starts() -> None:
    inside_V = np.array([False] * 10 + [True] * 10)  # tokens from 10 on go on with a word

    def sizes(*line: int) -> list[int]:
        return [len(piece) for piece in _pieces(np.array(line, dtype=np.int32), 4, inside_V)]

    assert sizes(*[1] * 4) == [4] and sizes() == []
    assert sizes(*[1] * 10) == [4, 3, 3]  # three parts: ceil(10 / 3), then ceil(6 / 2)
    assert sizes(1, 1, 1, 11, 11, 1) == [2, 4]  # ceil(6 / 2) = 3 is inside a word that begins at 2
    assert sizes(1, 11, 11, 11, 11, 11) == [3, 3]  # a word that is longer than that


def test_segments_take_as_many_pieces_as_fit() -> None:
    # 2 + 2 + 2 = 6, then 3 + 1 (4 more would be 8), then 4 alone, which has no other
    assert _segments(np.cumsum([0, 2, 2, 2, 3, 1, 4]), 6).tolist() == [0, 3, 5]
    assert _segments(np.cumsum([0, 3, 3]), 6).tolist() == [0, 2]


def test_sample_is_two_adjacent_runs_of_lines() -> None:
    # 2 + 2 + 2 fit into 9 - 3, and so do 3 + 1; the last line has no other
    data = Pretraining(text(2, 2, 2, 3, 1, 3), TOKENS, max_tokens=9, global_batch_size=2)
    assert data.num_batches == 1
    batch = data.batch(0, range(2))
    _, kind_bS, valid_bS, target_bS, order_b = batch
    assert [t.dtype for t in batch] == [
        torch.int64,
        torch.int64,
        torch.bool,
        torch.int64,
        torch.int64,
    ]
    assert [tuple(t.shape) for t in batch] == [(2, 9)] * 4 + [(2,)]
    expected = {
        0: {("ab", "cdef"), ("abcd", "ef")},  # lines of 2, 2, 2 have two places to be parted at
        1: {("ghi", "j")},
    }
    for row, kind, order, pairs in zip(
        unmasked(batch).tolist(), kind_bS.tolist(), order_b, expected.values(), strict=True
    ):
        row, kind = row[: row.index(PAD)] if PAD in row else row, kind
        middle = row.index(SEP)
        a, b = (
            "".join(TOKENS.words[i] for i in part) for part in (row[1:middle], row[middle + 1 : -1])
        )
        assert row[0] == CLS and row[-1] == SEP
        assert ((b, a) if order else (a, b)) in pairs
        assert kind[: len(row)] == [0] * (middle + 1) + [1] * (len(row) - middle - 1)
    assert valid_bS.tolist() == [[True] * 9, [True] * 7 + [False] * 2]
    assert (target_bS != IGNORE_INDEX).sum(dim=1).tolist() == [
        1,
        1,
    ]  # round(0.15 * 6), round(0.15 * 4)


def test_every_epoch_has_every_segment_once_in_a_new_order() -> None:
    data = Pretraining(
        text(*[2] * 48), TOKENS, max_tokens=11, global_batch_size=4, seed=3
    )  # 4 lines of 2: 12 segments
    batches = [data.batch(step, range(4)) for step in range(12)]  # 48 samples are 4 epochs
    rows = [unmasked(batch) for batch in batches]
    segments = [sorted(set(row.tolist()) - set(range(len(SPECIAL)))) for row in torch.cat(rows)]
    first = [segments[12 * epoch : 12 * epoch + 12] for epoch in range(4)]
    assert all(sorted(map(tuple, epoch)) == sorted(map(tuple, first[0])) for epoch in first)
    assert first[0] != first[1] and len(set(map(tuple, first[0]))) == 12
    parted, masked = Counter[int](), set()
    for batch in batches:
        parted.update((batch[1].sum(dim=1) - 1).tolist())
        masked |= {tuple(row) for row in batch[3].tolist()}
    assert parted.keys() == {2, 4, 6}, "behind any of the first three lines"
    assert len(masked) > 24, "of 48 samples of 12 segments: other words in each epoch"
    other = Pretraining(text(*[2] * 48), TOKENS, max_tokens=11, global_batch_size=4, seed=4)
    assert not other.batch(0, range(4))[0].equal(data.batch(0, range(4))[0])


def test_different_seeds_have_different_masks() -> None:
    seen = set()
    for seed in range(8):  # of the one segment of a text; in evaluation there is no seed
        data = Pretraining(text(4, 4), TOKENS, max_tokens=11, global_batch_size=1, seed=seed)
        seen.add(tuple(data.batch(0, range(1))[3][0].tolist()))
    assert len(seen) > 3


def test_sample_is_the_same_on_any_layout_and_in_any_order(
    verses: tuple[list[str], WordPieceTokenizer],
) -> None:
    lines, tokens = verses
    data = Pretraining(lines, tokens, max_tokens=64, global_batch_size=8, seed=1)
    whole = data.batch(5, range(8))
    again = Pretraining(lines, tokens, max_tokens=64, global_batch_size=8, seed=1)
    for asked in (range(4, 8), range(0, 4), range(3, 4), range(0, 0)):
        for part, every in zip(again.batch(5, asked), whole, strict=True):
            assert part.equal(every[asked.start : asked.stop])
    # sample 3 of step 5 is number 43 = 4 * 9 + 7 of a batch of 9 in the same epoch: only the
    # padding may differ
    wider = Pretraining(lines, tokens, max_tokens=64, global_batch_size=9, seed=1).batch(
        4, range(7, 8)
    )
    for one, other in zip(wider, whole, strict=True):
        width = min(one.shape[-1], other.shape[-1])
        assert one[0].equal(other[3]) if one.dim() == 1 else one[0, :width].equal(other[3, :width])


def test_masks_have_the_shares_of_the_paper(verses: tuple[list[str], WordPieceTokenizer]) -> None:
    lines, tokens = verses
    data = Pretraining(lines, tokens, max_tokens=64, global_batch_size=16, seed=0)
    told = masked = same = swapped = samples = 0
    random: list[int] = []
    for step in range(150):
        token_bS, _, valid_bS, target_bS, order_b = batch = data.batch(step, range(16))
        is_told = target_bS != IGNORE_INDEX
        text_bS = unmasked(batch)
        assert not is_told[text_bS < len(SPECIAL)].any(), "no special token is told"
        assert not (token_bS[~is_told] == MASK).any() and (token_bS[~valid_bS] == PAD).all()
        num_b = (text_bS >= len(SPECIAL)).sum(dim=1)
        assert is_told.sum(dim=1).tolist() == [max(1, round(0.15 * n)) for n in num_b.tolist()]
        token, target = token_bS[is_told], target_bS[is_told]
        told += len(token)
        masked += int((token == MASK).sum())
        same += int((token == target).sum())
        random += token[(token != MASK) & (token != target)].tolist()
        swapped, samples = swapped + int(order_b.sum()), samples + 16

    def within(count: int, num: int, p: float) -> bool:
        return abs(count - num * p) < 4 * (num * p * (1 - p)) ** 0.5

    other = 1 - 1 / (
        len(tokens) - len(SPECIAL)
    )  # a random word is another one with this probability
    assert told > 3000
    assert (
        within(masked, told, 0.8)
        and within(len(random), told, 0.1 * other)
        and within(same, told, 0.2 - 0.1 * other)
    )
    assert min(random) >= len(SPECIAL) and len(set(random)) > 200
    assert within(swapped, samples, 0.5)


def test_evaluation_has_every_segment_once_and_the_same_masks(
    verses: tuple[list[str], WordPieceTokenizer],
) -> None:
    lines, tokens = verses
    data = Pretraining(lines, tokens, max_tokens=64, global_batch_size=7)
    segments = len(data.first_M1) - 1
    assert segments % 7 and data.num_batches == -(-segments // 7)
    batches = [data.batch(step, range(7)) for step in range(data.num_batches)]
    again = Pretraining(lines, tokens, max_tokens=64, global_batch_size=7)
    assert all(a.equal(b) for a, b in zip(batches[3], again.batch(3, range(7)), strict=True))
    seen = []
    for batch in batches:
        for row, kind, order in zip(
            unmasked(batch).tolist(), batch[1].tolist(), batch[4].tolist(), strict=True
        ):
            a, b = (
                [t for t, k in zip(row, kind, strict=True) if k == which and t > 3]
                for which in (0, 1)
            )
            a, b = ([t for t in part if t not in (CLS, SEP, PAD)] for part in (a, b))
            seen += b + a if order == 1 else a + b
    whole = np.concatenate(list(tokens.encode_all(lines)))
    # every token in its place once; of the end a piece that has no other beside it may be left out
    assert seen == [t for t in whole.tolist() if t > 3][: len(seen)] and len(whole) - len(seen) < 31
    token_bS, _, valid_bS, target_bS, order_b = batches[-1]
    padding = segments - 7 * data.num_batches  # a negative number of them
    assert (
        not valid_bS[padding:].any()
        and (token_bS[padding:] == PAD).all()
        and valid_bS[:padding].any(dim=1).all()
    )
    assert (target_bS[padding:] == IGNORE_INDEX).all() and order_b[padding:].tolist() == [
        IGNORE_INDEX
    ] * -padding
    assert (order_b[:padding] >= 0).all()


def test_no_sample_is_longer_than_allowed(verses: tuple[list[str], WordPieceTokenizer]) -> None:
    lines, tokens = verses
    for max_tokens in (5, 6, 17, 512):
        data = Pretraining(lines, tokens, max_tokens, global_batch_size=8, seed=0)
        assert max(data.batch(step, range(8))[0].shape[1] for step in range(20)) <= max_tokens


def test_step_is_as_wide_as_its_longest_sample() -> None:
    # 1 + 1 + 4 fit into 12 - 3, and then 4 + 2 + 2: with [CLS] and two [SEP] 9 and 11 tokens
    for samples, widths in ((1, [9, 11]), (2, [11])):
        data = Pretraining(text(1, 1, 4, 4, 2, 2), TOKENS, max_tokens=12, global_batch_size=samples)
        assert [
            data.batch(step, range(1))[0].shape[1] for step in range(data.num_batches)
        ] == widths


def test_unknown_tokens_are_never_predicted() -> None:
    data = Pretraining(["? ?", "? ?", "a ?", "? ?"], TOKENS, max_tokens=7, global_batch_size=2)
    token_bS, _, _, target_bS, _ = data.batch(0, range(2))
    assert (target_bS[0] == IGNORE_INDEX).all() and (token_bS[0] == UNK).sum() == 4
    assert target_bS[1][target_bS[1] != IGNORE_INDEX].tolist() == [5]


def test_order_goes_through_epochs() -> None:
    order = SampleOrder([1, 5, 3], global_batch_size=2, seed=7)
    picked = [order.select(step, range(2)) for step in range(6)]  # 12 samples: 4 epochs of 3
    epochs = np.concatenate([epoch for epoch, _, _ in picked])
    index = np.concatenate([index for _, index, _ in picked])
    assert epochs.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert [sorted(index[3 * e : 3 * e + 3].tolist()) for e in range(4)] == [[0, 1, 2]] * 4
    assert len({tuple(index[3 * e : 3 * e + 3].tolist()) for e in range(4)}) > 1
    widths = [max((1, 5, 3)[i] for i in index.tolist()) for _, index, _ in picked]
    assert [width for *_, width in picked] == widths
    few = SampleOrder([1, 5, 3], global_batch_size=7, seed=7).select(
        0, range(7)
    )  # more samples than there are
    assert few[1].tolist() == index[:7].tolist()
    assert SampleOrder([1, 5, 3], global_batch_size=2, seed=None).select(1, range(2))[
        1
    ].tolist() == [2, -1]


@pytest.mark.parametrize(
    ("lines", "max_tokens", "message"),
    [
        (["a", "b"], 4, r"model.max_tokens=4: use at least 5, for \[CLS\] a \[SEP\] b \[SEP\]"),
        (["a"], 9, "a split of data.text has 1 lines with any token: give at least 2"),
        (["\u200b", "a", "\x00"], 9, "has 1 lines with any token"),
        ([], 9, "has 0 lines with any token"),
    ],
)
def test_text_without_a_sample_is_rejected(lines: list[str], max_tokens: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pretraining(lines, TOKENS, max_tokens, global_batch_size=1)
