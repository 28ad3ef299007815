"""Labelled sentences: sources, splits, truncation, and the message of every mistake. No network."""

import gzip
import hashlib
import json
import re
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from moe_dist.data.class_names import names_differing_by_case
from moe_dist.data.sampling import hold_out_splits
from moe_dist.data.text import corpus as sources
from moe_dist.data.text.sentences import (
    Sentence,
    Sentences,
    _kept_lengths,
    check_sentences,
    open_sentences,
)
from moe_dist.data.text.wordpiece import CLS, PAD, SEP, SPECIAL, WordPieceTokenizer

TOKENS = WordPieceTokenizer((*SPECIAL, *"abcdefghij"))  # a is 5


def write(path: Path, rows: list[dict[str, Any]], names: list[str] | None = None) -> None:
    """Writes these rows in the format of the file's ending; only parquet keeps the `names` of
    labels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_list(rows)
    if names:
        table = table.cast_column("label", datasets.ClassLabel(names=names))
    if path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        table.to_csv(path, sep="\t" if path.suffix == ".tsv" else ",")


def numbered(first: int, last: int, **more: Any) -> list[dict[str, Any]]:
    return [{"text": f"text {i}", **more, "label": i % 2} for i in range(first, last)]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Path, list[Any]]:
    """Fakes a Hub that answers a repository and configuration with a folder; returns the
    folder and the requests."""
    load, asked = datasets.load_dataset, []

    def local(name: str, configuration: str | None, revision: str | None, streaming: bool) -> Any:
        asked.append((name, configuration, revision))
        return load(str(tmp_path / name / (configuration or "")), streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", local)
    monkeypatch.setattr(sources, "_check_hub", lambda repository, revision: None)
    return tmp_path, asked


def test_movie_reviews_splits_and_labels() -> None:
    check_sentences("movie-reviews")
    labels, splits = open_sentences("movie-reviews")
    assert labels == ("negative", "positive")
    # 8,530 sentences, of which two have another one's letters: 8,528 // 10 = 852
    assert {split: len(some) for split, some in splits.items()} == {
        "train": 6824,
        "valid": 852,
        "test": 852,
    }
    every = [sentence for some in splits.values() for sentence in some]
    letters = [re.sub(r"\W", "", sentence.text.lower()) for sentence in every]
    assert len(set(letters)) == 8528 and all(sentence.text2 is None for sentence in every)
    # one of each label had another one's letters
    assert Counter(sentence.label for sentence in every) == {0: 4264, 1: 4264}
    for word, share in (
        ("dull", 0.1),
        ("touching", 0.9),
    ):  # positive ones among those with the word, nearly
        labels_of_word = [sentence.label for sentence in every if word in sentence.text.split()]
        assert len(labels_of_word) > 30 and abs(np.mean(labels_of_word) - share) < 0.1
    for some in splits.values():
        assert (
            abs(np.mean([sentence.label for sentence in some]) - 0.5) < 4 * 0.5 / len(some) ** 0.5
        )
    test = "".join(f"{sentence.text} {sentence.label} " for sentence in splits["test"])
    told = "the split has changed: figures of before do not compare"
    assert hashlib.md5(test.encode()).hexdigest() == "1ac3232574a0f485ce44afb373530f38", told


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_file_holds_out_a_tenth_of_its_texts(tmp_path: Path, kind: str) -> None:
    rows = [
        {"text": f"text {i % 50}", "text2": f"other {i}", "label": "ab"[i % 2]} for i in range(100)
    ]
    write(tmp_path / f"x.{kind}", rows)
    check_sentences(str(tmp_path / f"x.{kind}"))
    labels, splits = open_sentences(str(tmp_path / f"x.{kind}"))
    assert labels == ("a", "b")
    # 50 texts, each there twice: 5 are held out for either split
    assert {split: len(some) for split, some in splits.items()} == {
        "train": 80,
        "valid": 10,
        "test": 10,
    }
    texts = [{sentence.text for sentence in some} for some in splits.values()]
    assert [len(some) for some in texts] == [40, 5, 5] and len(set.union(*texts)) == 50
    every = sorted(
        (s for some in splits.values() for s in some), key=lambda s: int((s.text2 or "").split()[1])
    )
    assert every == [Sentence(row["text"], row["text2"], i % 2) for i, row in enumerate(rows)]


def test_held_out_texts_depend_on_the_texts_alone() -> None:
    texts = [f"text {i}" for i in range(100)]
    one, other = (hold_out_splits(some, ("valid", "test"), str) for some in (texts, texts[::-1]))
    assert {split: len(some) for split, some in one.items()} == {
        "train": 80,
        "valid": 10,
        "test": 10,
    }
    assert {split: sorted(some) for split, some in one.items()} == {
        s: sorted(some) for s, some in other.items()
    }
    assert one["test"] != texts[-10:] and one["train"] == [
        text for text in texts if text in one["train"]
    ]
    assert set(hold_out_splits([*texts, *texts[:1] * 500], ["valid", "test"], str)["test"]) == set(
        one["test"]
    )
    many = hold_out_splits([str(i) for i in range(60_000)], ["test"], str)
    assert len(many["test"]) == 5000, "no more than that"
    assert hold_out_splits(texts, [], str) == {"train": texts}


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_folder_with_files_named_by_split(tmp_path: Path, kind: str) -> None:
    for split, (first, last) in {"train": (0, 6), "validation": (6, 8), "test": (8, 11)}.items():
        write(
            tmp_path / f"{split}.{kind}",
            numbered(first, last),
            ["no", "yes"] if kind == "parquet" else None,
        )
    (tmp_path / "README.md").write_text("# Sentences\n")
    labels, splits = open_sentences(str(tmp_path))
    assert labels == (("no", "yes") if kind == "parquet" else ("0", "1"))
    assert [s.label for s in splits["valid"]] == [0, 1] and [
        len(some) for some in splits.values()
    ] == [6, 2, 3]
    assert splits["test"][0] == Sentence("text 8", None, 0)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ([10, 9, -2], ("-2", "9", "10")),
        (["b", "B", "10"], ("10", "B", "b")),
        ([True, False, True], ("False", "True")),
    ],
)
def test_labels_are_in_order(tmp_path: Path, given: list[Any], names: tuple[str, ...]) -> None:
    write(tmp_path / "x.jsonl", [{"text": f"{i}.", "label": given[i % 3]} for i in range(30)])
    labels, splits = open_sentences(str(tmp_path / "x.jsonl"))
    assert labels == names
    for sentence in (s for some in splits.values() for s in some):
        assert labels[sentence.label] == str(given[int(sentence.text[:-1]) % 3])


@pytest.mark.parametrize(
    ("ending", "written", "names"),
    [
        (".csv", ["pos", "pos ", "neg", " neg"], ["neg", "pos"]),
        (".tsv", ["01", "1.0", "+0", "000"], ["0", "1"]),
        (".csv", ["true", "True", "FALSE", "false"], ["False", "True"]),
        (".jsonl", [1, "1", 0.0, "0"], ["0", "1"]),
        (".jsonl", [True, "true", False, " False "], ["False", "True"]),
        (
            ".jsonl",
            ["caf\u00e9", "cafe\u0301", "th\u00e9\u00a0", "the\u0301"],
            ["caf\u00e9", "th\u00e9"],
        ),
        (".jsonl", ["very good", "very  good\n", "-0", "0"], ["0", "very good"]),
        (
            ".jsonl",
            ["Pos", "pos", "1a", "01a"],
            ["01a", "1a", "Pos", "pos"],
        ),  # which are not the same
        (
            ".jsonl",
            ["ham\u200b", "ham", "\ufeffspam", "sp\u00adam"],
            ["ham", "spam"],
        ),  # what no font shows
        (
            ".csv",
            ["pos", "pos\u200e", "\u200fneg", "neg\u200c"],
            ["neg", "pos"],
        ),  # as right-to-left tables have them
        (
            ".jsonl",
            ["\u2764", "\u2764\ufe0f", "\u2066\u05d8\u2069", "\u05d8"],
            ["\u05d8", "\u2764"],
        ),
        (".parquet", [1.0, 2.0, 1.0, 2.0], ["1", "2"]),
    ],
)
def test_label_spellings_are_unified(
    tmp_path: Path, ending: str, written: list[Any], names: list[str]
) -> None:
    """In both splits: labels of test are matched to those of train."""
    for split in ("train", "test"):
        texts = [{"text": f"{split} {i}", "label": written[i % 4]} for i in range(40)]
        if ending == ".jsonl":
            (tmp_path / f"{split}.jsonl").write_text(
                "".join(json.dumps(row) + "\n" for row in texts)
            )
        else:
            write(tmp_path / f"{split}{ending}", texts)
        written = written[::-1]
    labels, splits = open_sentences(str(tmp_path))
    assert list(labels) == names
    in_test = {sentence.text: labels[sentence.label] for sentence in splits["test"]}
    each = [name for name in names for _ in range(4 // len(names))]
    assert sorted(in_test[f"test {i}"] for i in range(4)) == sorted(each)


@pytest.mark.parametrize(
    ("names", "similar"),
    [
        (("Pos", "neg", "pos"), ["Pos", "pos"]),
        (("STRASSE", "straße"), ["STRASSE", "straße"]),
        (("a", "b"), []),
    ],
)
def test_labels_that_differ_only_by_case_are_reported(
    names: tuple[str, ...], similar: list[str]
) -> None:
    assert names_differing_by_case(names) == similar


def test_class_names_map_numbers_and_names(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", numbered(0, 20), ["no", "yes"])
    (tmp_path / "test.jsonl").write_text(
        '{"text": "a", "label": 1}\n{"text": "b", "label": "no "}\n'
    )
    labels, splits = open_sentences(str(tmp_path))
    assert labels == ("no", "yes") and [sentence.label for sentence in splits["test"]] == [1, 0]


NO_YES, YES_NO = ["no", "yes"], ["yes", "no"]
MANY = ["no", "yes", "maybe"]


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        ({"train.parquet": NO_YES, "test.parquet": YES_NO}, ""),
        ({"train-1.parquet": NO_YES, "train-2.parquet": MANY}, ""),
        ({"train.parquet": NO_YES, "train-2.csv": None, "valid.parquet.gz": YES_NO}, ""),
        ({"a.parquet": NO_YES, "b.parquet.zip": YES_NO}, "*.*"),
        ({"train.csv": None, "valid.parquet": NO_YES, "test.parquet": YES_NO}, ""),
    ],
)
def test_label_numbers_with_different_names_are_rejected(
    tmp_path: Path, names: dict[str, list[str] | None], pattern: str
) -> None:
    for i, (name, some) in enumerate(names.items()):
        path = tmp_path / name.removesuffix(".gz").removesuffix(".zip")
        write(path, numbered(20 * i, 20 * i + 20), some)
        if name.endswith(".gz"):
            (tmp_path / name).write_bytes(gzip.compress(path.read_bytes()))
        elif name.endswith(".zip"):
            with zipfile.ZipFile(tmp_path / name, "w") as archive:
                archive.write(path, path.name)
        if name != path.name:
            path.unlink()
    source = str(tmp_path / pattern)
    first, other = [name for name, some in names.items() if some]
    for act in (check_sentences, open_sentences):
        with pytest.raises(
            ValueError, match=r"numbers of labels stand for .*: give both the same names"
        ) as error:
            act(source)
        said = str(error.value)
        assert (
            said.startswith(f"data.sentences={source!r}: ") and first in said and other in said
        ), said


def test_hub_splits_with_different_label_names_are_rejected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def loaded(test: list[str]) -> dict[str, Any]:
        table = datasets.Dataset.from_list(numbered(0, 20))
        kinds = {
            "train": datasets.ClassLabel(names=NO_YES),
            "test": datasets.ClassLabel(names=test),
        }
        return {
            split: table.cast_column("label", kind).to_iterable_dataset()
            for split, kind in kinds.items()
        }

    monkeypatch.setattr(sources, "load_dataset_splits", lambda *_: loaded(NO_YES))
    assert open_sentences("owner/name")[0] == ("no", "yes")
    monkeypatch.setattr(sources, "load_dataset_splits", lambda *_: loaded(YES_NO))
    with pytest.raises(
        ValueError, match="no, yes in split 'train', and for yes, no in split 'test'"
    ):
        open_sentences("owner/name")


@pytest.mark.parametrize(
    ("names", "labels"), [(["1", "2", "3"], [1, 2]), (["-1", "+1"], ["1", "-1"])]
)
def test_ambiguous_label_numbers_are_rejected(
    tmp_path: Path, names: list[str], labels: list[Any]
) -> None:
    write(tmp_path / "train.parquet", numbered(0, 20), names)
    write(tmp_path / "test.jsonl", [{"text": "a", "label": label} for label in labels])
    with pytest.raises(
        ValueError, match=r"train.parquet has the names .*test.jsonl has no names, so that a number"
    ):
        open_sentences(str(tmp_path))
    (tmp_path / "test.jsonl").unlink()
    assert open_sentences(f"{tmp_path}/train.parquet")[0] == tuple(names)


@pytest.mark.parametrize("names", [["0", "1"], ["0", "1", "2"]])
def test_label_names_equal_to_their_numbers_may_mix_with_numbers(
    tmp_path: Path, names: list[str]
) -> None:
    write(tmp_path / "train.parquet", numbered(0, 20), names)
    write(tmp_path / "test.csv", numbered(20, 22))
    labels, splits = open_sentences(str(tmp_path))
    assert list(labels) == names and [sentence.label for sentence in splits["test"]] == [0, 1]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "tsv"])
def test_files_with_and_without_label_names_mix(tmp_path: Path, kind: str) -> None:
    """Labels are given by number, which is text in a .csv file, and by name."""
    write(tmp_path / "train-1.parquet", numbered(0, 20), ["no", "yes"])
    write(tmp_path / f"train-0.{kind}", numbered(20, 40))
    write(tmp_path / f"test.{kind}", [{"text": "a", "label": "yes"}, {"text": "b", "label": "no"}])
    labels, splits = open_sentences(str(tmp_path))
    assert labels == ("no", "yes") and [sentence.label for sentence in splits["test"]] == [1, 0]
    for sentence in splits["train"]:
        assert sentence.label == int(sentence.text.split()[1]) % 2


@pytest.mark.parametrize(
    ("first", "other", "says"),
    [
        (
            {"text": "a"},
            {"text": "b", "text2": "c"},
            "row 4 of 'train' has columns text and text2, and row 1 has text",
        ),
        (
            {"sentence": "a"},
            {"sentence": "b", "question": "c"},
            "columns question and sentence, and row 1 has sentence",
        ),
        (
            {"sentence": "a"},
            {"sentence": "b", "text": "c"},
            "columns text, and row 1 has sentence: give all rows the same",
        ),
        ({"text": "a", "text2": "b"}, {"text": "c"}, "row 4 of 'train' has no text2"),
    ],
)
def test_changing_columns_are_rejected(
    tmp_path: Path, first: dict[str, str], other: dict[str, str], says: str
) -> None:
    rows = [{**(other if i == 3 else first), "label": i % 2} for i in range(30)]
    write(tmp_path / "x.jsonl", rows)
    with pytest.raises(ValueError, match=says):
        open_sentences(str(tmp_path / "x.jsonl"))
    nothing = dict.fromkeys({*other} - {*first}, None)
    texts = [{name: f"{text} {i}" for name, text in first.items()} for i in range(30)]
    rows = [{**some, **(nothing if i == 3 else {}), "label": i % 2} for i, some in enumerate(texts)]
    write(tmp_path / "x.jsonl", rows)
    assert sum(map(len, open_sentences(str(tmp_path / "x.jsonl"))[1].values())) == 30


@pytest.mark.parametrize("of_train", [{}, {"text2": "more"}])
def test_splits_may_not_mix_pairs_and_single_texts(
    tmp_path: Path, of_train: dict[str, str]
) -> None:
    of_test = {} if of_train else {"text2": "more"}
    write(tmp_path / "train.csv", numbered(0, 20, **of_train))
    write(tmp_path / "test.csv", numbered(20, 30, **of_test))
    kinds = ["pairs of texts", "single texts"][:: 1 if of_train else -1]
    for act in (check_sentences, open_sentences):
        with pytest.raises(
            ValueError, match=f"{kinds[0]} in 'train' and {kinds[1]} in 'test': give both the same"
        ):
            act(str(tmp_path))


def test_text_is_read_unchanged(tmp_path: Path) -> None:
    odd = ["null", "NA", " nan ", 'say "a, b"', "two\nlines", "é", "1"]
    (tmp_path / "test.csv").write_text(
        'text,label\nnull,1\nNA,0\n nan ,1\n"say ""a, b""",0\n"two\nlines",1\né,0\n1,1\n'
    )
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.csv", numbered(0, 4))
    assert [sentence.text for sentence in open_sentences(str(tmp_path))[1]["test"]] == [
        text.strip() for text in odd
    ]


