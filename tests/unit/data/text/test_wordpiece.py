"""Sub-word tokens: pieces by hand, slow references of training and encoding, and offsets into the
text."""

import json
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from tokenizers.normalizers import BertNormalizer

from moe_dist.data.text.corpus import Lines, open_text
from moe_dist.data.text.wordpiece import (
    CLS,
    MASK,
    PAD,
    PADDING_SAMPLE,
    SEP,
    SPECIAL,
    UNK,
    WordPieceTokenizer,
    _tokenizer,
    join_segments,
    pad_and_stack,
)

LINES = ["ab ab abc", "abc"]


@pytest.fixture(scope="module")
def verses() -> list[str]:
    return list(islice(open_text("bundled", streamed=True)["train"], 400))


def test_special_tokens_have_fixed_numbers() -> None:
    assert (PAD, UNK, CLS, SEP, MASK) == (0, 1, 2, 3, 4)
    assert SPECIAL == ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def test_pieces_by_hand() -> None:
    # Words: ab twice, abc twice. The pair a ##b is there 4 times, ##b ##c twice; after ab, ab ##c
    # twice.
    tokens = WordPieceTokenizer.build(LINES, 13)
    assert tokens.words == (*SPECIAL, "##a", "##b", "##c", "a", "b", "c", "ab", "abc")
    assert (
        len(tokens) == 13 and tokens.is_inside_V.tolist() == [False] * 5 + [True] * 3 + [False] * 5
    )
    # abc whole; ab; a and what goes on with it; c, then no ##ab: letter by letter; x is no
    # character of the text
    assert tokens.encode("abc ab ac cab x") == [12, 11, 8, 7, 10, 5, 6, UNK]
    assert tokens.decode([12, 11, 8, 7, 10, 5, 6, UNK]) == "abc ab ac cab [UNK]"
    assert [ids.tolist() for ids in tokens.encode_all(["abc", "", "ac"])] == [[12], [], [8, 7]]
    assert tokens.decode([CLS, 12, SEP, MASK, PAD]) == "[CLS] abc [SEP] [MASK] [PAD]"


def test_no_text_is_read_as_a_special_token() -> None:
    tokens = WordPieceTokenizer.build([*LINES, "[MASK] [mask]"] * 2, 24)
    ids = tokens.encode("[SEP] [PAD] [CLS] [MASK] ab")
    assert not set(ids) & {PAD, CLS, SEP, MASK}
    assert tokens.decode(tokens.encode("[MASK]")) == "[ mask ]"


def slow_training(lines: list[str], size: int) -> list[str]:
    """Starts with characters and merges the most frequent pair repeatedly; the pieces' numbers
    break ties."""
    count = Counter(word for line in lines for word in re.findall(r"\w+|[^\w\s]", line.lower()))
    alphabet = sorted(set("".join(count)))
    words = [*SPECIAL, *("##" + c for c in alphabet if c.isalnum()), *alphabet]
    cut = {word: [word[0], *("##" + c for c in word[1:])] for word in count}
    while len(words) < size:
        number = {word: i for i, word in enumerate(words)}
        pairs: Counter[tuple[str, str]] = Counter()
        for word, pieces in cut.items():
            for pair in pairwise(pieces):
                pairs[pair] += count[word]
        best = min(pairs, key=lambda pair: (-pairs[pair], number[pair[0]], number[pair[1]]))
        whole = best[0] + best[1].removeprefix("##")
        if whole not in number:
            words.append(whole)
        for pieces in cut.values():
            i = 0
            while i < len(pieces) - 1:
                if (pieces[i], pieces[i + 1]) == best:
                    pieces[i : i + 2] = [whole]
                i += 1
    return words


def test_training_equals_a_slow_reference_and_is_deterministic(verses: list[str]) -> None:
    expected = slow_training(verses[:100], 250)
    for _ in range(3):  # the library's own order of pieces inside words is another one each time
        assert list(WordPieceTokenizer.build(verses[:100], 250).words) == expected


