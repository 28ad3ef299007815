"""Pre-training for text encoders: masked words and the order of two texts.

Legend: B texts, T tokens, N masked tokens, V vocabulary.
"""

import math
from collections.abc import Collection

import torch

from moe_dist.config.schema import Config, PretrainingDataConfig
from moe_dist.data.data_source import DataSource, text_source
from moe_dist.data.text.corpus import check_text, open_text
from moe_dist.data.text.masked_lm import Pretraining
from moe_dist.data.text.wordpiece import IGNORE_INDEX
from moe_dist.models.text_encoder import PretrainingModel
from moe_dist.monitoring.metric_format import format_metric, format_perplexity, perplexity
from moe_dist.tasks.encoder_base import balance_loss
from moe_dist.tasks.task import LossResult, ModelEngine
from moe_dist.tasks.text_base import (
    SPLITS,
    TextBatch,
    TextTask,
    count_correct,
    sum_nll,
    valid_targets,
)


class MaskedLM(TextTask):
    """A task that predicts masked words, and the order of two texts (Lan et al. 2020, 3.1)."""

    data_config: type = PretrainingDataConfig
    primary_metric: str = "perplexity"
    model_class = PretrainingModel

    @property
    def uniform_loss(self) -> float:
        """Loss with equal probabilities for all words and for both orders, in nats."""
        return math.log(self.model.vocabulary_size) + math.log(2)

    def open_data(self) -> None:
        """Opens the text and the tokenizer."""
        data = self.config.data
        assert isinstance(data, PretrainingDataConfig)
        lines = open_text(data.text, False)
        self.tokens = self.load_tokens(lines["train"], f"data.text={data.text!r}")
        self.splits = {}
        for split in SPLITS:
            self.splits[split] = Pretraining(
                lines[split],
                self.tokens,
                self.model.max_tokens,
                self.layout.global_batch_size,
                self.shuffle_seed(split),
            )

    def data_source(self) -> DataSource:
        """Returns the files with the text."""
        assert isinstance(self.config.data, PretrainingDataConfig)
        return text_source(self.config.data.text)

    @staticmethod
    def check_data(config: Config, main: bool, explicit: Collection[str]) -> None:
        """Checks that the text exists."""
        assert isinstance(config.data, PretrainingDataConfig)
        check_text(config.data.text)

    def loss(self, engine: ModelEngine, batch: TextBatch, total: torch.Tensor) -> LossResult:
        """Returns the nll per masked word plus the order's nll per text."""
        word_T = valid_targets(batch.targets[0], batch).flatten()
        order_B = valid_targets(batch.targets[1], batch).flatten()
        masked_N = (word_T != IGNORE_INDEX).nonzero().squeeze(1)
        word_N = word_T[masked_N]
        logit_NV, order_B2, stats = engine(batch.token_BS, batch.kind_BS, masked_N, batch.ctx)
        nll = sum_nll(logit_NV, word_N)
        order_nll = sum_nll(order_B2, order_B)
        loss = nll / total[0] + order_nll / total[1] + balance_loss(self.layout, stats)
        sums = {
            "nll": nll,
            "masked": word_N.new_tensor(len(word_N)),
            "masked_correct": count_correct(logit_NV, word_N),
            "order_nll": order_nll,
            "texts": (order_B != IGNORE_INDEX).sum(),
            "order_correct": count_correct(order_B2, order_B),
            "work": self.work(batch),
        }
        return loss.to(nll.dtype), sums, stats

    def compute_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Returns loss, masked-word perplexity and both accuracies."""
        num_masked = max(1, sums["masked"])
        num_texts = max(1, sums["texts"])
        loss = sums["nll"] / num_masked
        return {
            "loss": loss + sums["order_nll"] / num_texts,
            "perplexity": perplexity(loss),
            "masked_accuracy": sums["masked_correct"] / num_masked,
            "order_accuracy": sums["order_correct"] / num_texts,
        }

    def format_result(self, result: dict[str, float]) -> str:
        """Returns the test perplexity and the accuracy for the order in one line."""
        perplexity = format_perplexity(result["test/perplexity"], result["test/loss"])
        accuracy = format_metric("order_accuracy", result["test/order_accuracy"])
        return (
            f"test perplexity of masked words {perplexity}    order of sentences right {accuracy}"
        )