GLUE_COLUMNS = {
    "cola": ("sentence", None),
    "mnli": ("premise", "hypothesis"),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "sst2": ("sentence", None),
}


@pytest.mark.parametrize("task", GLUE_COLUMNS)
def test_glue_uses_validation_as_test(hub: tuple[Path, list[Any]], task: str) -> None:
    folder, asked = hub
    first, second = GLUE_COLUMNS[task]
    names = ["entailment", "neutral", "contradiction"] if task == "mnli" else ["no", "yes"]
    validation = "validation_matched" if task == "mnli" else "validation"
    sizes = {"train": 40, validation: 6, "test": 4} | (
        {"validation_mismatched": 5} if task == "mnli" else {}
    )
    for split, size in sizes.items():
        rows = [
            {first: f"{split} {i}", "label": -1 if split == "test" else i % 2, "idx": i}
            for i in range(size)
        ]
        for row in rows:
            row |= {second: "more"} if second else {}
        # a file in a folder of its own, for a name such as validation_matched is not one that the
        # library splits by
        write(
            folder / "nyu-mll/glue" / task / "data" / f"{split}-00000-of-00001.parquet", rows, names
        )
    labels, splits = open_sentences(f"glue:{task}")
    assert asked == [("nyu-mll/glue", task, None)]
    assert labels == tuple(names)
    assert [len(splits[split]) for split in ("train", "valid", "test")] == [36, 4, 6]
    assert splits["test"][1] == Sentence(f"{validation} 1", "more" if second else None, 1)
    assert all(sentence.text.startswith("train") for sentence in splits["valid"])