def test_encoding_equals_a_slow_reference(verses: list[str]) -> None:
    tokens = WordPieceTokenizer.build(verses, 500)
    known = set(tokens.words)

    def pieces(word: str) -> Iterator[str]:
        rest, before = word, ""
        while rest:
            piece = next(
                before + rest[:n] for n in range(len(rest), 0, -1) if before + rest[:n] in known
            )
            yield piece
            rest, before = rest[len(piece) - len(before) :], "##"

    for line, ids in zip(verses, tokens.encode_all(verses), strict=True):
        slow = [
            piece for word in re.findall(r"\w+|[^\w\s]", line.lower()) for piece in pieces(word)
        ]
        assert [tokens.words[i] for i in ids] == slow
        assert ids.tolist() == tokens.encode(line)


def test_rare_characters_are_left_out() -> None:
    # 0.99995 of 40,001 characters that are no spaces are 39,998.99: a and b are enough, the one ß
    # is not needed
    tokens = WordPieceTokenizer.build(["ab" * 20] * 1000 + ["ß"], 12)
    assert {word.removeprefix("##") for word in tokens.words[5:]} <= {"a", "b"} | {
        "ab" * n for n in range(21)
    }
    assert tokens.encode("ß") == [UNK]


def test_offsets_refer_to_the_original_text() -> None:
    tokens = WordPieceTokenizer.build(["lord name in the beginning , n"] * 3, 40)
    text = "The LÓRD  n\u0301ame,\u200b in 中"
    ids, offsets = tokens.encode_with_offsets(text)
    assert ids == tokens.encode(text)
    words: dict[str, str] = {}
    for i, (start, stop) in zip(ids, offsets, strict=True):
        words[text[start:stop]] = tokens.words[i]
    assert [text[a:b] for a, b in offsets if text[a:b] in ("中", ",")] == [",", "中"] and words[
        "中"
    ] == "[UNK]"
    # "LÓRD" is characters 4 to 8, "ńame" with its two code points 10 to 15
    pieces = [
        (tokens.words[i].removeprefix("##"), a, b) for i, (a, b) in zip(ids, offsets, strict=True)
    ]
    for first, stop, word in ((4, 8, "lord"), (10, 15, "name")):
        assert "".join(piece for piece, a, b in pieces if first <= a and b <= stop) == word
    assert tokens.encode_with_offsets("\u200b \x00") == ([], [])


@pytest.mark.parametrize(
    ("lines", "size", "message"),
    [
        (
            LINES,
            10,
            "vocabulary_size=10 is too small for the 3 characters of this text: use at least 11",
        ),
        (
            LINES,
            14,
            "vocabulary_size=14 is more than this text fills: use at most 13, or give more text",
        ),
        ([], 10, "vocabulary_size=10 is more than this text fills: use at most 5"),
        (LINES, 0, "vocabulary_size=0 is too small .* use at least 11"),
    ],
)
def test_invalid_sizes_are_rejected(lines: list[str], size: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"model.{message}"):
        WordPieceTokenizer.build(lines, size)
    assert len(WordPieceTokenizer.build(LINES, 11)) == 11


def test_training_accepts_an_iterator(capsys: pytest.CaptureFixture[str]) -> None:
    assert WordPieceTokenizer.build(Lines(lambda: iter(LINES)), 13) == WordPieceTokenizer.build(
        LINES, 13
    )
    assert capsys.readouterr() == ("", "")


def test_json_round_trip(verses: list[str]) -> None:
    tokens = WordPieceTokenizer.build(verses, 500)
    again = WordPieceTokenizer.from_json(json.loads(json.dumps(tokens.to_json())))
    assert again == tokens and again.encode(verses[0]) == tokens.encode(verses[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("{}", "not a list of words"),
        ('["a", 1]', "not a list of words"),
        ('["a", "b"]', r"the first are not \[PAD\]"),
        (json.dumps([*SPECIAL, "a", "a"]), "some word is there twice"),
    ],
)
def test_invalid_json_is_rejected(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"tokens: .*{message}"):
        WordPieceTokenizer.from_json(text)


