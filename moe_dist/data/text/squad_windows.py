"""Answers that are a piece of a text, or none (SQuAD 1.1 and 2.0): samples, the best spans, and what they score.

    [CLS] question [SEP] window of the context [SEP]     -> first and last token of the answer; [CLS], where it is none

A context that is too long for one sample is read in windows that overlap. Of all windows' spans the best one is the
answer, unless [CLS] is better by a threshold.

Legend: W windows, b of them in a batch, S tokens of each, C tokens of a context, n spans of a window, Q questions.
"""

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from moe_dist.data.sampling import SampleOrder
from moe_dist.data.text.squad import Question
from moe_dist.data.text.wordpiece import (
    IGNORE_INDEX,
    PADDING_SAMPLE,
    SEP,
    WordPieceTokenizer,
    join_segments,
    pad_and_stack,
)

LOST = (-2, -2)  # for the tokens of an answer that is not where it should be
NO_ANSWER = (-1, -1)  # in no window


class QuestionWindows:
    """Samples of one split: windows of questions. In training an epoch has each window once, in an order that follows
    from seed and epoch; in evaluation window w is sample w mod B of step w div B."""

    def __init__(
        self,
        questions: Sequence[Question],
        tokens: WordPieceTokenizer,
        max_tokens: int,
        stride: int,
        global_batch_size: int,
        seed: int | None = None,
    ) -> None:
        """`stride`: tokens from the beginning of a window to that of the next, or as many as fit beside a question
        where that is less. `global_batch_size`: B. `seed`: None for evaluation.

        `num_lost` questions have an answer that is not where they say; training leaves them out. Raises ValueError for
        a question or context without any token, a question that leaves no room, a stride below 1, and for no questions
        that could be trained on.
        """
        if stride < 1:
            raise ValueError(f"data.doc_stride={stride}: at least 1")
        self.questions, self.num_misplaced = questions, 0
        self.ids = list(tokens.encode_all(question.question for question in questions))
        self.contexts = {
            text: _context(tokens, text) for text in {question.context for question in questions}
        }
        longest = max(map(len, self.ids))
        if longest > max_tokens - 4:
            raise ValueError(
                f"data.questions: a question of {longest} tokens leaves no room for its context in "
                f"model.max_tokens={max_tokens}: at least {longest + 4}"
            )
        windows = []  # (question, first token of the context, behind the last), and the tokens of the answer
        for i, (question, ids) in enumerate(zip(questions, self.ids, strict=True)):
            token_C, offset_C2 = self.contexts[question.context]
            if not len(ids) or not len(token_C):
                raise ValueError(
                    f"data.questions: question {question.id!r} or its context has no token: leave it out"
                )
            answer = _locate(question, offset_C2)
            if answer == LOST:
                self.num_misplaced += 1
                if seed is not None:
                    continue
            room = max_tokens - 3 - len(ids)
            begin = 0
            while True:
                windows.append((i, begin, min(begin + room, len(token_C)), *answer))
                if begin + room >= len(token_C):
                    break
                begin += min(stride, room)
        if not windows:
            raise ValueError("data.questions: no answer of a split is in its context where it says")
        self.window_W5 = np.array(windows)
        question_W, begin_W, end_W, *_ = self.window_W5.T
        lengths = np.array([len(ids) for ids in self.ids])[question_W] + end_W - begin_W + 3
        self.order = SampleOrder(lengths, global_batch_size, seed)
        self.num_batches = self.order.num_steps  # of an epoch

    def batch(self, step: int, samples: range) -> tuple[torch.Tensor, ...]:
        """Samples of a step -> token_bS, kind_bS (int64), valid_bS (bool), start_b, end_b (int64): first and last token
        of the answer where the window has all of it, else 0 twice, which is [CLS]; -100 for padding and for an answer
        that is not where it should be."""
        _, index_b, width = self.order.select(step, samples)
        rows, target_b2 = [], np.full((len(index_b), 2), IGNORE_INDEX)
        for i, index in enumerate(index_b.tolist()):
            if index < 0:
                rows.append(PADDING_SAMPLE)
                continue
            question, begin, end, first, last = self.window_W5[index].tolist()
            token_C, _ = self.contexts[self.questions[question].context]
            rows.append(join_segments(self.ids[question], token_C[begin:end]))
            if (first, last) != LOST:
                shift = len(self.ids[question]) + 2 - begin
                target_b2[i] = (
                    (first + shift, last + shift) if begin <= first and last < end else (0, 0)
                )
        start_b, end_b = torch.from_numpy(target_b2.T.copy())
        return *pad_and_stack(rows, width), start_b, end_b

    def decode(
        self,
        score_Wn: torch.Tensor,
        start_Wn: torch.Tensor,
        end_Wn: torch.Tensor,
        null_W: torch.Tensor,
        null_threshold: float | None,
    ) -> dict[str, list[tuple[str, float]]]:
        """What `best_spans` found in all windows -> the best answers to each question by its id, with their scores, the
        answer first.

        `null_threshold`: None where every question has an answer; else "" has the least score of [CLS] in any window
        less the threshold (Devlin et al. 2019, Section 4.3). A span counts in every window that has it.
        """
        found: list[dict[str, float]] = [{} for _ in self.questions]
        null_Q = np.full(len(self.questions), np.inf)
        spans = zip(
            score_Wn.tolist(), start_Wn.tolist(), end_Wn.tolist(), null_W.tolist(), strict=True
        )
        for (i, begin, *_), (score_n, start_n, end_n, null) in zip(
            self.window_W5.tolist(), spans, strict=True
        ):
            context = self.questions[i].context
            _, offset_C2 = self.contexts[context]
            shift = begin - len(self.ids[i]) - 2
            null_Q[i] = min(null_Q[i], null)
            for score, start, end in zip(score_n, start_n, end_n, strict=True):
                if score > -np.inf:
                    text = context[offset_C2[start + shift, 0] : offset_C2[end + shift, 1]]
                    found[i][text] = max(score, found[i].get(text, -np.inf))
        if null_threshold is not None:
            for texts, null in zip(found, null_Q.tolist(), strict=True):
                texts[""] = null - null_threshold
        best = [sorted(texts.items(), key=lambda item: -item[1]) for texts in found]
        return {question.id: texts for question, texts in zip(self.questions, best, strict=True)}


