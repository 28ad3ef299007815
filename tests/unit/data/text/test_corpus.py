"""Text data: words, vocabulary, lanes and the bundled corpus, against numbers worked out by hand."""

import random
import re
import time
import unicodedata
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_dist.data.text import lanes as text
from moe_dist.data.text.corpus import SPLITS, Lines, open_text
from moe_dist.data.text.lanes import Lanes, Vocabulary, tokenize, unigram_perplexity
from moe_dist.monitoring.progress_bar import with_progress

ALL_LANES_3 = np.arange(3)


def test_tokenize_separates_punctuation_and_keeps_inner_apostrophes() -> None:
    assert tokenize("Don't go o'er--'tis star-cross'd, <unk>!") == [
        *("Don't", "go", "o'er", "--", "'", "tis", "star", "-", "cross'd", ",", "<unk>", "!")
    ]
    assert tokenize("It\u2019s 1,5 \u00e9t\u00e9.") == [
        "It\u2019s",
        "1",
        ",",
        "5",
        "\u00e9t\u00e9",
        ".",
    ]
    assert tokenize("  ") == []


WORDS = {
    "hindi": "\u0939\u093f\u0928\u094d\u0926\u0940 \u0915\u094d\u092f\u093e \u0939\u0948",
    "tamil": "\u0ba4\u0bae\u0bbf\u0bb4\u0bcd \u0bae\u0bca\u0bb4\u0bbf",
    "thai with its vowels": "\u0e17\u0e35\u0e48 \u0e19\u0e49\u0e33",
    "arabic with its vowels": "\u0643\u0650\u062a\u064e\u0627\u0628\u064c",
    "hebrew with its points": "\u05d1\u05b0\u05bc\u05e8\u05b5\u05d0\u05e9\u05b4\u05c1\u05d9\u05ea",
    "vietnamese": "Vi\u1ec7t Nam",
    "a mark that composes with nothing": "x\u0332y z",
    "persian, joined by nothing": "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
    "malayalam, a joiner at the end": "\u0d05\u0d35\u0d28\u0d4d\u200d",
    "a sign and how it is shown": "\u2764\ufe0f",
    "one picture of three": "\U0001f468\u200d\U0001f469\ufe0f\u200d\U0001f467",
    "inner apostrophe": "l\u2019\u00e9t\u00e9 d'\u00e9t\u00e9",
}


@pytest.mark.parametrize("line", WORDS.values(), ids=WORDS)
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_word_with_combining_marks_is_one_word(line: str, form: Any) -> None:
    found = tokenize(unicodedata.normalize(form, line))
    assert found == unicodedata.normalize("NFC", line).split()
    vocabulary = Vocabulary.build([line], len(found) + 2)
    assert vocabulary.encode([unicodedata.normalize(form, line)])[:-1].min() > 1, (
        "no word is unknown in either form"
    )


def test_invisible_characters_are_dropped_and_split_nothing() -> None:
    assert tokenize("auto\u00admo\u00adbil\ufeff un\u2060known") == ["automobil", "unknown"]
    assert tokenize("\u200f\u05e9\u05dc\u200e\u05d5\u05dd\u202c!") == [
        "\u05e9\u05dc\u05d5\u05dd",
        "!",
    ]
    assert tokenize("\u0e01\u0e32\u200b\u0e02\u0e32") == ["\u0e01\u0e32", "\u0e02\u0e32"], (
        "but a space of no width does"
    )
    assert tokenize("a \u200d \u200c.") == ["a", "."]


def test_other_text_is_tokenized_as_before() -> None:
    before = re.compile(r"<unk>|\w+(?:['\u2019]\w+)*|--|[^\w\s]")
    letters = "abZ019_ \t\n'\u2019\"-\u2014.,;:!?()[]<unk>&%$"
    letters += (
        "\u00e9\u00e8\u00fc\u00df\u0142\u0434\u03b1\u4e2d\u3042\ud55c\u20ac\u00a0\u2026\U0001f600"
    )
    rng = random.Random(0)
    for line in ("".join(rng.choices(letters, k=50)) for _ in range(2000)):
        assert tokenize(line) == before.findall(line)
    for line in islice(open_text("bundled", streamed=True)["test"], 2000):
        assert tokenize(line) == before.findall(line)