def test_samples_are_joined_and_stacked() -> None:
    a, b = np.array([7, 8]), np.array([9])
    rows = [join_segments(a, b), join_segments(b), PADDING_SAMPLE]
    token_bS, kind_bS, valid_bS = pad_and_stack(rows, 7)
    assert token_bS.tolist() == [
        [CLS, 7, 8, SEP, 9, SEP, PAD],
        [CLS, 9, SEP, 0, 0, 0, 0],
        [PAD] * 7,
    ]
    assert kind_bS.tolist() == [[0, 0, 0, 0, 1, 1, 0], [0] * 7, [0] * 7]
    assert valid_bS.tolist() == [[True] * 6 + [False], [True] * 3 + [False] * 4, [False] * 7]
    assert (token_bS.dtype, kind_bS.dtype, valid_bS.dtype) == (torch.int64, torch.int64, torch.bool)


def letters_of(line: str) -> WordPieceTokenizer:
    """Returns tokens that are the single letters of a text."""
    letters = sorted(set(_tokenizer({}).normalizer.normalize_str(line)) - {" "})
    return WordPieceTokenizer((*SPECIAL, *letters, *(f"##{letter}" for letter in letters)))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e", 2),  # hindi
        (
            "\u0e17\u0e35\u0e48\u200b\u0e19\u0e31\u0e49\u0e19",
            2,
        ),  # thai, a space of no width between
        ("\u05e9\u05b8\u05c1\u05dc\u05d5\u05b9\u05dd", 1),  # hebrew with its points
        ("auto\u00admobil", 1),
    ],
)
def test_combining_marks_stay_in_their_words(line: str, words: int) -> None:
    tokens = letters_of(line)
    for form in ("NFC", "NFD"):
        ids = tokens.encode(unicodedata.normalize(form, line))
        assert sum(not tokens.is_inside_V[i] for i in ids) == words and UNK not in ids
    shown = unicodedata.normalize("NFD", line.replace("\u200b", " ").replace("\u00ad", ""))
    assert tokens.decode(tokens.encode(line)) == shown, "no mark is dropped"


def test_latin_greek_and_cyrillic_text_equals_uncased_bert() -> None:
    tokenizer, bert = _tokenizer({}), BertNormalizer(lowercase=True)
    rng = random.Random(0)
    letters = [
        chr(c)
        for c in (
            *range(1, 0x530),
            *range(0x1E00, 0x2000),
            *range(0x2010, 0x20D0),
            *range(0xAC00, 0xAC40),
        )
    ]
    letters += "\u4e2d\u3042\u00ad\u200c\u200d\ufeff"
    for line in ("".join(rng.choices(letters, k=50)) for _ in range(2000)):
        assert tokenizer.normalizer.normalize_str(line) == bert.normalize_str(line)


def test_offsets_refer_to_decomposed_text() -> None:
    hindi = "\u0928\u092e\u0938\u094d\u0924\u0947"
    tokens = letters_of(f"ete noel {hindi}")
    for form in ("NFC", "NFD"):
        words = [
            unicodedata.normalize(form, w)
            for w in (
                "\u00e9t\u00e9",
                "\u00ad",
                "No\u00ebl",
                "\u0928\u092e\u0938\u094d\u0924\u0947",
            )
        ]
        line = "  ".join(words)
        ids, offsets = tokens.encode_with_offsets(line)
        first = [at for i, at in zip(ids, offsets, strict=True) if not tokens.is_inside_V[i]]
        last = [
            *(b for a, b in zip(ids[1:], offsets, strict=False) if not tokens.is_inside_V[a]),
            offsets[-1],
        ]
        spans = [
            unicodedata.normalize("NFC", line[a:b])
            for (a, _), (_, b) in zip(first, last, strict=True)
        ]
        assert spans == ["\u00e9t\u00e9", "No\u00ebl", hindi]