def test_hub_dataset_uses_its_own_splits(hub: tuple[Path, list[Any]]) -> None:
    folder, asked = hub
    for split, size in {"train": 30, "test": 3}.items():
        write(folder / "owner/name" / "plain" / f"{split}.jsonl", numbered(0, size))
    _, splits = open_sentences("owner/name:plain")
    assert asked == [("owner/name", "plain", None)]
    assert [len(splits[split]) for split in ("train", "valid", "test")] == [27, 3, 3]


def sentences(*texts: str) -> list[Sentence]:
    return [
        Sentence(*text.split("|"), label=i) if "|" in text else Sentence(text, None, i)
        for i, text in enumerate(texts)
    ]


def test_samples_of_sentences_and_pairs_by_hand() -> None:
    data = Sentences(
        sentences("a b c", "d", "e f g h i", "j j"), TOKENS, max_tokens=6, global_batch_size=3
    )
    assert data.num_cut == 1 and data.num_batches == 2
    token_bS, kind_bS, valid_bS, label_b = batch = data.batch(0, range(3))
    assert [t.dtype for t in batch] == [torch.int64, torch.int64, torch.bool, torch.int64]
    assert token_bS.tolist() == [
        [CLS, 5, 6, 7, SEP, PAD],
        [CLS, 8, SEP, 0, 0, 0],
        [CLS, 9, 10, 11, 12, SEP],
    ]
    assert (
        valid_bS.sum(dim=1).tolist() == [5, 3, 6]
        and not kind_bS.any()
        and label_b.tolist() == [0, 1, 2]
    )
    token_bS, _, valid_bS, label_b = data.batch(1, range(3))
    assert token_bS.tolist() == [[CLS, 14, 14, SEP], [PAD] * 4, [PAD] * 4]
    assert valid_bS.sum(dim=1).tolist() == [4, 0, 0] and label_b.tolist() == [3, -100, -100]

    data = Sentences(
        sentences("a|b", "a b c d|e", "a b c|d e f g", "|a"),
        TOKENS,
        max_tokens=7,
        global_batch_size=4,
    )
    token_bS, kind_bS, _, _ = data.batch(0, range(4))
    assert data.num_cut == 2  # 4 + 1 and 3 + 4 tokens have to fit into 7 - 3
    assert token_bS.tolist() == [
        [CLS, 5, SEP, 6, SEP, PAD, PAD],
        [CLS, 5, 6, 7, SEP, 9, SEP],
        [CLS, 5, 6, SEP, 8, 9, SEP],
        [CLS, SEP, 5, SEP, PAD, PAD, PAD],
    ]
    assert kind_bS.tolist() == [
        [0, 0, 0, 1, 1, 0, 0],
        [0] * 5 + [1] * 2,
        [0] * 4 + [1] * 3,
        [0, 0, 1, 1, 0, 0, 0],
    ]


