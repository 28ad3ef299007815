"""Streamed lanes against numbers worked out by hand and a slow reference."""

import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from runs import tiny

from moe_dist.data.text.corpus import Lines
from moe_dist.data.text.lanes import Vocabulary
from moe_dist.data.text.stream import Stream, _repeated_fraction, check_lanes
from moe_dist.distributed import batch_layout

WORDS = tuple("abcdefgh")
VOCABULARY = Vocabulary(("<unk>", "<eos>", *WORDS), (0,) * 10)


def said(token_BS: torch.Tensor) -> list[str]:
    return [VOCABULARY.decode(row).replace("<eos>", ".") for row in token_BS.tolist()]


def test_windows_and_positions_by_hand() -> None:
    # Lines 0 "a b", 1 "c", 2 "d e f", and again as 3, 4, 5. Lane 0 reads 0, 2, 4: a b . d e f . c .
    # Lane 1 reads 1, 3, 5: c . a b . d e f .
    stream = Stream(["a b", "c", "d e f"], VOCABULARY, num_lanes=2, lane_b=range(2))
    assert stream.places().tolist() == [[0, 0], [1, 0]]
    input_BS, target_BS, valid_BS = stream.window(3, np.arange(2))
    assert (said(input_BS), said(target_BS)) == (["a b .", "c . a"], ["b . d", ". a b"])
    assert valid_BS.all() and valid_BS.shape == (2, 3)
    assert (input_BS.dtype, target_BS.dtype, valid_BS.dtype) == (
        torch.int64,
        torch.int64,
        torch.bool,
    )
    # lane 0 goes on with "d", the first word of line 2; lane 1 with "b", word 1 of line 3
    assert stream.places().tolist() == [[2, 0], [3, 1]]
    input_BS, target_BS, _ = stream.window(3, np.arange(2))
    assert (said(input_BS), said(target_BS)) == (["d e f", "b . d"], ["e f .", ". d e"])
    # lane 0 goes on with the <eos> of line 2, behind its 3 words; lane 1 with "e", word 1 of line 5
    assert stream.places().tolist() == [[2, 3], [5, 1]]


def test_fewer_lines_than_lanes_and_long_windows() -> None:
    # One line for three lanes: lane b reads lines b, b + 3, ..., all "a". 5 tokens: a . a . a, so
    # that the next is the <eos> of the third line, b + 6.
    stream = Stream(["a"], VOCABULARY, num_lanes=3, lane_b=range(3))
    input_BS, target_BS, _ = stream.window(5, np.arange(3))
    assert (said(input_BS), said(target_BS)) == (["a . a . a"] * 3, [". a . a ."] * 3)
    assert stream.places().tolist() == [[6, 1], [7, 1], [8, 1]]


@pytest.mark.parametrize(
    ("num_lines", "words", "lanes", "steps", "streamed", "message"),
    [
        (
            7,
            30,
            8,
            4,
            True,
            r"7 lines for batch.global_batch_size=8 lanes.*; use data.streamed=false or .* at most 7",
        ),
        (1, 500, 2, 1, True, "1 lines for batch.global_batch_size=2 lanes"),
        (8, 30, 8, 4, True, None),
        (7, 30, 8, 4, False, None),  # one long row of words
        (
            9,
            2,
            8,
            4,
            True,
            r"batch.global_batch_size=8 x batch.seq_len=4 words, the training text has 27",
        ),
        (9, 2, 9, 3, True, None),  # 9 lines of 2 words and <eos>
        (9, 2, 9, 3, False, None),
        (9, 2, 4, 7, False, "x batch.seq_len=7 words, the training text has 27: give more text"),
    ],
)
def test_text_too_short_for_a_step_is_rejected(
    num_lines: int, words: int, lanes: int, steps: int, streamed: bool, message: str | None
) -> None:
    lines = [" ".join("a" * words)] * num_lines
    if message is None:
        check_lanes(lines, lanes, steps, streamed)
    else:
        with pytest.raises(ValueError, match=message):
            check_lanes(lines, lanes, steps, streamed)


