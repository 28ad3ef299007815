"""Question answering by spans of a text (SQuAD 1.1 and 2.0): samples, best spans and scores.

    [CLS] question [SEP] window of the context [SEP]

The model predicts the answer's first and last token, which are both [CLS] if there is no answer. A
context that is too long for one sample is read in overlapping windows. The answer is the best span
in all windows, unless [CLS] scores higher by more than a threshold.

Legend: Q questions, W windows, C tokens per context, B samples (windows) per step over all ranks,
b requested samples, S tokens per sample, L span lengths, n best spans per window.
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

NUM_MARKERS = 3  # [CLS] and two [SEP]
# Instead of the first and last token of an answer:
MISPLACED = (-2, -2)  # the answer is not at its stated position in the context
NO_ANSWER = (-1, -1)  # the question has no answer


class QuestionWindows:
    """The samples for one split, each a question with one context window.

    In training an epoch has each window once, in an order that follows from seed and epoch. In
    evaluation window w is sample w mod B of step w div B.

    Attributes:
        questions: The questions.
        num_misplaced: The questions whose answer is not at its stated position.
        ids: The question tokens.
        contexts: The tokens of each context, with their (first, end) characters.
        window_W5: For each window the question, the window's first and end token in the context,
            and the answer's first and last token in the context.
        order: The sample order.
        num_batches: The steps per epoch.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        tokens: WordPieceTokenizer,
        max_tokens: int,
        stride: int,
        global_batch_size: int,
        seed: int | None = None,
    ) -> None:
        """Tokenizes the questions and cuts their contexts into windows.

        Training leaves out questions whose answer is not at its stated position.

        Args:
            questions: The questions.
            tokens: The tokenizer.
            max_tokens: The maximum number of tokens per sample.
            stride: The tokens between the starts of two windows. If fewer fit into a sample besides
                the question, the windows do not overlap.
            global_batch_size: B.
            seed: The seed; None for evaluation.

        Raises:
            ValueError: `stride` is less than 1, a question or context has no token, a question is
                too long, or there is no question to train on.
        """
        if stride < 1:
            raise ValueError(f"data.doc_stride={stride}: use at least 1")
        self.questions = questions
        self.num_misplaced = 0
        self.ids = list(tokens.encode_all(question.question for question in questions))
        self.contexts = {}
        for context in {question.context for question in questions}:
            self.contexts[context] = _encode_context(tokens, context)
        longest = max(map(len, self.ids))
        if longest > max_tokens - NUM_MARKERS - 1:
            raise ValueError(
                f"data.questions: a question of {longest} tokens leaves no room for its context in "
                f"model.max_tokens={max_tokens}: use at least {longest + NUM_MARKERS + 1}"
            )
        windows = []
        for i, question in enumerate(questions):
            token_C, offset_C2 = self.contexts[question.context]
            if not len(self.ids[i]) or not len(token_C):
                raise ValueError(
                    f"data.questions: question {question.id!r} or its context has no token: "
                    "leave it out"
                )
            answer = _locate(question, offset_C2)
            if answer == MISPLACED:
                self.num_misplaced += 1
                if seed is not None:
                    continue
            max_window = max_tokens - NUM_MARKERS - len(self.ids[i])
            for begin, end in _windows(len(token_C), max_window, stride):
                windows.append((i, begin, end, *answer))
        if not windows:
            raise ValueError(
                "data.questions: no answer of a split is at its stated position in its context"
            )
        self.window_W5 = np.array(windows)
        question_W, begin_W, end_W, *_ = self.window_W5.T
        length_Q = np.array([len(ids) for ids in self.ids])
        length_W = length_Q[question_W] + end_W - begin_W + NUM_MARKERS
        self.order = SampleOrder(length_W, global_batch_size, seed)
        self.num_batches = self.order.num_steps

    def batch(self, step: int, samples: range) -> tuple[torch.Tensor, ...]:
        """Returns the requested samples.

        Args:
            step: The step, from 0 on.
            samples: The requested samples, within 0 .. B - 1.

        Returns:
            token_bS and kind_bS (int64, see `wordpiece.join_segments`); valid_bS (bool); start_b
            and end_b (int64), the answer's first and last token if the window contains both, else
            0, which is [CLS]; -100 for padding and for an answer that is not at its stated
            position.
        """
        _, index_b, width = self.order.select(step, samples)
        target_b2 = np.full((len(index_b), 2), IGNORE_INDEX)
        rows = []
        for i, index in enumerate(index_b.tolist()):
            if index < 0:
                rows.append(PADDING_SAMPLE)
                continue
            question, begin, end, first, last = self.window_W5[index].tolist()
            token_C, _ = self.contexts[self.questions[question].context]
            rows.append(join_segments(self.ids[question], token_C[begin:end]))
            if (first, last) == MISPLACED:
                continue
            is_inside = begin <= first and last < end
            shift = self._shift(question, begin)
            target_b2[i] = (first + shift, last + shift) if is_inside else (0, 0)
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
        """Returns the best answers to each question from the best spans in all windows.

        A text that occurs in several spans or windows has the best score among these.

        Args:
            score_Wn: The scores from `best_spans`.
            start_Wn: Each span's first token in its sample.
            end_Wn: Each span's last token in its sample.
            null_W: The [CLS] score in each window.
            null_threshold: None if every question has an answer. Otherwise the answer "" has the
                least [CLS] score in any window, less the threshold (Devlin et al. 2019, 4.3).

        Returns:
            For each question id the answers with their scores, the best first.
        """
        score_of_text: list[dict[str, float]] = [{} for _ in self.questions]
        null_Q = np.full(len(self.questions), np.inf)
        for window, score_n, start_n, end_n, null in zip(
            self.window_W5.tolist(),
            score_Wn.tolist(),
            start_Wn.tolist(),
            end_Wn.tolist(),
            null_W.tolist(),
            strict=True,
        ):
            i, begin, *_ = window
            context = self.questions[i].context
            _, offset_C2 = self.contexts[context]
            shift = self._shift(i, begin)
            null_Q[i] = min(null_Q[i], null)
            for score, start, end in zip(score_n, start_n, end_n, strict=True):
                if score > -np.inf:
                    text = context[offset_C2[start - shift, 0] : offset_C2[end - shift, 1]]
                    score_of_text[i][text] = max(score, score_of_text[i].get(text, -np.inf))
        answers = {}
        for i, question in enumerate(self.questions):
            if null_threshold is not None:
                score_of_text[i][""] = float(null_Q[i]) - null_threshold
            answers[question.id] = sorted(score_of_text[i].items(), key=lambda item: -item[1])
        return answers

    def _shift(self, question: int, begin: int) -> int:
        """Returns a token's index in a sample minus its index in the context."""
        return len(self.ids[question]) + 2 - begin


