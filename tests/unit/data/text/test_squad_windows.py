"""Questions and answers: windows, spans and scores by hand, slow references, and the message of
every mistake. No network."""

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from moe_dist.data.text import corpus as sources
from moe_dist.data.text.squad import Question, check_questions, open_questions
from moe_dist.data.text.squad_windows import (
    QuestionWindows,
    best_spans,
    exact_match,
    f1,
    squad_scores,
)
from moe_dist.data.text.wordpiece import CLS, IGNORE_INDEX, PAD, SEP, SPECIAL, WordPieceTokenizer

TOKENS = WordPieceTokenizer((*SPECIAL, *"abcdefghij"))  # a is 5
INF = float("inf")


def ask(question: str, context: str, *answers: str, id_: str = "q") -> Question:
    return Question(id_, question, context, tuple((text, context.index(text)) for text in answers))


def squad(questions: list[Question], impossible: bool = False) -> str:
    """Returns SQuAD's JSON with an article for each question."""
    articles = []
    for q in questions:
        answers = [{"text": text, "answer_start": start} for text, start in q.answers]
        asked: dict[str, Any] = {"id": q.id, "question": q.question, "answers": answers}
        if impossible:
            asked |= {
                "is_impossible": not answers,
                "plausible_answers": [{"text": "no", "answer_start": 0}],
            }
        articles.append({"title": q.id, "paragraphs": [{"context": q.context, "qas": [asked]}]})
    return json.dumps({"version": "1.1", "data": articles})


def numbered(first: int, last: int) -> list[Question]:
    return [
        ask("a b", f"text {i}", *(["text"] if i % 2 else []), id_=f"id {i}")
        for i in range(first, last)
    ]


# where they come from


def test_file_holds_out_contexts(tmp_path: Path) -> None:
    questions = [ask("a", f"text {i % 30}", str(i % 30), id_=str(i)) for i in range(60)]
    (tmp_path / "mine.json").write_text("\ufeff" + squad(questions), encoding="utf-8")
    check_questions(str(tmp_path / "mine.json"))
    splits = open_questions(str(tmp_path / "mine.json"))
    # 30 contexts with two questions each: 3 of them are held out for either split
    assert {split: len(some) for split, some in splits.items()} == {
        "train": 48,
        "valid": 6,
        "test": 6,
    }
    assert (
        sorted((q for some in splits.values() for q in some), key=lambda q: int(q.id)) == questions
    )
    contexts = [{q.context for q in some} for some in splits.values()]
    assert sum(map(len, contexts)) == len(set.union(*contexts)) == 30


def test_folder_in_the_published_layout(tmp_path: Path) -> None:
    """train and dev: dev is the test split; plausible answers are ignored."""
    (tmp_path / "train-v2.0.json").write_text(squad(numbered(0, 20), impossible=True))
    (tmp_path / "dev-v2.0.json").write_text(squad(numbered(20, 23), impossible=True))
    (tmp_path / "notes.json").write_text("{}")
    splits = open_questions(str(tmp_path))
    assert splits["test"] == numbered(20, 23) and [len(splits[s]) for s in ("train", "valid")] == [
        18,
        2,
    ]
    assert [len(q.answers) for q in splits["test"]] == [0, 1, 0]
    (tmp_path / "test-mine.json").write_text(squad(numbered(30, 34)))
    splits = open_questions(str(tmp_path))
    assert splits["test"] == numbered(30, 34) and splits["valid"] == numbered(20, 23)
    assert splits["train"] == numbered(0, 20)