def best_spans(
    start_bS: torch.Tensor,
    end_bS: torch.Tensor,
    token_bS: torch.Tensor,
    kind_bS: torch.Tensor,
    longest: int,
    num: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of first and last tokens -> the `num` best spans of each window's context: score_bn, start_bn, end_bn; and
    the score of [CLS], null_b.

    A score is the sum of both logits. All spans of at most `longest` tokens are looked at. Where a window has fewer
    than `num`, the rest have score -inf.
    """
    context_bS = (kind_bS == 1) & (token_bS != SEP)  # no text is read as [SEP]
    start_bS, end_bS = start_bS.float(), end_bS.float()
    first_bS, last_bS = (x_bS.masked_fill(~context_bS, -torch.inf) for x_bS in (start_bS, end_bS))
    last_bSL = F.pad(last_bS, (0, longest - 1), value=-torch.inf).unfold(1, longest, 1)
    score_bX = F.pad((first_bS[:, :, None] + last_bSL).flatten(1), (0, num), value=-torch.inf)
    score_bn, span_bn = score_bX.topk(num)
    start_bn = span_bn // longest
    return score_bn, start_bn, start_bn + span_bn % longest, start_bS[:, 0] + end_bS[:, 0]


def squad_scores(questions: Iterable[Question], answer: Mapping[str, str]) -> dict[str, float]:
    """Per cent of exact matches and mean F1 of the answers by id, as SQuAD's own script counts them; of the questions
    with and without answer too, where there are both.

    An answer is compared with each of the right ones, and the best counts; those of no word do not, and a question that
    has no other has the right answer "".
    """
    rows = []
    for question in questions:
        right = [text for text, _ in question.answers if _words(text)] or [""]
        pairs = [
            (exact_match(answer[question.id], text), f1(answer[question.id], text))
            for text in right
        ]
        rows.append((bool(question.answers), *(max(column) for column in zip(*pairs, strict=True))))
    row_Q3 = np.array(rows, dtype=np.float64)
    has_Q = row_Q3[:, 0] == 1
    parts = {"": np.full(len(rows), True)}
    if len(set(has_Q.tolist())) > 1:
        parts |= {"_answerable": has_Q, "_unanswerable": ~has_Q}
    return {
        name + part: float(100 * row_Q3[which_Q, column].mean())
        for part, which_Q in parts.items()
        for name, column in (("exact", 1), ("f1", 2))
    }


def exact_match(answer: str, right: str) -> bool:
    """Whether they have the same words (`fold_in`)."""
    return _words(answer) == _words(right)


def f1(answer: str, right: str) -> float:
    """Harmonic mean of precision and recall of words, in any order, each as often as it is there. Where one has no
    words: 1 if the other has none."""
    a, b = Counter(_words(answer)), Counter(_words(right))
    if not a or not b:
        return float(a == b)
    return 2 * (a & b).total() / (a.total() + b.total())


def _words(text: str) -> list[str]:
    """Of lower-case text without punctuation and without articles."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def _locate(question: Question, offset_C2: np.ndarray) -> tuple[int, int]:
    """First and last token of the context that hold any of the first answer."""
    if not question.answers:
        return NO_ANSWER
    text, start = question.answers[0]
    (there,) = np.nonzero((offset_C2[:, 1] > start) & (offset_C2[:, 0] < start + len(text)))
    right = start >= 0 and question.context[start : start + len(text)] == text
    return (int(there[0]), int(there[-1])) if right and len(there) else LOST


def _context(tokens: WordPieceTokenizer, text: str) -> tuple[np.ndarray, np.ndarray]:
    ids, offsets = tokens.encode_with_offsets(text)
    return np.array(ids, dtype=np.int32), np.array(offsets, dtype=np.int32).reshape(-1, 2)