def test_vocabulary_ranks_by_count_then_word() -> None:
    # b 3, then c and a 2 each (a before c), then d 1.
    lines = ["c b a b", "a c b d"]
    assert Vocabulary.build(lines, 6).words == ("<unk>", "<eos>", "b", "a", "c", "d")
    vocabulary = Vocabulary.build(lines, 4)
    assert vocabulary.words == ("<unk>", "<eos>", "b", "a")
    assert len(vocabulary) == 4


def test_vocabulary_encodes_unknown_words_as_0_and_line_ends_as_1() -> None:
    vocabulary = Vocabulary(("<unk>", "<eos>", "b", "a"), (0, 0, 0, 0))
    ids = vocabulary.encode(["a c b", "b <unk>"])
    assert ids.dtype == np.int64
    assert ids.tolist() == [3, 0, 2, 1, 2, 0, 1]
    assert vocabulary.decode(ids[:4]) == "a <unk> b <eos>"


def test_literal_unk_in_the_text_gets_no_rank() -> None:
    vocabulary = Vocabulary.build(["<unk> <unk> a b b"], 3)
    assert vocabulary.words == ("<unk>", "<eos>", "b")
    assert vocabulary.counts == (3, 1, 2)  # <unk>, <unk> and a; one line; b, b


def test_vocabulary_counts_the_text_in_one_pass() -> None:
    passes = []

    def read() -> Iterator[str]:
        passes.append("one more")
        yield from ("c b a b", "a c b d", "e")

    lines = Lines(read)
    vocabulary = Vocabulary.build(lines, 4)
    assert passes == ["one more"]
    # of 3 b, 2 a, 2 c, 1 d, 1 e, the words kept are b and a; 2 + 1 + 1 others; 3 lines
    assert vocabulary.counts == (4, 3, 3, 2)
    assert np.bincount(vocabulary.encode(lines)).tolist() == list(vocabulary.counts)