@pytest.mark.parametrize(
    ("name", "repository"), [("squad", "rajpurkar/squad"), ("squad_v2", "rajpurkar/squad_v2")]
)
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_squad_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, repository: str, kind: str
) -> None:
    load, asked = datasets.load_dataset, []

    def local(name: str, configuration: str | None, revision: str | None, streaming: bool) -> Any:
        asked.append((name, configuration, revision))
        return load(str(tmp_path), streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", local)
    monkeypatch.setattr(sources, "_check_hub", lambda repository, revision: None)
    for split, (first, last) in {"train": (0, 20), "validation": (20, 23)}.items():
        rows = [
            {"id": q.id, "title": "", "context": q.context, "question": q.question}
            | {
                "answers": {
                    "text": [text for text, _ in q.answers],
                    "answer_start": [at for _, at in q.answers],
                }
            }
            for q in numbered(first, last)
        ]
        if kind == "parquet":
            datasets.Dataset.from_list(rows).to_parquet(
                tmp_path / f"{split}-00000-of-00001.parquet"
            )
        else:
            (tmp_path / f"{split}.jsonl").write_text(
                "".join(json.dumps(row) + "\n" for row in rows)
            )
    splits = open_questions(name)
    assert asked == [(repository, None, None)]
    assert splits["test"] == numbered(20, 23) and [len(splits[s]) for s in ("train", "valid")] == [
        18,
        2,
    ]
    monkeypatch.setattr(datasets, "load_dataset", load)
    check_questions(str(tmp_path))
    assert open_questions(str(tmp_path)) == splits, "a folder of such files is read alike"


def broken(**change: Any) -> str:
    """Returns a question with some changes; None removes a key."""
    asked: dict[str, Any] = {
        "id": "q",
        "question": "a",
        "answers": [{"text": "b", "answer_start": 0}],
    } | change
    asked = {key: value for key, value in asked.items() if value is not None}
    return json.dumps({"data": [{"paragraphs": [{"context": "b", "qas": [asked]}]}]})


def row_of(**change: Any) -> str:
    """Returns a question as a table row with some changes."""
    row = {
        "id": "q",
        "question": "a",
        "context": "b",
        "answers": {"text": ["b"], "answer_start": [0]},
    } | change
    return json.dumps(row) + "\n"


@pytest.mark.parametrize(
    ("files", "message", "early"),
    [
        ({"x.json": "{"}, r"x.json is not in SQuAD's form \(JSONDecodeError", True),
        ({"x.json": "[1]"}, "not in SQuAD's form", True),
        ({"x.json": "[" * 100_000}, "not in SQuAD's form", True),
        ({"x.json": '{"version": "1.1"}'}, r"not in SQuAD's form \(KeyError: 'data'\)", True),
        ({"x.json": broken(answers=None)}, r"not in SQuAD's form \(KeyError: 'answers'\)", True),
        ({"x.json": broken(answers="b")}, "not in SQuAD's form", True),
        ({"x.json": broken(id=1)}, "is not a string", True),
        (
            {"x.json": broken(answers=[{"text": "b", "answer_start": "0"}])},
            "not an integer within",
            True,
        ),
        (
            {"x.json": broken(answers=[{"text": "b", "answer_start": 10**400}])},
            "not an integer within",
            True,
        ),
        (
            {"x.json": broken(answers=[{"text": "b", "answer_start": -(2**31)}])},
            "not an integer within",
            True,
        ),
        (
            {"x.json": broken(answers=[{"text": "b", "answer_start": 0.0}])},
            "not an integer within",
            True,
        ),
        ({"x.json": '{"data": ' + "9" * 5000 + "}"}, "not in SQuAD's form", True),
        ({"x.json": '{"data": ' + '{"a":' * 50_000}, "not in SQuAD's form", True),
        (
            {"x.json": broken(answers=[{"text": "\udc00", "answer_start": 0}])},
            "surrogates not allowed",
            True,
        ),
        ({"x.json": broken(id=[["q"]])}, "is not a string", True),
        (
            {"x.json": b'{"data": "\xff' + b"a" * 10_000},
            r"not in SQuAD's form \(no UTF-8\); give",
            True,
        ),
        ({"x.json": broken(question="\ud800")}, "surrogates not allowed", True),
        ({"x.json": '{"data": []}'}, "has no question for 'train'", False),
        ({"x.json": squad([ask("a", "b"), ask("a", "c")])}, "id 'q' is in 'train' twice", False),
        (
            {"x.json": squad(numbered(0, 9))},
            "9 different texts, too few .* files for valid and test",
            False,
        ),
        ({"d/mine.json": squad(numbered(0, 9))}, r"has no train\*.json, only mine.json", True),
        (
            {
                "d/train.json": squad(numbered(0, 9)),
                "d/dev.json": "{}",
                "d/validation-2.json": "{}",
            },
            "dev.json and validation-2.json are both 'valid'",
            True,
        ),
        (
            {"d/train.jsonl": '{"id": "1", "question": "a", "context": "b"}\n'},
            "no column 'answers', only 'id'",
            True,
        ),
        (
            {"d/train.jsonl": '{"id": "1", "question": "a", "context": "b", "answers": ["b"]}\n'},
            "row 1 is not in SQuAD's form",
            True,
        ),
        (
            {"d/train.jsonl": row_of(answers={"text": ["b"], "answer_start": [0, 1]})},
            r"row 1 is not in SQuAD's form \(ValueError: zip",
            True,
        ),
        ({"d/train.jsonl": row_of(context=None)}, "is not a string", True),
        (
            {"d/train.jsonl": row_of(answers={"text": ["b"], "answer_start": [10**40]})},
            "not an integer within",
            True,
        ),
        ({"d/x.odd": "a"}, "files that end with .odd are not read", True),
    ],
)
def test_invalid_squad_files_are_rejected(
    tmp_path: Path, files: dict[str, Any], message: str, early: bool
) -> None:
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    source = str(tmp_path / "d" if path.parent.name == "d" else path)
    for act in (open_questions, check_questions):
        if act is open_questions or early:
            with pytest.raises(
                ValueError, match=f"data.questions={re.escape(repr(source))}:? .*{message}"
            ) as error:
                act(source)
            assert "\n" not in str(error.value) and len(str(error.value)) < 700
        else:
            act(source)


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("train.json", "pipe"),
        ("train.json", "device"),
        ("train.json", "folder"),
        ("dev.json", "pipe"),
        ("train.jsonl", "pipe"),
        ("train.jsonl", "device"),
    ],
)
def test_special_files_do_not_block(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / "train.json").write_text(squad(numbered(0, 9)))
    (tmp_path / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(tmp_path / name)
    elif kind == "folder":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).symlink_to("/dev/zero")
    if name == "train.jsonl":  # a file of rows, by itself
        (tmp_path / "train.json").unlink()
    for act in (check_questions, open_questions):
        with pytest.raises(
            ValueError, match=r"not a regular file \(a folder, a pipe, a device or a socket\); give"
        ):
            act(str(tmp_path))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("squad2", "no dataset has this name; did you mean 'squad"),
        ("squad-v2", "did you mean 'squad_v2'"),
        ("no/such.json", "no file matches"),
        ("", "no file matches and no dataset has this name; known: squad, squad_v2, or give"),
    ],
)
def test_unknown_source_is_rejected(source: str, message: str) -> None:
    for act in (check_questions, open_questions):
        with pytest.raises(ValueError, match=f"data.questions={source!r}: .*{re.escape(message)}"):
            act(source)