@pytest.mark.parametrize(
    ("lanes", "steps", "streamed", "read"),
    [(2, 3, True, 128), (1, 90, True, 90), (3, 4, False, 12)],
)
def test_length_check_reads_no_more_than_needed(
    lanes: int, steps: int, streamed: bool, read: int
) -> None:
    """64 lines per lane, each with one word and its end."""
    lines = iter(["a"] * 200)
    check_lanes(lines, lanes, 2 * steps, streamed)
    assert 200 - len(list(lines)) == read


LENGTHS = {
    "one long line": ([5] * 16 + [600], 16, 16),
    "long lines at the end": ([8] * 15 + [300] * 3, 16, 12),
    "lengths in no order": ([1 + 37 * i % 90 for i in range(18)], 16, 20),
    "a line a lane, shorter than a step": ([3] * 6 + [60], 7, 9),
    "few lines": ([5, 9, 13, 6, 8, 12, 7, 10, 5, 11], 8, 6),
    "twice as many lines as lanes": ([20 + i % 7 for i in range(32)], 16, 8),
    "one lane": ([4] * 5, 1, 6),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_lanes_that_read_the_same_words_are_rejected(name: str) -> None:
    """In a stream of distinct words, counts the repeated words of a step over two passes."""
    lengths, lanes, steps = LENGTHS[name]
    lines = [" ".join(f"{line}x{i}" for i in range(words)) for line, words in enumerate(lengths)]
    vocabulary = Spaced(("<unk>", "<eos>", *" ".join(lines).split()), (0,) * (2 + sum(lengths)))
    stream = Stream(lines, vocabulary, lanes, range(lanes))
    num_steps = max(1, 2 * (sum(lengths) + len(lengths)) // (lanes * steps))
    again = 0
    for _ in range(num_steps):
        place_B2 = stream.places()
        input_BS, _, _ = stream.window(steps, np.arange(lanes))
        ends = []  # which line each <eos> is of
        for row, (line, _) in zip(input_BS.tolist(), place_B2.tolist(), strict=True):
            ends += [(line + lanes * i) % len(lines) for i in range(row.count(1))]
        words = [token for token in input_BS.flatten().tolist() if token != 1]
        again += len(words) - len(set(words)) + len(ends) - len(set(ends))
    share = again / (num_steps * lanes * steps)
    assert _repeated_fraction(np.array(lengths) + 1, lanes, steps) == pytest.approx(share, abs=1e-9)
    if share > 0.1:
        with pytest.raises(
            ValueError,
            match=f"data.streamed=true: {share:.0%} of the words .* use data.streamed=false",
        ):
            check_lanes(lines, lanes, steps, streamed=True)
    else:
        check_lanes(lines, lanes, steps, streamed=True)
    check_lanes(lines, lanes, steps, streamed=False)


def test_accepted_lanes_have_no_word_in_common() -> None:
    """For every (lines, lanes) up to 9 each position of the text is in a step once, if the
    text is long enough."""
    for num_lines, num_lanes in itertools.product(range(1, 10), range(1, 10)):
        rng = random.Random(10 * num_lines + num_lanes)
        lines = [
            " ".join(f"{line}.{i}" for i in range(rng.choice([1, 4, 9])))
            for line in range(num_lines)
        ]
        names = [name for line in lines for name in line.split()]
        vocabulary = Spaced(("<unk>", "<eos>", *names), (0,) * (2 + len(names)))
        try:
            check_lanes(lines, num_lanes, 1, streamed=True)
        except ValueError:
            assert num_lines < num_lanes
            continue
        stream = Stream(lines, vocabulary, num_lanes, range(num_lanes))
        for _ in range(60):
            input_B1, _, _ = stream.window(1, np.arange(num_lanes))
            seen = [token for token in input_B1.flatten().tolist() if token != 1]
            assert len(seen) == len(set(seen)), (num_lines, num_lanes)


class Spaced(Vocabulary):
    """A vocabulary of letter words that the tokenizer otherwise splits."""

    def encode(self, lines: Any) -> np.ndarray:
        return np.array([i for line in lines for i in (*map(self.words.index, line.split()), 1)])


def broken_after(lines: list[str], error: Exception | None, passes: int) -> Lines:
    """Returns lines that raise at the end of a pass, or are missing from then on."""
    begun = itertools.count()

    def read() -> Iterator[str]:
        pass_ = next(begun)
        if pass_ > passes and error is None:
            return
        yield from lines
        if pass_ == passes and error is not None:
            raise error

    return Lines(read)


@pytest.mark.parametrize("error", [ValueError("x.txt, after row 3: I/O error"), None])
@pytest.mark.parametrize("passes", [0, 2])
def test_text_that_breaks_during_training_is_reported(error: Exception | None, passes: int) -> None:
    """train.py prints one line: a system error, on the ranks that find it."""
    stream = Stream(
        broken_after(["a b", "c", "d e f"], error, passes), VOCABULARY, num_lanes=2, lane_b=range(2)
    )
    with pytest.raises(OSError, match=str(error) if error else "has no line any more"):
        for _ in range(20):
            stream.window(3, np.arange(2))


class Reference:
    """A list of all tokens of each lane, with the place of each."""

    def __init__(self, lines: list[str], num_lanes: int, num_tokens: int) -> None:
        self.lanes: list[list[tuple[int, int, int]]] = []  # by lane: (token, line, offset)
        for lane in range(num_lanes):
            tokens: list[tuple[int, int, int]] = []
            line = lane
            while len(tokens) < num_tokens:
                ids = [2 + WORDS.index(word) for word in lines[line % len(lines)].split()] + [1]
                tokens += [(token, line, offset) for offset, token in enumerate(ids)]
                line += num_lanes
            self.lanes.append(tokens)

    def window(self, start: int, steps: int, lane_B: Any) -> list[list[int]]:
        """Inputs and the last target."""
        return [
            [token for token, _, _ in self.lanes[lane][start : start + steps + 1]]
            for lane in lane_B
        ]

    def places(self, start: int) -> list[list[int]]:
        return [list(tokens[start][1:]) for tokens in self.lanes]


CASES = [
    (1, 1, 4),
    (7, 4, 5),
    (8, 4, 5),
    (9, 4, 1),
    (5, 12, 7),
    (30, 12, 3),
]  # lines, lanes, timesteps
STEPS = 40


def text(num_lines: int) -> list[str]:
    rng = random.Random(num_lines)
    return [" ".join(rng.choices(WORDS, k=rng.choice([1, 1, 2, 3, 9]))) for _ in range(num_lines)]


@pytest.mark.parametrize(("num_lines", "num_lanes", "steps"), CASES)
def test_stream_equals_the_reference_and_resumes_anywhere(
    num_lines: int, num_lanes: int, steps: int
) -> None:
    lines = text(num_lines)
    reference = Reference(lines, num_lanes, STEPS * steps + 1)
    stream = Stream(lines, VOCABULARY, num_lanes, range(num_lanes))
    every = np.arange(num_lanes)
    for step in range(STEPS):
        assert stream.places().tolist() == reference.places(step * steps)
        resumed = Stream(lines, VOCABULARY, num_lanes, range(num_lanes))
        resumed.load(stream.places())
        assert resumed.places().equal(stream.places())
        expected = reference.window(step * steps, steps, every)
        for each in (stream, resumed):
            input_BS, target_BS, valid_BS = each.window(steps, every)
            assert input_BS.tolist() == [row[:-1] for row in expected]
            assert target_BS.tolist() == [row[1:] for row in expected]
            assert valid_BS.all()
    assert stream.places()[:, 0].max() > 2 * num_lines, "several passes"


@pytest.mark.parametrize(("num_lines", "num_lanes", "steps"), CASES[1:])
def test_window_does_not_depend_on_ranks_or_micro_batches(
    num_lines: int, num_lanes: int, steps: int
) -> None:
    lines = text(num_lines)
    reference = Reference(lines, num_lanes, STEPS * steps + 1)
    for world, accumulation in ((2, 1), (1, 2), (2, 2), (4, 1)):
        layout = batch_layout.BatchLayout(world, num_lanes, accumulation, 1, 1)
        micros = [
            [layout.local_samples(m, rank) for m in range(accumulation)] for rank in range(world)
        ]
        streams = [
            Stream(lines, VOCABULARY, num_lanes, [b for m in mine for b in m]) for mine in micros
        ]
        for step in range(STEPS):
            for stream, mine in zip(streams, micros, strict=True):
                for lane_B in mine:
                    input_BS, target_BS, _ = stream.window(steps, np.array(lane_B))
                    whole = torch.cat([input_BS, target_BS[:, -1:]], dim=1)
                    assert whole.tolist() == reference.window(step * steps, steps, lane_B)
        places = sum(stream.places() for stream in streams)  # what a checkpoint holds
        assert places.tolist() == reference.places(STEPS * steps)  # type: ignore[union-attr]


class Counted(Vocabulary):
    """A vocabulary that counts the tokenized lines."""

    def encode(self, lines: Any) -> np.ndarray:
        encoded.extend(lines)
        return super().encode(lines)


encoded: list[str] = []


def test_other_lanes_and_skipped_text_are_not_tokenized() -> None:
    lines = [f"{WORDS[i % 8]} a" for i in range(10)]
    vocabulary = Counted(VOCABULARY.words, VOCABULARY.counts)
    encoded.clear()
    stream = Stream(lines, vocabulary, num_lanes=4, lane_b=[1])
    stream.window(5, np.array([1]))  # lines 1 and 5, of 3 tokens each, are 6
    assert encoded == [lines[1], lines[5]]
    stream.load(torch.tensor([[0, 0], [41, 2], [2, 0], [3, 0]]))
    encoded.clear()
    stream.window(3, np.array([1]))  # the <eos> of line 41 = 4 * 10 + 1, then line 45
    assert encoded == [lines[1], lines[5]]
    assert stream.places()[1].tolist() == [45, 2]


def test_resume_reads_only_the_first_pass_again() -> None:
    class Passes(list):
        num = 0

        def __iter__(self) -> Any:
            Passes.num += 1
            return super().__iter__()

    stream = Stream(Passes(["a", "b", "c"]), VOCABULARY, num_lanes=1, lane_b=[0])
    stream.load(torch.tensor([[3000, 0]]))
    assert said(stream.window(3, np.array([0]))[0]) == ["a . b"]
    assert Passes.num == 2


def test_buffers_are_as_long_as_the_lane_spread() -> None:
    """Lines of 1 to 20 words in random order, 20,000 tokens per lane: the bound in the
    docstring of Stream."""
    rng, num_lanes, steps = random.Random(0), 16, 20
    lengths = [rng.randint(1, 20) for _ in range(9973)]
    stream = Stream(["a " * n for n in lengths], VOCABULARY, num_lanes, range(num_lanes))
    for _ in range(1000):
        stream.window(steps, np.arange(num_lanes))
    sd, lines_per_lane = np.std(lengths), 20_000 / (1 + np.mean(lengths))
    longest = max(len(ahead) for ahead in stream.ahead.values())
    assert steps < longest < 8 * sd * lines_per_lane**0.5


def streamed(path: str, *more: str) -> Any:
    return tiny(f"data.text={path}", "data.streamed=true", "data.vocabulary_size=100", *more)