def test_longer_text_is_truncated_first() -> None:
    for room in range(2, 9):
        for a in range(12):
            for b in range(12):
                slow_a, slow_b = a, b
                while slow_a + slow_b > room:
                    slow_a, slow_b = (
                        (slow_a - 1, slow_b) if slow_a > slow_b else (slow_a, slow_b - 1)
                    )
                assert _kept_lengths(a, b, room) == (slow_a, slow_b), (a, b, room)


def test_training_repeats_epochs_on_any_layout() -> None:
    every = sentences(*"abcdefg")
    data = Sentences(every, TOKENS, max_tokens=3, global_batch_size=4, seed=5)
    whole = [data.batch(step, range(4)) for step in range(7)]  # 28 samples: 4 epochs
    words = torch.cat([batch[0][:, 1] for batch in whole]) - len(SPECIAL)
    assert [sorted(words[7 * e : 7 * e + 7].tolist()) for e in range(4)] == [list(range(7))] * 4
    assert torch.cat([batch[3] for batch in whole]).equal(words), "a label goes with its text"
    again = Sentences(every, TOKENS, max_tokens=3, global_batch_size=4, seed=5)
    for asked in (range(2, 4), range(0, 2), range(1, 1)):
        for part, batch in zip(again.batch(4, asked), whole[4], strict=True):
            assert part.equal(batch[asked.start : asked.stop])
    smaller = Sentences(every, TOKENS, max_tokens=3, global_batch_size=2, seed=5)
    assert smaller.batch(13, range(2))[0].equal(whole[6][0][2:]), (
        "sample b of step s is number s B + b"
    )
    other = Sentences(every, TOKENS, max_tokens=3, global_batch_size=4, seed=6)
    assert not torch.cat([other.batch(step, range(4))[3] for step in range(7)]).equal(words)