# samples


def test_windows_by_hand() -> None:
    # 9 tokens hold [CLS] a [SEP], five of the context and [SEP]; of 8 tokens the windows begin at
    # 0, 2 and 4, for the third ends with the last one. "d e" is tokens 3 and 4: all three have it.
    questions = [
        ask("a", "a b c d e f g h", "d e"),
        ask("a b c", "c d", "c", id_="r"),
        ask("a", "b c", id_="s"),
    ]
    data = QuestionWindows(questions, TOKENS, max_tokens=9, stride=2, global_batch_size=3)
    assert data.window_W5[:, :3].tolist() == [[0, 0, 5], [0, 2, 7], [0, 4, 8], [1, 0, 2], [2, 0, 2]]
    token_bS, kind_bS, valid_bS, start_b, end_b = batch = data.batch(0, range(3))
    assert [t.dtype for t in batch] == [
        torch.int64,
        torch.int64,
        torch.bool,
        torch.int64,
        torch.int64,
    ]
    assert token_bS.tolist() == [
        [CLS, 5, SEP, 5, 6, 7, 8, 9, SEP],
        [CLS, 5, SEP, 7, 8, 9, 10, 11, SEP],
        [CLS, 5, SEP, 9, 10, 11, 12, SEP, PAD],
    ]
    assert kind_bS.tolist() == [[0] * 3 + [1] * 6, [0] * 3 + [1] * 6, [0] * 3 + [1] * 5 + [0]]
    assert valid_bS.sum(dim=1).tolist() == [9, 9, 8]
    # places 3 + 3 and 3 + 4; then two less; the third has "e" alone, so [CLS]
    assert (start_b.tolist(), end_b.tolist()) == ([6, 4, 0], [7, 5, 0])
    token_bS, _, _, start_b, end_b = data.batch(1, range(3))
    assert token_bS.tolist() == [
        [CLS, 5, 6, 7, SEP, 7, 8, SEP],
        [CLS, 5, SEP, 6, 7, SEP, 0, 0],
        [PAD] * 8,
    ]
    assert (start_b.tolist(), end_b.tolist()) == ([5, 0, IGNORE_INDEX], [5, 0, IGNORE_INDEX])
    assert data.num_batches == 2 and data.num_misplaced == 0


