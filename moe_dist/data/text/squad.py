"""Questions about a text (SQuAD: Rajpurkar et al. 2016, 2018), from the Hub or from local files."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moe_dist.config.messages import nearest
from moe_dist.config.validate import MAX_COUNT
from moe_dist.data.files.messages import columns_of
from moe_dist.data.files.regular_file import open_file
from moe_dist.data.sampling import hold_out_splits
from moe_dist.data.text.corpus import (
    DATASET_NAME,
    OTHER_SPLIT_NAMES,
    SPLITS,
    Rows,
    is_local,
    open_rows,
)

SQUAD = {"squad": "rajpurkar/squad", "squad_v2": "rajpurkar/squad_v2"}
SPLIT_PREFIX = re.compile(r"(train|validation|valid|dev|test)(?![a-z])")  # of a file's name
COLUMNS = ("id", "question", "context", "answers")
HINT = "give 'squad', 'squad_v2', or a file or folder in SQuAD's own JSON"


@dataclass(frozen=True)
class Question:
    """A question with its context.

    Attributes:
        id: The identifier, unique in its split.
        question: The text of the question.
        context: The text that contains the answer.
        answers: The correct answers, each as (text, first character in the context). Empty if the
            question has no answer.
    """

    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]


def open_questions(source: str) -> dict[str, list[Question]]:
    """Reads the questions of "train", "valid" and "test".

    SQuAD does not publish its test split. If a source has no test split, its dev (validation) split
    is the test split. A split that is still missing is held out from train: a tenth of the
    contexts, at most 5,000.

    Args:
        source: "squad" or "squad_v2"; a file in SQuAD's JSON or a folder with such files
            (train*.json, dev*.json, ...); or a file, a folder or a Hub dataset with columns id,
            question, context and answers.

    Returns:
        The questions of each split.

    Raises:
        ValueError: The source is unknown, does not load or has another form, an id occurs twice in
            a split, or a split has no questions.
    """
    splits = {split: list(questions) for split, questions in _own_splits(source).items()}
    for split, questions in splits.items():
        _check_split(source, split, questions)
    if "train" not in splits:
        raise ValueError(
            f"data.questions={source!r} has no split 'train', only {', '.join(splits)}: "
            "give one that has"
        )
    if "test" not in splits and "valid" in splits:
        splits["test"] = splits.pop("valid")
    missing = [split for split in SPLITS if split not in splits]
    try:
        held_out = hold_out_splits(splits["train"], missing, lambda question: question.context)
    except ValueError as error:
        raise ValueError(
            f"data.questions={source!r}: {error}, or files for valid and test"
        ) from None
    return splits | held_out


def check_questions(source: str) -> None:
    """Checks the name of a source and the first question of each local file, without network.

    Args:
        source: The source, as for `open_questions`.

    Raises:
        ValueError: The source is neither a known name nor a file, or has another form.
    """
    if is_local(source):
        for questions in _own_splits(source).values():
            next(questions, None)
    else:
        _check_name(source)


def _check_split(source: str, split: str, questions: list[Question]) -> None:
    """Raises ValueError if a split has no questions, or two with the same id."""
    if not questions:
        raise ValueError(
            f"data.questions={source!r} has no question for {split!r}: give it some, or leave it "
            "out"
        )
    counts = Counter(question.id for question in questions)
    for question_id, count in counts.items():
        if count > 1:
            raise ValueError(
                f"data.questions={source!r}: id {question_id!r} is in {split!r} twice; "
                "give each its own"
            )


def _check_name(source: str) -> None:
    """Raises ValueError if `source` is neither a name in `SQUAD` nor the name of a Hub dataset."""
    is_hub_name = "/" in source and DATASET_NAME.fullmatch(source)
    if source in SQUAD or (is_hub_name and not source.endswith(".json")):
        return
    raise ValueError(
        f"data.questions={source!r}: no file matches and no dataset has this name; "
        f"{nearest(source, SQUAD)}, or {HINT}"
    )


def _own_splits(source: str) -> dict[str, Iterator[Question]]:
    """Returns the source's own splits, with names from `SPLITS` if possible."""
    path = Path(source)
    if path.suffix == ".json" and path.is_file():
        return {"train": _read_json(source, path)}
    if files := sorted(path.glob("*.json")):
        file_of_split = _files_by_split(source, files)
        return {split: _read_json(source, file) for split, file in file_of_split.items()}
    if not is_local(source):
        _check_name(source)
    name, _, configuration = source.partition(":")
    dataset = (SQUAD.get(name, name), configuration or None, None)
    splits = {}
    for split, rows in open_rows("data.questions", source, dataset, HINT).items():
        splits[OTHER_SPLIT_NAMES.get(split, split)] = _read_rows(source, rows)
    return splits