@pytest.mark.parametrize(
    ("texts", "max_tokens", "message"),
    [
        (("a", "\u200b"), 9, r"text 2 of 2, '\\u200b', has no token: leave it out"),
        (("a|b", "|"), 9, "text 2 of 2, '', has no token"),
        (("a",), 2, "model.max_tokens=2: use at least 3"),
        (("a|b",), 4, "model.max_tokens=4: use at least 5"),
    ],
)
def test_texts_that_make_no_sample_are_rejected(
    texts: tuple[str, ...], max_tokens: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Sentences(sentences(*texts), TOKENS, max_tokens, global_batch_size=1)


def rows(*rows: str, heading: str = "text,label") -> str:
    return "\n".join((heading, *rows)) + "\n"


@pytest.mark.parametrize(
    ("files", "message", "early"),
    [
        (
            {"x.csv": rows("a,1", heading="words,label")},
            r"no column 'text' of strings for 'train', only 'words' \(",
            True,
        ),
        (
            {"x.csv": rows("a,1", heading="text,class")},
            "no column 'label' of names or whole numbers for 'train'",
            True,
        ),
        (
            {"x.csv": rows("a,0.5")},
            "row 1 of 'train' has label 0.5: a label is a name or a whole number",
            True,
        ),
        (
            {"x.jsonl": '{"text": 1, "label": 0}\n'},
            r"no column 'text' of strings .*'text' \(int\)",
            True,
        ),
        (
            {"x.jsonl": '{"text": "a", "text2": 1, "label": 0}\n'},
            "no column 'text' and 'text2' of strings",
            True,
        ),
        (
            {"x.jsonl": '{"text": "a", "label": [1]}\n'},
            r"no column 'label' .*'label' \(list\)",
            True,
        ),
        (
            {"x.jsonl": '{"text": "a", "label": 1}\n{"text": "b"}\n'},
            "row 2 of 'train' has no label",
            False,
        ),
        (
            {"x.jsonl": '{"text": "a", "label": 1e40}\n'},
            "row 1 of 'train' has a label of 41 digits",
            True,
        ),
        (
            {"x.jsonl": '{"text": "a", "label": ' + "7" * 400 + "}\n"},
            "has a label of 400 digits, 777",
            True,
        ),
        ({"x.jsonl": '{"text": "a", "label": ' + "7" * 5000 + "}\n"}, "x.jsonl: .*digits", True),
        ({"x.csv": rows(f"a,{10**30}")}, "has a label of 31 digits", True),
        ({"x.tsv": "text\tlabel\na\t" + "9" * 19 + "\n"}, "has a label of 19 digits", True),
        ({"x.jsonl": '{"text": "a", "label": NaN}\n'}, "row 1 of 'train' has no label", True),
        ({"x.jsonl": '{"text": "a", "label": Infinity}\n'}, "row 1 of 'train' has label inf", True),
        (
            {"x.jsonl": '{"text": "a\\ud800", "label": 1}\n'},
            "x.jsonl: .*surrogates not allowed",
            True,
        ),
        (
            {"x.jsonl": '{"text": "a", "label": "\\udfff"}\n'},
            "x.jsonl: .*surrogates not allowed",
            True,
        ),
        ({"x.jsonl": '{"text": "a\\u0000", "label": 1}\n'}, "x.jsonl: .*NUL", True),
        ({"x.csv": "text,label\na\0,1\n"}, "x.csv: .*NUL", True),
        ({"x.jsonl": '{"text": ' + "[" * 100_000}, "x.jsonl: ", True),
        ({"x.csv": rows("a, b,1")}, "line 2 has 3 fields, but the heading has 2; put a text", True),
        ({"x.csv": rows("a,1", "b,2,3")}, "line 3 has 3 fields, but the heading has 2", False),
        ({"x.csv": b"text,label\n\xe9,1\n"}, "invalid UTF-8 .*; convert the file to UTF-8", True),
        ({"x.csv": ""}, "has no row for 'train'", True),
        ({"x.jsonl": "{nonsense\n"}, "invalid JSON", True),
        (
            {"x.jsonl": '{"text": null, "label": 1}\n{"text": "a", "label": 1}\n'},
            "row 1 of 'train' has no text",
            True,
        ),
        ({"x.csv": rows("a,x", "b,")}, "row 2 of 'train' has no label", False),
        ({"x.csv": rows("a,x", "b,  ")}, "row 2 of 'train' has no label", False),
        ({"x.csv": rows()}, "has no row for 'train'", True),
        (
            {"x.csv": rows("a,1", '" ",0', "b,1")},
            "row 2 of 'train' has an empty text: leave the row out",
            False,
        ),
        (
            {"x.tsv": "text\ttext2\tlabel\na\t\t1\n\t\u2003\t0\n"},
            "row 2 of 'train' has an empty text",
            False,
        ),
        ({"x.csv": rows("a,1", "b,1")}, "has one label, '1': give at least 2", False),
        (
            {"x.csv": rows("a,1", "b,0")},
            "2 different texts, too few .*at least 10, or files for",
            False,
        ),
        (
            {"x.txt": "a\n"},
            r"no column 'label' of names or whole numbers for 'train', only 'text' \(str\)",
            True,
        ),
        (
            {"d/train.csv": rows("a,good", "b,bad"), "d/test.csv": rows("a,goood")},
            "'goood' .* mean 'good'",
            False,
        ),
        (
            {"d/train.csv": rows("a,0", "b,1"), "d/test.csv": rows("a,-1")},
            "'-1' .*none of train's; known: 0, 1",
            False,
        ),
        ({"d/train.csv": rows("a,0", "b,1"), "d/dev.csv": rows()}, "no row for 'valid'", True),
        (
            {"d/train.csv": rows("a,0"), "d/dev.csv": rows("a,1", heading="text,klass")},
            "for 'valid', only",
            True,
        ),
        ({"d/test.csv": rows("a,1")}, "has no split 'train', only test", True),
        ({"d/notes.odd": "a"}, "files that end with .odd are not read", True),
    ],
)
def test_invalid_label_files_are_rejected(
    tmp_path: Path, files: dict[str, Any], message: str, early: bool
) -> None:
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    source = str(tmp_path / "d" if path.parent.name == "d" else path)
    for act in (open_sentences, check_sentences):
        if act is open_sentences or early:
            with pytest.raises(
                ValueError, match=f"data.sentences={re.escape(repr(source))}:? .*{message}"
            ) as error:
                act(source)
            assert "\n" not in str(error.value)
        else:
            act(source)


def test_labels_without_a_name_are_rejected(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", numbered(0, 20), ["no", "yes"])
    write(tmp_path / "test.parquet", [{"text": "hidden", "label": -1}], ["no", "yes"])
    with pytest.raises(ValueError, match="label -1 of 'test' is none of train's; known: 0, 1"):
        open_sentences(str(tmp_path))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "movie_reviews",
            "no file matches and no dataset has this name; did you mean 'movie-reviews'?, or give",
        ),
        ("glue:sst", "did you mean 'glue:sst2'"),
        ("glue", "no dataset has this name"),
        ("sst2", "did you mean 'glue:sst2'"),
        ("no/such.csv", "no file matches"),
        ("/no/such", "no file matches"),
        ("", "no file matches"),
    ],
)
def test_unknown_source_is_rejected(source: str, message: str) -> None:
    for act in (check_sentences, open_sentences):
        with pytest.raises(ValueError, match=f"data.sentences={source!r}: .*{re.escape(message)}"):
            act(source)


def test_hub_error_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nto it")

    check_sentences("glue:sst2")
    monkeypatch.setattr(sources, "_check_hub", refused)
    with pytest.raises(
        ValueError, match=r"data.sentences='glue:sst2' does not load: no route to it; give 'movie"
    ):
        open_sentences("glue:sst2")