def test_windows_cover_everything_with_a_long_stride() -> None:
    data = QuestionWindows(
        [ask("a b", "a b c d e f g")], TOKENS, max_tokens=8, stride=100, global_batch_size=1
    )
    assert data.window_W5[:, 1:3].tolist() == [[0, 3], [3, 6], [6, 7]]


def test_answer_is_found_by_character_offsets() -> None:
    tokens = WordPieceTokenizer((*SPECIAL, "new", "##er", "york", ",", "l", "##on", "##d"))
    # new ##er , new york l ##on ##d: "on" is inside one token, "New York" two, "w" in the first
    context = "Newer, New York Lond"
    for text, places in {
        "New York": (3, 4),
        "on": (6, 6),
        "w": (0, 0),
        ", N": (2, 3),
        " ": None,
    }.items():
        question = Question("q", "york", context, ((text, context.index(text)),))
        data = QuestionWindows([question], tokens, max_tokens=20, stride=9, global_batch_size=1)
        _, _, _, start_b, end_b = data.batch(0, range(1))
        assert (start_b.item(), end_b.item()) == (
            (places[0] + 3, places[1] + 3) if places else (IGNORE_INDEX, IGNORE_INDEX)
        )
        assert data.num_misplaced == (places is None)


def test_misplaced_answers_are_not_trained_on() -> None:
    right, wrong = ask("a", "b c", "c", id_="right"), Question("wrong", "a", "b c", (("c", 0),))
    behind, before = (
        Question("behind", "a", "b c", (("d", 30),)),
        Question("before", "a", "b c", (("c", -1),)),
    )
    data = QuestionWindows(
        [wrong, right, behind, before], TOKENS, max_tokens=9, stride=1, global_batch_size=1, seed=0
    )
    assert data.num_misplaced == 3 and data.window_W5[:, 0].tolist() == [1]
    data = QuestionWindows([wrong, right], TOKENS, max_tokens=9, stride=1, global_batch_size=2)
    assert data.num_misplaced == 1 and data.batch(0, range(2))[3].tolist() == [IGNORE_INDEX, 4], (
        "it is asked all the same"
    )
    with pytest.raises(
        ValueError,
        match=r"data.questions: no answer of a split is at its stated position in its context",
    ):
        QuestionWindows([wrong], TOKENS, max_tokens=9, stride=1, global_batch_size=1, seed=0)


def test_training_repeats_epochs_on_any_layout() -> None:
    questions = [ask("a", f"b {letter}", letter, id_=letter) for letter in "cdefghi"]
    data = QuestionWindows(questions, TOKENS, max_tokens=9, stride=1, global_batch_size=4, seed=5)
    whole = [data.batch(step, range(4)) for step in range(7)]
    words = torch.cat([batch[0][:, 4] for batch in whole]).tolist()
    assert [sorted(words[7 * e : 7 * e + 7]) for e in range(4)] == [list(range(7, 14))] * 4
    assert words[:7] != words[7:14]
    again = QuestionWindows(questions, TOKENS, max_tokens=9, stride=1, global_batch_size=4, seed=5)
    for part, batch in zip(again.batch(4, range(2, 4)), whole[4], strict=True):
        assert part.equal(batch[2:])