def test_long_pass_prints_progress_and_a_short_one_is_silent(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def slow() -> Iterator[str]:
        for _ in range(5):
            yield "a b"
            time.sleep(0.6)

    Vocabulary.build(["a b"], 4)
    assert capsys.readouterr() == ("", "")
    Vocabulary.build(slow(), 4)
    said = capsys.readouterr()
    assert "vocabulary" in said.err and "lines" in said.err and not said.out


@pytest.mark.parametrize("size", [2, 7])
def test_invalid_vocabulary_size_names_a_valid_one(size: int) -> None:
    with pytest.raises(
        ValueError,
        match=rf"vocabulary_size={size} .* 4 different words: use at least 3 and at most 6",
    ):
        Vocabulary.build(["c b a b", "a c b d"], size)


def test_cyclic_lanes_continue_into_the_next_lane() -> None:
    lanes = Lanes(np.arange(10, 17), num_lanes=2, cyclic=True)  # N = 7, so lane_len = 7 // 2 = 3
    assert lanes.lane_len == 3
    assert [lanes.num_windows(steps) for steps in (1, 2, 3, 4)] == [3, 1, 1, 0]
    input_BS, target_BS, valid_BS = lanes.window(0, 3, np.arange(2))
    assert input_BS.tolist() == [[10, 11, 12], [13, 14, 15]]
    assert target_BS.tolist() == [[11, 12, 13], [14, 15, 16]]
    assert (input_BS.dtype, target_BS.dtype, valid_BS.dtype) == (
        torch.int64,
        torch.int64,
        torch.bool,
    )
    # Next pass: lane 0 reads lane 1's text; lane 1 reads index 6 (the remainder), then 7 mod 7 = 0
    # and 8 mod 7 = 1.
    input_BS, target_BS, valid_BS = lanes.window(3, 3, np.arange(2))
    assert input_BS.tolist() == [[13, 14, 15], [16, 10, 11]]
    assert target_BS.tolist() == [[14, 15, 16], [10, 11, 12]]
    assert valid_BS.all()
    # Position 3 + 7 * 1000 is index 3 + 7000 = 3 mod 7 again.
    assert lanes.window(3 + 7 * 1000, 3, np.arange(2))[0].equal(input_BS)


def test_evaluation_lanes_pad_after_their_own_end() -> None:
    # N = 8 has 7 pairs; ceil(7 / 3) = 3 pairs a lane: pairs 0-2, 3-5 and 6 with 2 places of
    # padding.
    lanes = Lanes(np.arange(10, 18), num_lanes=3, cyclic=False)
    assert lanes.lane_len == 3
    assert [lanes.num_windows(steps) for steps in (1, 2, 3, 4)] == [3, 2, 1, 1]
    input_BS, target_BS, valid_BS = lanes.window(2, 2, ALL_LANES_3)
    assert input_BS.tolist() == [[12, 0], [15, 0], [0, 0]]
    assert target_BS.tolist() == [[13, 0], [16, 0], [0, 0]]
    assert valid_BS.tolist() == [[True, False], [True, False], [False, False]]
    input_BS, target_BS, _ = lanes.window(0, 2, ALL_LANES_3)
    assert input_BS[2].tolist() == [16, 0]
    assert target_BS[2].tolist() == [17, 0]


def test_lane_length_of_evenly_divided_streams() -> None:
    assert Lanes(np.arange(6), num_lanes=2, cyclic=True).lane_len == 3  # 6 // 2
    assert Lanes(np.arange(7), num_lanes=3, cyclic=False).lane_len == 2  # (7 - 1) / 3


@pytest.mark.parametrize("num_tokens", [2, 8, 23])
@pytest.mark.parametrize("num_lanes", [1, 3, 5, 9])
@pytest.mark.parametrize("steps", [1, 4, 30])
def test_evaluation_scores_every_token_except_the_first_once(
    num_tokens: int, num_lanes: int, steps: int
) -> None:
    lanes = Lanes(np.arange(num_tokens), num_lanes, cyclic=False)
    pairs = []
    for window in range(lanes.num_windows(steps)):
        input_BS, target_BS, valid_BS = lanes.window(window * steps, steps, np.arange(num_lanes))
        pairs += zip(input_BS[valid_BS].tolist(), target_BS[valid_BS].tolist(), strict=True)
        assert not input_BS[~valid_BS].any()
        assert not target_BS[~valid_BS].any()
    assert sorted(pairs) == [(token, token + 1) for token in range(num_tokens - 1)]


@pytest.mark.parametrize("cyclic", [True, False])
def test_lane_does_not_depend_on_the_other_lanes(cyclic: bool) -> None:
    lanes = Lanes(np.arange(100, 150), num_lanes=6, cyclic=cyclic)
    every = lanes.window(5, 4, np.arange(6))
    for asked in ([4], [5, 0, 2], [1, 1], []):
        for part, whole in zip(
            lanes.window(5, 4, np.array(asked, dtype=np.int64)), every, strict=True
        ):
            assert part.equal(whole[asked])


def test_too_many_lanes_are_rejected() -> None:
    with pytest.raises(ValueError, match="3 tokens, too few for 4 lanes: give at least 4"):
        Lanes(np.arange(3), num_lanes=4, cyclic=True)
    with pytest.raises(ValueError, match="1 tokens, too few for 4 lanes: give at least 2"):
        Lanes(np.arange(1), num_lanes=4, cyclic=False)
    with pytest.raises(ValueError, match="num_lanes=0: use at least 1"):
        Lanes(np.arange(3), num_lanes=0, cyclic=True)


@pytest.mark.parametrize("lane", [-1, 3])
def test_lane_out_of_range_is_rejected(lane: int) -> None:
    with pytest.raises(ValueError, match=rf"lanes \[0, {lane}\] are not all within 0 .. 2"):
        Lanes(np.arange(9), num_lanes=3, cyclic=True).window(0, 2, np.array([0, lane]))


def test_unigram_perplexity_of_four_tokens() -> None:
    # Counts of 0, 1, 2, 3 plus one: 2, 3, 2, 1, of 8. Targets 1, 1, 0 (the leading 3 is none): 3/8,
    # 3/8, 2/8.
    # Perplexity (8/3 * 8/3 * 8/2) ** (1/3) = (256 / 9) ** (1/3) = 3.0526...
    perplexity = unigram_perplexity((1, 2, 1, 0), np.array([3, 1, 1, 0]))
    assert perplexity == pytest.approx((256 / 9) ** (1 / 3), rel=1e-12)


def test_unigram_perplexity_of_invalid_input_is_rejected() -> None:
    with pytest.raises(ValueError, match="1 tokens: give at least 2"):
        unigram_perplexity((1,), np.array([0]))
    with pytest.raises(
        ValueError, match="token 4 is outside a vocabulary of 4 words: use at least 5"
    ):
        unigram_perplexity((1, 1, 1, 1), np.array([4, 1]))


def test_bundled_sizes_equal_the_readme() -> None:
    folder = Path(text.__file__).parents[1] / "bundled"
    rows = re.findall(
        r"^\| (\w+) \| (\d+) \| (\d+) \| (\d+) \|$",
        (folder / "README.md").read_text(),
        re.MULTILINE,
    )
    for split, *sizes in rows:
        lines = list(open_text("bundled", streamed=True)[split])
        tokens = sum(len(tokenize(line)) + 1 for line in lines)
        assert [len(lines), tokens, (folder / f"{split}.txt.xz").stat().st_size] == [
            int(size) for size in sizes
        ]
    assert [row[0] for row in rows] == list(SPLITS)
    assert sum(int(row[3]) for row in rows) < 3_000_000


def test_bundled_text_is_clean_and_its_splits_are_disjoint() -> None:
    lines = open_text("bundled", streamed=False)
    joined = "\n".join(line for split in SPLITS for line in lines[split])
    assert joined.isascii()
    assert not re.search(r"gutenberg|copyright|\betexts?\b|[@_{}*]", joined, re.IGNORECASE)
    assert lines["train"][0] == "In the beginning God created the heaven and the earth."
    # Short lines ("[Exeunt.]", "Jesus wept.") recur; of longer ones a single verse does.
    long = {
        split: {line for line in lines[split] if len(re.findall(r"[\w']+", line)) > 8}
        for split in SPLITS
    }
    assert not long["test"] & (long["train"] | long["valid"])
    joshua_15_16 = "He that smiteth Kirjathsepher, and taketh it, to him will I give Achsah my daughter to wife."
    assert long["valid"] & long["train"] == {f"And Caleb said, {joshua_15_16}"}


def test_bundled_figures_at_vocabulary_8000_equal_the_readme() -> None:
    lines = open_text("bundled", streamed=False)
    vocabulary = Vocabulary.build(lines["train"], 8000)
    ids = {split: vocabulary.encode(lines[split]) for split in SPLITS}
    assert [round(100 * (ids[split] == 0).mean(), 1) for split in SPLITS] == [3.6, 5.5, 6.0]
    assert [round(unigram_perplexity(vocabulary.counts, ids[split])) for split in SPLITS[1:]] == [
        343,
        361,
    ]


def test_long_pass_prints_whole_lines_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(with_progress((time.sleep(1.2) or i for i in range(3)), "lines of a text")) == [
        0,
        1,
        2,
    ]
    assert (said := capsys.readouterr().err).endswith("\n") and "lines of a text: 3it" in said
    assert list(with_progress([1, 2], "lines of a text")) == [1, 2]
    assert capsys.readouterr().err == ""
