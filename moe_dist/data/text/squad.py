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
from moe_dist.data.text.corpus import NAME, OTHER_NAMES, SPLITS, Rows, is_local, open_rows

SQUAD = {"squad": "rajpurkar/squad", "squad_v2": "rajpurkar/squad_v2"}
SPLIT = re.compile(r"(train|validation|valid|dev|test)(?![a-z])")  # that a file's name begins with
COLUMNS = ("id", "question", "context", "answers")
GIVE = "give 'squad', 'squad_v2', or a file or folder in SQuAD's own JSON"


@dataclass(frozen=True)
class Question:
    """`answers`: (text, its first character in the context), any of which will do; none where it has no answer."""

    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]


def open_questions(source: str) -> dict[str, list[Question]]:
    """Questions of "train", "valid" and "test": "squad" or "squad_v2", a file in SQuAD's JSON, a folder of them
    (train*.json, dev*.json, ...), or a file, a folder or a dataset of the Hub with columns id, question, context and
    answers.

    SQuAD keeps its test to itself: where there is none, its dev (validation) is the test. What is still missing is held
    out of train, a tenth of the contexts, at most 5,000. Raises ValueError for an unknown name, what does not load or
    is in another form, an id that is there twice, and a split without questions.
    """
    found = {split: list(questions) for split, questions in _own_splits(source).items()}
    for split, questions in found.items():
        if not questions:
            raise ValueError(
                f"data.questions={source!r} has no question for {split!r}: give it some, or leave it out"
            )
        twice = [
            id_
            for id_, count in Counter(question.id for question in questions).items()
            if count > 1
        ]
        if twice:
            raise ValueError(
                f"data.questions={source!r}: id {twice[0]!r} is in {split!r} twice; give each its own"
            )
    if "train" not in found:
        raise ValueError(
            f"data.questions={source!r} has no split 'train', only {', '.join(found)}: give one that has"
        )
    if "test" not in found and "valid" in found:
        found["test"] = found.pop("valid")
    try:
        missing = [split for split in SPLITS if split not in found]
        return found | hold_out_splits(found["train"], missing, lambda question: question.context)
    except ValueError as error:
        raise ValueError(
            f"data.questions={source!r}: {error}, or files for valid and test"
        ) from None


def check_questions(source: str) -> None:
    """A look at the name, and at the first question of each local file, for which no network is asked. Raises
    ValueError for what is neither known nor there, or is in another form."""
    if is_local(source):
        for questions in _own_splits(source).values():
            next(questions, None)
    else:
        _check_name(source)


def _check_name(source: str) -> None:
    if not (
        source in SQUAD
        or ("/" in source and NAME.fullmatch(source) and not source.endswith(".json"))
    ):
        raise ValueError(
            f"data.questions={source!r}: no file matches and no set is called so; {nearest(source, SQUAD)}, or {GIVE}"
        )


def _own_splits(source: str) -> dict[str, Iterator[Question]]:
    """What the source has, by our names of splits."""
    path = Path(source)
    if path.suffix == ".json" and path.is_file():
        return {"train": _from_json(source, path)}
    if files := sorted(path.glob("*.json")):
        return {split: _from_json(source, file) for split, file in _by_split(source, files).items()}
    if not is_local(source):
        _check_name(source)
    name, _, configuration = source.partition(":")
    loaded = open_rows(
        "data.questions", source, (SQUAD.get(name, name), configuration or None, None), GIVE
    )
    return {
        OTHER_NAMES.get(split, split): _from_rows(source, rows) for split, rows in loaded.items()
    }


def _by_split(source: str, files: list[Path]) -> dict[str, Path]:
    of: dict[str, Path] = {}
    for file in files:
        if match := SPLIT.match(file.name.lower()):
            split = OTHER_NAMES.get(match[1], match[1])
            if split in of:
                raise ValueError(
                    f"data.questions={source!r}: {of[split].name} and {file.name} are both {split!r}"
                )
            of[split] = file
    if "train" not in of:
        raise ValueError(
            f"data.questions={source!r} has no train*.json, only {', '.join(f.name for f in files)}"
        )
    return of


def _from_json(source: str, path: Path) -> Iterator[Question]:
    try:
        with open_file(path) as file:
            read = json.loads(file.read().decode("utf-8-sig"))
        for article in read["data"]:
            for paragraph in article["paragraphs"]:
                for asked in paragraph["qas"]:
                    answers = [] if asked.get("is_impossible") else asked["answers"]
                    pairs = tuple((answer["text"], answer["answer_start"]) for answer in answers)
                    yield _checked(
                        Question(asked["id"], asked["question"], paragraph["context"], pairs)
                    )
    except (
        Exception
    ) as error:  # of many kinds: no file, no UTF-8, no JSON, or JSON of any other form
        raise ValueError(f"data.questions={source!r}: {path.name} {_no_form(error)}") from None


def _from_rows(source: str, rows: Rows) -> Iterator[Question]:
    for number, row in enumerate(rows, start=1):
        if missing := [name for name in COLUMNS if name not in row]:
            raise ValueError(
                f"data.questions={source!r} has no column {missing[0]!r}, only {columns_of(row)}: {GIVE}"
            )
        try:
            pairs = tuple(zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True))
            yield _checked(Question(row["id"], row["question"], row["context"], pairs))
        except Exception as error:  # of many kinds, as above
            raise ValueError(f"data.questions={source!r}: row {number} {_no_form(error)}") from None


def _no_form(error: Exception) -> str:
    """Returns the end of an error about a file or row. An error of UTF-8 is shown without the bytes that it holds."""
    reason = (
        "no UTF-8" if isinstance(error, UnicodeDecodeError) else f"{type(error).__name__}: {error}"
    )
    return f"is not in SQuAD's form ({' '.join(reason.split()):.200}); {GIVE}"


def _checked(question: Question) -> Question:
    """Raises TypeError for what is no text or no place in one, and ValueError for text that is half of a character."""
    texts = [
        question.id,
        question.question,
        question.context,
        *(text for text, _ in question.answers),
    ]
    places = [place for _, place in question.answers]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("a question has no text where one should be")
    if not all(isinstance(place, int) and abs(place) <= MAX_COUNT for place in places):
        raise TypeError(
            f"question {question.id!r} has no number, or a very large one, where an answer should begin"
        )
    "".join(texts).encode()
    return question
