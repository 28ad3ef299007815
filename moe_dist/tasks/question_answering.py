"""Extractive question answering: the answer is a span of a text (SQuAD).

Legend: B windows, S tokens in each, n spans in a window, W windows in a split.
"""

import math
from collections.abc import Collection, Iterator

import torch

from moe_dist.config.schema import Config, QuestionDataConfig
from moe_dist.data.data_source import DataSource, named_source
from moe_dist.data.text.squad import SQUAD, check_questions, open_questions
from moe_dist.data.text.squad_windows import QuestionWindows, best_spans, squad_scores
from moe_dist.data.text.wordpiece import IGNORE_INDEX
from moe_dist.models.text_encoder import AnswerFinder
from moe_dist.monitoring.metric_format import format_metric
from moe_dist.tasks.encoder_base import balance_loss
from moe_dist.tasks.eval_buffer import EvalBuffer
from moe_dist.tasks.task import LossResult, ModelEngine
from moe_dist.tasks.text_base import SPLITS, TextBatch, TextTask, sum_nll, valid_targets

NUM_SPANS = 20  # candidates for the best answer in each window


class QuestionAnswering(TextTask):
    """A task whose answers are spans of a text, or no answer (SQuAD).

    Attributes:
        spans: In evaluation, score, start, end and null score for each window's best spans.
    """

    data_config: type = QuestionDataConfig
    primary_metric: str = "f1"
    model_class = AnswerFinder

    @property
    def uniform_loss(self) -> float:
        """Loss with equal probabilities for all places, in nats."""
        return math.log(self.model.max_tokens)

    def open_data(self) -> None:
        """Opens the questions and the tokenizer."""
        data = self.config.data
        assert isinstance(data, QuestionDataConfig)
        self.data = data
        questions = open_questions(data.questions)
        texts: list[str] = []
        for question in questions["train"]:
            texts += [question.question, question.context]
        self.tokens = self.load_tokens(texts, f"data.questions={data.questions!r}")
        self.splits = {}
        for split in SPLITS:
            self.splits[split] = QuestionWindows(
                questions[split],
                self.tokens,
                self.model.max_tokens,
                data.doc_stride,
                self.layout.global_batch_size,
                self.shuffle_seed(split),
            )
        num_misplaced = self.splits["train"].num_misplaced
        if num_misplaced:
            self.notes.append(
                f"{num_misplaced} training questions are left out: their answer is not at the "
                "given place in the text"
            )
        self.spans = EvalBuffer()

    def data_source(self) -> DataSource:
        """Returns the data set names."""
        repositories = {name: (repository, None, None) for name, repository in SQUAD.items()}
        return named_source(self.data.questions, repositories)

    @staticmethod
    def check_data(config: Config, main: bool, explicit: Collection[str]) -> None:
        """Checks that the questions exist."""
        assert isinstance(config.data, QuestionDataConfig)
        check_questions(config.data.questions)

    def eval_batches(self, split: str) -> Iterator[list[TextBatch]]:
        """Yields every window once, after resetting the evaluation buffer."""
        self.spans.reset()
        return super().eval_batches(split)

    def loss(self, engine: ModelEngine, batch: TextBatch, total: torch.Tensor) -> LossResult:
        """Returns the mean nll for first and last token, per window."""
        first_B = valid_targets(batch.targets[0], batch)
        last_B = valid_targets(batch.targets[1], batch)
        start_BS, end_BS, stats = engine(batch.token_BS, batch.kind_BS, batch.ctx)
        valid_BS = batch.ctx.valid_T.view(batch.token_BS.shape)
        # a padding window has no target, but needs some logit above -infinity
        padding_B1 = ~valid_BS[:, :1]
        masked_BS = ~(valid_BS | padding_B1)
        start_BS = start_BS.masked_fill(masked_BS, -torch.inf)
        end_BS = end_BS.masked_fill(masked_BS, -torch.inf)
        nll = (sum_nll(start_BS, first_B) + sum_nll(end_BS, last_B)) / 2
        if not batch.ctx.train:
            self._record_spans(batch, start_BS, end_BS)
        sums = {"nll": nll, "texts": (first_B != IGNORE_INDEX).sum(), "work": self.work(batch)}
        return (nll / total[0] + balance_loss(self.layout, stats)).to(nll.dtype), sums, stats

    def _record_spans(self, batch: TextBatch, start_BS: torch.Tensor, end_BS: torch.Tensor) -> None:
        """Adds each window's best spans to the evaluation buffer."""
        score_Bn, start_Bn, end_Bn, null_B = best_spans(
            start_BS,
            end_BS,
            batch.token_BS,
            batch.kind_BS,
            self.data.max_answer_tokens,
            NUM_SPANS,
        )
        null_Bn = null_B[:, None].expand_as(score_Bn)
        columns = [t.double() for t in (score_Bn, start_Bn, end_Bn, null_Bn)]
        self.spans.add(batch.first, torch.stack(columns, 1))

    def compute_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Returns the loss; `finalize_eval` adds the other metrics."""
        return {"loss": sums["nll"] / max(1, sums["texts"])}

    def finalize_eval(self, split: str) -> dict[str, float]:
        """Returns exact match and F1 for the best answers, as fractions. A collective."""
        windows = self.splits[split]
        span_W4n = self.spans.gather(len(windows.window_W5), (4, NUM_SPANS), self.mesh)
        score_Wn, start_Wn, end_Wn, null_Wn = span_W4n.unbind(1)
        best = windows.decode(
            score_Wn, start_Wn.long(), end_Wn.long(), null_Wn[:, 0], self.data.no_answer_threshold
        )
        answers = {question: texts[0][0] if texts else "" for question, texts in best.items()}
        percentages = squad_scores(windows.questions, answers)
        return {name: percentage / 100 for name, percentage in percentages.items()}

    def format_result(self, result: dict[str, float]) -> str:
        """Returns the test F1 and exact match in one line."""
        f1 = format_metric("f1", result["test/f1"])
        exact = format_metric("exact", result["test/exact"])
        return f"test F1 {f1}    exact match {exact}"
