"""Pre-training of a text encoder: masked words and the order of two sentences."""

import math
from collections.abc import Collection
from typing import Any

import torch

from moe_dist.config.schema import Config, PretrainingDataConfig
from moe_dist.data.data_source import DataSource, text_source
from moe_dist.data.text.corpus import check_text, open_text
from moe_dist.data.text.masked_lm import Pretraining
from moe_dist.data.text.wordpiece import IGNORE_INDEX
from moe_dist.models.text_encoder import PretrainingModel
from moe_dist.moe.layer import LayerStats
from moe_dist.monitoring.metric_format import format_metric, format_perplexity, perplexity
from moe_dist.tasks.encoder_base import balance_loss
from moe_dist.tasks.text_base import SPLITS, TextBatch, TextTask, _correct, _nll, _shown


class MaskedLM(TextTask):
    """Masked words, and whether two runs of lines are in order (Lan et al. 2020, Section 3.1)."""

    data_config: type = PretrainingDataConfig
    primary_metric: str = "perplexity"
    model_class = PretrainingModel

    @property
    def uniform_loss(self) -> float:
        return math.log(self.model.vocabulary_size) + math.log(2)

    def open(self) -> None:
        data = self.config.data
        assert isinstance(data, PretrainingDataConfig)
        lines = open_text(data.text, False)
        self.tokens = self.tokens_for(lines["train"], f"data.text={data.text!r}")
        sizes = (self.model.max_tokens, self.layout.global_batch_size)
        self.splits = {s: Pretraining(lines[s], self.tokens, *sizes, self.seed(s)) for s in SPLITS}

    def data_source(self) -> DataSource:
        assert isinstance(self.config.data, PretrainingDataConfig)
        return text_source(self.config.data.text)

    @staticmethod
    def check_data(config: Config, main: bool, explicit: Collection[str]) -> None:
        assert isinstance(config.data, PretrainingDataConfig)
        check_text(config.data.text)

    def loss(
        self, engine: Any, batch: TextBatch, total: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, LayerStats]]:
        """The step's loss is nll per masked word, and per text that of its order."""
        word_T, order_B = (_shown(target, batch).flatten() for target in batch.targets)
        masked_N = (word_T != IGNORE_INDEX).nonzero().squeeze(1)
        word_N = word_T[masked_N]
        logit_NV, order_B2, stats = engine(batch.token_BS, batch.kind_BS, masked_N, batch.ctx)
        nll, order_nll = _nll(logit_NV, word_N), _nll(order_B2, order_B)
        loss = nll / total[0] + order_nll / total[1] + balance_loss(self.layout, stats)
        sums = {
            "nll": nll,
            "masked": word_N.new_tensor(len(word_N)),
            "masked_correct": _correct(logit_NV, word_N),
            "order_nll": order_nll,
            "texts": (order_B != IGNORE_INDEX).sum(),
            "order_correct": _correct(order_B2, order_B),
            "work": self.work(batch),
        }
        return loss.to(nll.dtype), sums, stats

    def compute_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        masked, texts = max(1, sums["masked"]), max(1, sums["texts"])
        loss = sums["nll"] / masked
        return {
            "loss": loss + sums["order_nll"] / texts,
            "perplexity": perplexity(loss),
            "masked_accuracy": sums["masked_correct"] / masked,
            "order_accuracy": sums["order_correct"] / texts,
        }

    def format_result(self, result: dict[str, float]) -> str:
        perplexity = format_perplexity(result["test/perplexity"], result["test/loss"])
        told = f"test perplexity of masked words {perplexity}"
        return f"{told}    order of sentences right {format_metric('order_accuracy', result['test/order_accuracy'])}"
