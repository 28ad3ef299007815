"""Classification of texts and text pairs.

Legend: B texts, C classes, N texts in a split.
"""

import math
from collections.abc import Collection, Iterator
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
from moe_dist.models.text_encoder import TextClassifier
from moe_dist.monitoring.metric_format import METRIC_FORMATS, format_metric, primary_metric
from moe_dist.tasks.encoder_base import balance_loss
from moe_dist.tasks.eval_buffer import EvalBuffer
from moe_dist.tasks.scores import f1, matthews, pearson, spearman
from moe_dist.tasks.task import LossResult, ModelEngine
from moe_dist.tasks.text_base import (
    VOCABULARY_SIZE,
    TextBatch,
    TextTask,
    count_correct,
    sum_nll,
    valid_targets,
)

# the metric that GLUE reports in addition to accuracy
GLUE_MEASURES = {"glue:cola": "matthews", "glue:mrpc": "f1", "glue:qqp": "f1"}


class TextClassification(TextTask):
    """A task from texts, or text pairs, to classes or to scores (`REGRESSION_TASKS`).

    The metrics follow GLUE (Wang et al. 2018, Table 1); the second class is the positive one.

    Attributes:
        has_scores: True if the data has scores, not classes; the loss is then a squared
            error.
        glue_measure: The metric besides accuracy, or None.
        classes: The class names.
        pairs: True if a sample is a text pair.
        scores: In evaluation, the predicted score for each text.
    """

    data_config: type = SentenceDataConfig
    primary_metric: str = "accuracy"
    required_metadata: tuple[str, ...] = ("tokens", "classes")
    fields_from_data: tuple[str, ...] = ("model.num_classes", VOCABULARY_SIZE)
    has_scores = False
    model_class = TextClassifier

    @property
    def uniform_loss(self) -> float:
        """Loss with equal probabilities for all classes (nats), or for score 0."""
        if self.has_scores:  # the squared error if every prediction is 0
            return float((self.splits["train"].label_N ** 2).mean())
        return math.log(max(2, self.model.num_classes))

    def open_data(self) -> None:
        """Opens the texts and the tokenizer."""
        data = self.config.data
        assert isinstance(data, SentenceDataConfig)
        self.glue_measure = GLUE_MEASURES.get(data.sentences)
        self.has_scores = data.sentences in REGRESSION_TASKS
        self.scores = EvalBuffer()
        self.classes, sentences = open_sentences(data.sentences)
        self.pairs = sentences["train"][0].text2 is not None
        source = f"data.sentences={data.sentences!r}"
        self._fit_classes(source)
        texts: list[str] = []
        for sentence in sentences["train"]:
            texts += [text for text in (sentence.text, sentence.text2) if text]
        self.tokens = self.load_tokens(texts, source)
        self.splits = {}
        for split, split_sentences in sentences.items():
            self.splits[split] = Sentences(
                split_sentences,
                self.tokens,
                self.model.max_tokens,
                self.layout.global_batch_size,
                self.shuffle_seed(split),
            )
        self.test_splits = tuple(split for split in sentences if split not in ("train", "valid"))
        num_cut = self.splits["train"].num_cut
        if num_cut:
            self.notes.append(
                f"{num_cut} training texts are cut to model.max_tokens={self.model.max_tokens}"
            )

    def _fit_classes(self, source: str) -> None:
        """Sets `model.num_classes` from the data."""
        if self.has_scores:
            self.fit.take("model.num_classes", 1, f"{source} has scores, and no classes")
            return
        self.fit.take_classes(self.classes, source)
        similar = names_differing_by_case(self.classes)
        if similar:
            self.notes.append(
                f"{source} has labels that differ by case alone: {preview_names(similar)}"
            )

    def data_source(self) -> DataSource:
        """Returns the file or the data set with the texts."""
        assert isinstance(self.config.data, SentenceDataConfig)
        name = self.config.data.sentences
        if name == MOVIE_REVIEWS:
            return files_source(name, [MOVIE_REVIEWS_FILE], MOVIE_REVIEWS_FILE)
        return named_source(name, {"glue": ("nyu-mll/glue", None, None)})

    @staticmethod
    def check_data(config: Config, main: bool, explicit: Collection[str]) -> None:
        """Checks that the texts exist."""
        assert isinstance(config.data, SentenceDataConfig)
        check_sentences(config.data.sentences)

    def checkpoint_metadata(self) -> dict[str, Any]:
        """Returns tokenizer, class names, and whether samples are pairs."""
        return super().checkpoint_metadata() | {"classes": list(self.classes), "pairs": self.pairs}

    def eval_batches(self, split: str) -> Iterator[list[TextBatch]]:
        """Yields every text once, after resetting the evaluation buffer."""
        self.scores.reset()
        return super().eval_batches(split)

    def loss(self, engine: ModelEngine, batch: TextBatch, total: torch.Tensor) -> LossResult:
        """Returns the nll per text, or the squared error per text if the data has scores."""
        label_B = valid_targets(batch.targets[0], batch)
        logit_BC, stats = engine(batch.token_BS, batch.kind_BS, batch.ctx)
        valid_B = label_B != IGNORE_INDEX
        sums = {"texts": valid_B.sum(), "work": self.work(batch)}
        if self.has_scores:
            score_B = logit_BC[:, 0].to(torch.promote_types(logit_BC.dtype, torch.float32))
            error_B = torch.where(valid_B, score_B - label_B.to(score_B), 0)
            nll = error_B.square().sum()
            if not batch.ctx.train:
                self.scores.add(batch.first, score_B)
        else:
            nll = sum_nll(logit_BC, label_B)
            sums["correct"] = count_correct(logit_BC, label_B)
        if self.glue_measure:
            predicted_B = valid_B & (logit_BC.argmax(1) == 1)
            positive_B = valid_B & (label_B == 1)
            sums["true_positive"] = (predicted_B & positive_B).sum()
            sums["false_positive"] = (predicted_B & ~positive_B).sum()
            sums["false_negative"] = (~predicted_B & positive_B).sum()
        sums["nll"] = nll
        return (nll / total[0] + balance_loss(self.layout, stats)).to(nll.dtype), sums, stats

    def compute_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Returns the loss and, for classes, the accuracy and the GLUE measure."""
        metrics = {"loss": sums["nll"] / sums["texts"]}
        if self.has_scores:
            return metrics
        metrics["accuracy"] = sums["correct"] / sums["texts"]
        true_positive = sums.get("true_positive", 0)
        false_positive = sums.get("false_positive", 0)
        false_negative = sums.get("false_negative", 0)
        true_negative = sums["texts"] - true_positive - false_positive - false_negative
        if self.glue_measure == "matthews":
            metrics["matthews"] = matthews(
                true_positive, false_positive, false_negative, true_negative
            )
        if self.glue_measure == "f1":
            metrics["f1"] = f1(true_positive, false_positive, false_negative)
        return metrics

    def finalize_eval(self, split: str) -> dict[str, float]:
        """Returns the correlations between predicted and true scores. A collective."""
        if not self.has_scores:
            return {}
        label_N = self.splits[split].label_N
        score_N = self.scores.gather(len(label_N), (), self.mesh).numpy()
        return {"pearson": pearson(score_N, label_N), "spearman": spearman(score_N, label_N)}

    def format_result(self, result: dict[str, float]) -> str:
        """Returns the test metrics in one line, the primary one first."""
        names = [name for name in METRIC_FORMATS if f"test/{name}" in result]
        first = primary_metric(result, "test")
        names.sort(key=lambda name: name != first)
        parts: list[str] = []
        for name in names:
            value = format_metric(name, result[f"test/{name}"])
            parts.append(f"{METRIC_FORMATS[name].name} {value}")
        if "mismatched/accuracy" in result:
            parts.append(f"mismatched {format_metric('accuracy', result['mismatched/accuracy'])}")
        unit = "squared error" if self.has_scores else "nats"
        return f"test {'    '.join(parts)}    loss {result['test/loss']:.4f} {unit} per text"