def best_spans(
    start_bS: torch.Tensor,
    end_bS: torch.Tensor,
    token_bS: torch.Tensor,
    kind_bS: torch.Tensor,
    longest: int,
    num: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the best spans in each window's context.

    A span's score is the logit sum for its first and last token. All spans with at most `longest`
    tokens are candidates.

    Args:
        start_bS: The first-token logits.
        end_bS: The last-token logits.
        token_bS: The samples (int64).
        kind_bS: The token types (int64); 1 in the context.
        longest: L, the maximum span length in tokens.
        num: n.

    Returns:
        score_bn (float32), -inf if a window has fewer than n spans; start_bn and end_bn (int64),
        each span's first and last token; and null_b (float32), the [CLS] score.
    """
    # A text is never encoded as [SEP], so the only [SEP] of kind 1 is the end of the sample.
    context_bS = (kind_bS == 1) & (token_bS != SEP)
    start_bS = start_bS.float()
    end_bS = end_bS.float()
    first_bS = start_bS.masked_fill(~context_bS, -torch.inf)
    last_bS = end_bS.masked_fill(~context_bS, -torch.inf)
    last_bSL = F.pad(last_bS, (0, longest - 1), value=-torch.inf).unfold(1, longest, 1)
    score_bX = F.pad((first_bS[:, :, None] + last_bSL).flatten(1), (0, num), value=-torch.inf)
    score_bn, span_bn = score_bX.topk(num)
    start_bn = span_bn // longest
    end_bn = start_bn + span_bn % longest
    null_b = start_bS[:, 0] + end_bS[:, 0]
    return score_bn, start_bn, end_bn, null_b


def squad_scores(questions: Iterable[Question], answer: Mapping[str, str]) -> dict[str, float]:
    """Returns the exact match and F1 scores of SQuAD's official script, in per cent.

    An answer is compared with each correct answer, and the best result counts. Correct answers
    without words are ignored; if a question has no other, its correct answer is "".

    Args:
        questions: The questions with their correct answers.
        answer: The predicted answer to each question, by id.

    Returns:
        "exact" and "f1" over all questions; also with the suffixes "_answerable" and
        "_unanswerable" over the questions with and without an answer, if there are both.
    """
    results = []
    for question in questions:
        correct = [text for text, _ in question.answers if _words(text)] or [""]
        predicted = answer[question.id]
        best_match = max(exact_match(predicted, text) for text in correct)
        best_f1 = max(f1(predicted, text) for text in correct)
        results.append((bool(question.answers), best_match, best_f1))
    result_Q3 = np.array(results, dtype=np.float64)
    is_answerable_Q = result_Q3[:, 0] == 1
    subsets = {"": np.full(len(results), True)}
    if len(set(is_answerable_Q.tolist())) > 1:
        subsets["_answerable"] = is_answerable_Q
        subsets["_unanswerable"] = ~is_answerable_Q
    scores = {}
    for suffix, in_subset_Q in subsets.items():
        scores["exact" + suffix] = float(100 * result_Q3[in_subset_Q, 1].mean())
        scores["f1" + suffix] = float(100 * result_Q3[in_subset_Q, 2].mean())
    return scores


def exact_match(answer: str, correct: str) -> bool:
    """Returns whether two answers have the same words, without case, punctuation and articles."""
    return _words(answer) == _words(correct)


def f1(answer: str, correct: str) -> float:
    """Returns the harmonic mean of word precision and recall.

    Args:
        answer: The predicted answer.
        correct: The correct answer.

    Returns:
        The F1 of the two word multisets. If one answer has no words: 1 if the other one has none
        either, else 0.
    """
    answer_words = Counter(_words(answer))
    correct_words = Counter(_words(correct))
    if not answer_words or not correct_words:
        return float(answer_words == correct_words)
    num_common = (answer_words & correct_words).total()
    return 2 * num_common / (answer_words.total() + correct_words.total())


def _words(text: str) -> list[str]:
    """Returns the words of a text in lower case, without punctuation and articles."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def _windows(num_tokens: int, max_window: int, stride: int) -> list[tuple[int, int]]:
    """Returns the first token and the end of each window of a context."""
    windows = []
    begin = 0
    while True:
        windows.append((begin, min(begin + max_window, num_tokens)))
        if begin + max_window >= num_tokens:
            return windows
        begin += min(stride, max_window)


def _locate(question: Question, offset_C2: np.ndarray) -> tuple[int, int]:
    """Returns the first and last context token that overlap the first correct answer."""
    if not question.answers:
        return NO_ANSWER
    text, start = question.answers[0]
    end = start + len(text)
    (overlapping,) = np.nonzero((offset_C2[:, 1] > start) & (offset_C2[:, 0] < end))
    is_in_place = start >= 0 and question.context[start:end] == text
    if not is_in_place or not len(overlapping):
        return MISPLACED
    return int(overlapping[0]), int(overlapping[-1])


def _encode_context(tokens: WordPieceTokenizer, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns token_C and offset_C2 of a context (int32)."""
    ids, offsets = tokens.encode_with_offsets(text)
    return np.array(ids, dtype=np.int32), np.array(offsets, dtype=np.int32).reshape(-1, 2)