def _files_by_split(source: str, files: list[Path]) -> dict[str, Path]:
    """Returns the file of each split, by the beginning of its name."""
    file_of_split: dict[str, Path] = {}
    for file in files:
        match = SPLIT_PREFIX.match(file.name.lower())
        if not match:
            continue
        split = OTHER_SPLIT_NAMES.get(match[1], match[1])
        if split in file_of_split:
            raise ValueError(
                f"data.questions={source!r}: {file_of_split[split].name} and {file.name} are both "
                f"{split!r}"
            )
        file_of_split[split] = file
    if "train" not in file_of_split:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"data.questions={source!r} has no train*.json, only {names}")
    return file_of_split


def _read_json(source: str, path: Path) -> Iterator[Question]:
    """Yields the questions of a file in SQuAD's JSON."""
    try:
        with open_file(path) as file:
            content = json.loads(file.read().decode("utf-8-sig"))
        for article in content["data"]:
            for paragraph in article["paragraphs"]:
                for entry in paragraph["qas"]:
                    answers = [] if entry.get("is_impossible") else entry["answers"]
                    pairs = tuple((answer["text"], answer["answer_start"]) for answer in answers)
                    yield _checked(
                        Question(entry["id"], entry["question"], paragraph["context"], pairs)
                    )
    # There are many kinds of errors: no file, no UTF-8, no JSON, or JSON of any other form.
    except Exception as error:
        reason = _form_error(error)
        raise ValueError(f"data.questions={source!r}: {path.name} {reason}") from None


def _read_rows(source: str, rows: Rows) -> Iterator[Question]:
    """Yields the question of each row of a table."""
    for number, row in enumerate(rows, start=1):
        missing = [name for name in COLUMNS if name not in row]
        if missing:
            raise ValueError(
                f"data.questions={source!r} has no column {missing[0]!r}, "
                f"only {columns_of(row)}: {HINT}"
            )
        try:
            pairs = tuple(zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True))
            yield _checked(Question(row["id"], row["question"], row["context"], pairs))
        except Exception as error:  # many kinds, as in `_read_json`
            reason = _form_error(error)
            raise ValueError(f"data.questions={source!r}: row {number} {reason}") from None


def _form_error(error: Exception) -> str:
    """Returns the end of an error about a file or row, on one line.

    The text of a UnicodeDecodeError is left out, because it contains the bytes of the file.
    """
    if isinstance(error, UnicodeDecodeError):
        reason = "no UTF-8"
    else:
        reason = f"{type(error).__name__}: {error}"
    return f"is not in SQuAD's form ({' '.join(reason.split()):.200}); {HINT}"


def _checked(question: Question) -> Question:
    """Returns the question if it is valid.

    Raises TypeError if a text is not a string or a position not a small integer, and ValueError if
    a text has half of a surrogate pair.
    """
    texts = [question.id, question.question, question.context]
    texts += [text for text, _ in question.answers]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("an id, question, context or answer is not a string")
    for _, start in question.answers:
        if not isinstance(start, int) or abs(start) > MAX_COUNT:
            raise TypeError(
                f"question {question.id!r} has an answer whose first character is not an integer "
                f"within -{MAX_COUNT} .. {MAX_COUNT}"
            )
    "".join(texts).encode()
    return question