@pytest.mark.parametrize(
    ("question", "max_tokens", "stride", "message"),
    [
        (
            ask("a b c", "d"),
            6,
            1,
            "question of 3 tokens leaves no room .* model.max_tokens=6: use at least 7",
        ),
        (ask("\u200b", "d"), 9, 1, "question 'q' or its context has no token: leave it out"),
        (ask("a", ""), 9, 1, "question 'q' or its context has no token"),
        (ask("a", "b"), 9, 0, "data.doc_stride=0: use at least 1"),
    ],
)
def test_questions_that_make_no_sample_are_rejected(
    question: Question, max_tokens: int, stride: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        QuestionWindows([question], TOKENS, max_tokens, stride, global_batch_size=1)


# the best spans


def test_best_spans_by_hand() -> None:
    # [CLS] a [SEP] c d e [SEP]: the context is places 3, 4 and 5
    token_bS, kind_bS = (
        torch.tensor([[CLS, 5, SEP, 7, 8, 9, SEP]]),
        torch.tensor([[0, 0, 0, 1, 1, 1, 1]]),
    )
    start_bS = torch.tensor([[1.0, 9.0, 9.0, 2.0, 0.0, 5.0, 9.0]])
    end_bS = torch.tensor([[0.5, 9.0, 9.0, 1.0, 0.0, 3.0, 9.0]])
    # 5..5: 5 + 3 = 8; 3..5: 2 + 3 = 5 is of three tokens; 3..3: 2 + 1 = 3; 4..5: 0 + 3 = 3; 3..4: 2
    # + 0 = 2
    score_bn, start_bn, end_bn, null_b = best_spans(
        start_bS, end_bS, token_bS, kind_bS, longest=3, num=2
    )
    assert (score_bn.tolist(), start_bn.tolist(), end_bn.tolist()) == (
        [[8.0, 5.0]],
        [[5, 3]],
        [[5, 5]],
    )
    assert null_b.tolist() == [1.5]
    score_bn, start_bn, end_bn, _ = best_spans(
        start_bS, end_bS, token_bS, kind_bS, longest=1, num=4
    )
    assert score_bn.tolist() == [[8.0, 3.0, 0.0, -INF]] and start_bn[0, :3].tolist() == [5, 3, 4]
    assert end_bn[0, :3].tolist() == [5, 3, 4]
    # padding has no span, and half precision is added up in float32
    none = torch.zeros_like(token_bS)
    score_bn, _, _, null_b = best_spans(
        start_bS.bfloat16(), end_bS.bfloat16(), none, none, longest=3, num=1
    )
    assert score_bn.tolist() == [[-INF]] and null_b.dtype == torch.float32


@pytest.mark.parametrize("longest", [1, 3, 30])
def test_best_spans_equal_a_slow_reference(longest: int) -> None:
    generator = torch.Generator().manual_seed(0)
    start_bS, end_bS = torch.randn(2, 4, 12, generator=generator, dtype=torch.float64).float()
    token_bS, kind_bS = torch.full((4, 12), 7), torch.tensor([[0] * 3 + [1] * 8 + [0]] * 4)
    token_bS[:, 10] = SEP
    score_bn, start_bn, end_bn, _ = best_spans(start_bS, end_bS, token_bS, kind_bS, longest, num=5)
    for b in range(4):
        every = [
            ((start_bS[b, i] + end_bS[b, j]).item(), i, j)
            for i in range(3, 10)
            for j in range(i, min(10, i + longest))
        ]
        slow = sorted(every, reverse=True)[:5]
        assert (
            list(zip(*(x[b].tolist() for x in (score_bn, start_bn, end_bn)), strict=True)) == slow
        )


def decoded(threshold: float | None) -> dict[str, list[tuple[str, float]]]:
    # 9 tokens hold [CLS] a [SEP], five of the context and [SEP]: windows of q begin at 0 and 5
    questions = [ask("a", "a, b (C) d E f a"), ask("a", "b c", id_="r")]
    tokens = WordPieceTokenizer((*SPECIAL, *"abcdefghij(),"))
    data = QuestionWindows(questions, tokens, max_tokens=9, stride=5, global_batch_size=2)
    assert data.window_W5[:, :3].tolist() == [[0, 0, 5], [0, 5, 10], [1, 0, 2]]
    return data.decode(
        # of the context's tokens: q 2..4 and 0, an "a"; 5..6 and 9, another "a"; r 0..1 and nothing
        torch.tensor([[3.0, 2.0], [4.0, 1.0], [1.0, -INF]]),
        torch.tensor([[5, 3], [3, 7], [3, 0]]),
        torch.tensor([[7, 3], [4, 7], [4, 0]]),
        torch.tensor([4.5, 6.0, 2.0]),
        threshold,
    )


def test_answers_are_decoded_to_the_original_text() -> None:
    assert decoded(None) == {
        "q": [(") d", 4.0), ("b (C", 3.0), ("a", 2.0)],
        "r": [("b c", 1.0)],
    }


def test_no_answer_wins_by_a_threshold() -> None:
    # q: the least of 4.5 and 6 is not more than 0.5 above 4, but more than 0.25; r: 2 is 1 above 1
    assert decoded(0.5)["q"][0] == (") d", 4.0) and decoded(0.25)["q"][0] == ("", 4.25)
    assert decoded(1.0)["r"] == [("b c", 1.0), ("", 1.0)] and decoded(0.5)["r"] == [
        ("", 1.5),
        ("b c", 1.0),
    ]


# what they score


def test_words_are_compared_without_case_articles_and_punctuation() -> None:
    for answer, right, same in [
        ("The Eiffel Tower", "eiffel tower", True),
        ("  an   Eiffel\tTower.", "Eiffel-Tower", False),  # eiffel tower, eiffeltower
        ("U.S.A.", "usa", True),
        ("the", "", True),
        ("theory", "ory", False),  # an article is a whole word
        ("tower eiffel", "eiffel tower", False),
        ("the-a", "thea", True),  # punctuation goes first, so that no article is left
        ("“Tower”", "Tower", False),  # only ASCII's punctuation is
    ]:
        assert exact_match(answer, right) == same, (answer, right)


def test_f1_by_hand() -> None:
    # the big red dog / a red dog barked: two words in common of 3 and 3, 2 * 2 / 6
    assert f1("the big red dog", "a red dog barked") == pytest.approx(2 / 3)
    # one of two words is right, and it is all of them: precision 1/2, recall 1
    assert f1("red dog", "dog") == pytest.approx(2 * 0.5 * 1 / 1.5)
    # each as often as it is there: two of "no no no" and "no no", 2 * 2 / 5
    assert f1("no no no", "no no") == pytest.approx(0.8)
    assert (f1("cat", "dog"), f1("", "dog"), f1("dog", "the"), f1("", ""), f1("the", "")) == (
        0,
        0,
        0,
        1,
        1,
    )


def test_scores_by_hand() -> None:
    context = "a red dog in the snow"
    questions = [
        ask(
            "?", context, "red dog", "a red dog in the snow", id_="1"
        ),  # several right answers: the best counts
        ask("?", context, "snow", id_="2"),
        ask("?", context, id_="3"),
        ask("?", context, id_="4"),
        ask("?", context, "the", id_="5"),  # no word, so that "" is right
        ask("?", context, "the", "dog", id_="6"),  # but not beside one that has words
    ]
    answer = {"1": "dog in snow", "2": "", "3": "", "4": "red", "5": "", "6": ""}
    # 1: dog in snow / red dog in snow 2 * 3 / 7, better than 2 * 1 / 5; 2: 0; 3: 1; 4: 0; 5: 1; 6:
    # 0
    assert squad_scores(questions, answer) == pytest.approx(
        {
            "exact": 200 / 6,
            "f1": 100 * (6 / 7 + 2) / 6,
            "exact_answerable": 25,
            "f1_answerable": 100 * (6 / 7 + 1) / 4,
            "exact_unanswerable": 50,
            "f1_unanswerable": 50,
        }
    )
    assert squad_scores(questions[:2], answer) == pytest.approx({"exact": 0, "f1": 100 * 3 / 7})
    assert squad_scores(questions, answer | {"1": "Red dog!"})["exact"] == pytest.approx(50)


def test_perfect_logits_answer_everything() -> None:
    """From text to scores, with high logits at each window's targets."""
    questions = [
        ask("a b", "a b c d e f g h i j", "g h", "h i", id_="1"),
        ask("c", "a b c d e f g h i j", "i j", id_="2"),
        ask("c", "a b c d e f", id_="3"),
        ask("d e f", "j i h g f e d", "j", id_="4"),
    ]
    data = QuestionWindows(questions, TOKENS, max_tokens=10, stride=3, global_batch_size=4)
    found: list[list[torch.Tensor]] = []
    for step in range(data.num_batches):
        token_bS, kind_bS, valid_bS, start_b, end_b = data.batch(step, range(4))
        logits = [
            torch.nn.functional.one_hot(x.clamp(min=0), token_bS.shape[1]) * 5.0
            for x in (start_b, end_b)
        ]
        real_b = valid_bS.any(dim=1)
        found.append([x[real_b] for x in best_spans(*logits, token_bS, kind_bS, longest=4, num=3)])
    parts = [torch.cat(column) for column in zip(*found, strict=True)]
    assert len(parts[3]) == len(data.window_W5) > 2 * len(questions)
    answer = {id_: best[0][0] for id_, best in data.decode(*parts, null_threshold=0.0).items()}
    assert answer == {"1": "g h", "2": "i j", "3": "", "4": "j"}
    assert set(squad_scores(questions, answer).values()) == {100.0}
    assert Counter(np.unique(data.window_W5[:, 0]).tolist()) == Counter(range(4))
