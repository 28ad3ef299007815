"""Answers to questions as spans of a text."""

import math
from collections.abc import Collection
from typing import Any

import torch

from moe_dist.config.schema import Config, QuestionDataConfig
from moe_dist.data.data_source import DataSource, named_source
from moe_dist.data.text.squad import SQUAD, check_questions, open_questions
from moe_dist.data.text.squad_windows import QuestionWindows, best_spans, squad_scores
from moe_dist.data.text.wordpiece import IGNORE_INDEX
from moe_dist.distributed.collectives import all_reduce_sum
from moe_dist.models.text_encoder import AnswerFinder
from moe_dist.moe.layer import LayerStats
from moe_dist.monitoring.metric_format import format_metric
from moe_dist.tasks.encoder_base import balance_loss
from moe_dist.tasks.text_base import SPLITS, TextBatch, TextTask, _nll, _shown

NUM_SPANS = 20  # of a window that are looked at for the best answers


class QuestionAnswering(TextTask):
    """Answers that are a piece of a text, or none (SQuAD)."""

    data_config: type = QuestionDataConfig
    primary_metric: str = "f1"
    model_class = AnswerFinder

    @property
    def uniform_loss(self) -> float:
        return math.log(self.model.max_tokens)

    def open(self) -> None:
        data = self.config.data
        assert isinstance(data, QuestionDataConfig)
        self.data = data
        questions = open_questions(data.questions)
        texts = [text for each in questions["train"] for text in (each.question, each.context)]
        self.tokens = self.tokens_for(texts, f"data.questions={data.questions!r}")
        sizes = (self.model.max_tokens, data.doc_stride, self.layout.global_batch_size)
        self.splits = {
            s: QuestionWindows(questions[s], self.tokens, *sizes, self.seed(s)) for s in SPLITS
        }
        if lost := self.splits["train"].num_misplaced:
            self.notes.append(
                f"{lost} training questions have an answer that is not where they say, and are left out"
            )
        self.found: list[
            tuple[int, torch.Tensor]
        ] = []  # window, and (score, start, end) of its best spans

    def data_source(self) -> DataSource:
        return named_source(
            self.data.questions,
            {name: (repository, None, None) for name, repository in SQUAD.items()},
        )

    @staticmethod
    def check_data(config: Config, main: bool, explicit: Collection[str]) -> None:
        assert isinstance(config.data, QuestionDataConfig)
        check_questions(config.data.questions)

    def loss(
        self, engine: Any, batch: TextBatch, total: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, LayerStats]]:
        """The step's loss is the mean of the nll of first and of last tokens, per window."""
        first_B, last_B = (_shown(target, batch) for target in batch.targets)
        start_BS, end_BS, stats = engine(batch.token_BS, batch.kind_BS, batch.ctx)
        valid_BS = batch.ctx.valid_T.view(batch.token_BS.shape)
        valid_BS = (
            valid_BS | ~valid_BS[:, :1]
        )  # a window that is padding has some logit, but no target
        start_BS, end_BS = (
            logits.masked_fill(~valid_BS, -torch.inf) for logits in (start_BS, end_BS)
        )
        nll = (_nll(start_BS, first_B) + _nll(end_BS, last_B)) / 2
        if not batch.ctx.train:
            spans = best_spans(
                start_BS,
                end_BS,
                batch.token_BS,
                batch.kind_BS,
                self.data.max_answer_tokens,
                NUM_SPANS,
            )
            score_Bn, start_Bn, end_Bn, null_B = (t.double() for t in spans)
            told_B4n = torch.stack(
                [score_Bn, start_Bn, end_Bn, null_B[:, None].expand_as(score_Bn)], 1
            )
            self.found.append((batch.first, told_B4n))
        sums = {"nll": nll, "texts": (first_B != IGNORE_INDEX).sum(), "work": self.work(batch)}
        return (nll / total[0] + balance_loss(self.layout, stats)).to(nll.dtype), sums, stats

    def compute_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        return {"loss": sums["nll"] / max(1, sums["texts"])}

    def finalize_eval(self, split: str) -> dict[str, float]:
        """Returns exact match and F1 of the best answers, as fractions. A collective."""
        answers = self.splits[split]
        windows = len(answers.window_W5)
        told_W4n = torch.zeros(windows, 4, NUM_SPANS, dtype=torch.float64, device=self.mesh.device)
        for first, told_B4n in self.found:
            kept = told_B4n[: max(0, windows - first)]
            told_W4n[first : first + len(kept)] = kept
        self.found.clear()
        score_Wn, start_Wn, end_Wn, null_Wn = all_reduce_sum(told_W4n, self.mesh.dp).cpu().unbind(1)
        best = answers.decode(
            score_Wn, start_Wn.long(), end_Wn.long(), null_Wn[:, 0], self.data.no_answer_threshold
        )
        found = {question: texts[0][0] if texts else "" for question, texts in best.items()}
        return {
            name: per_cent / 100
            for name, per_cent in squad_scores(answers.questions, found).items()
        }

    def format_result(self, result: dict[str, float]) -> str:
        return f"test F1 {format_metric('f1', result['test/f1'])}    exact match {format_metric('exact', result['test/exact'])}"
