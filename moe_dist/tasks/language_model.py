"""Next-word prediction on one long text. A sample is a lane of it.

Legend: B samples (lanes of text), S timesteps, T = B S tokens, D width.
"""

import math
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from moe_dist.config.schema import Config, LSTMConfig, TextDataConfig
from moe_dist.data.data_source import DataSource, text_source
from moe_dist.data.text.corpus import check_text, open_text
from moe_dist.data.text.lanes import Lanes, Vocabulary, unigram_perplexity
from moe_dist.data.text.stream import Stream, check_lanes
from moe_dist.distributed.batch_layout import BatchLayout
from moe_dist.distributed.collectives import all_reduce_sum, run_on_main
from moe_dist.distributed.mesh import Mesh
from moe_dist.models.lstm_lm import LSTMLanguageModel, State, state_widths
from moe_dist.moe.layer import LayerStats
from moe_dist.monitoring.metric_format import format_perplexity, perplexity
from moe_dist.nn.token_context import TokenContext
from moe_dist.tasks.data_fit import DataFit
from moe_dist.tasks.encoder_base import balance_loss, build_on_meta, token_context

VOCABULARY_SIZE = "data.vocabulary_size"


@dataclass(frozen=True)
class LMBatch:
    """This rank's share of one micro-batch."""

    micro: int
    input_BS: torch.Tensor
    target_BS: torch.Tensor
    ctx: TokenContext


class LanguageModel:
    """The state of each lane is carried from step to step. See `tasks.Task`."""

    model_config: type = LSTMConfig
    data_config: type = TextDataConfig
    throughput_unit: str = "tokens"
    primary_metric: str = "perplexity"
    test_splits: tuple[str, ...] = ("test",)
    required_metadata: tuple[str, ...] = ("vocabulary",)
    fields_from_data: tuple[str, ...] = (VOCABULARY_SIZE,)

    def __init__(
        self,
        config: Config,
        layout: BatchLayout,
        mesh: Mesh,
        saved: dict[str, Any] | None,
        explicit: Collection[str] = (),
    ) -> None:
        """Opens the text. The vocabulary is the saved one, or built from the training split on the main rank, in one
        pass; `data.vocabulary_size` is its largest size. See `tasks.Task`.

        Raises:
            ValueError: The text cannot be found, read or split, or has fewer words than the user has set or than a step
                reads.
        """
        self.layout, self.mesh = layout, mesh
        data = config.data
        assert isinstance(data, TextDataConfig)
        lines = open_text(data.text, data.streamed)
        if saved:
            self.vocabulary = saved_vocabulary(saved)
            why = (
                f"the run to go on from, or to begin with (init), has {len(self.vocabulary)} words"
            )
        else:
            exact = VOCABULARY_SIZE in explicit
            self.vocabulary = run_on_main(
                lambda: Vocabulary.build(lines["train"], data.vocabulary_size, exact)
            )
            why = f"data.text={data.text!r} has no more words"
        fit = DataFit(config, explicit)
        fit.take(VOCABULARY_SIZE, len(self.vocabulary), why)
        self.config, self.notes = fit.config, fit.notes
        timesteps = config.batch.seq_len
        run_on_main(
            lambda: check_lanes(lines["train"], layout.global_batch_size, timesteps, data.streamed)
        )
        in_memory = ("valid", "test") if data.streamed else ("train", "valid", "test")
        self.lanes = {
            s: Lanes(self.vocabulary.encode(lines[s]), layout.global_batch_size, s == "train")
            for s in in_memory
        }
        mine = [
            lane
            for micro in range(layout.grad_accum_steps)
            for lane in layout.local_samples(micro, mesh.dp.index)
        ]
        self.stream = (
            Stream(lines["train"], self.vocabulary, layout.global_batch_size, mine)
            if data.streamed
            else None
        )
        self.state: list[Any] = []  # of this rank's lanes after the last window, by micro-batch

    @staticmethod
    def build_model(config: Config) -> nn.Module:
        assert isinstance(config.model, LSTMConfig) and isinstance(config.data, TextDataConfig)
        return build_on_meta(LSTMLanguageModel, config.model, config.data.vocabulary_size)

    @staticmethod
    def check_data(config: Config, main: bool, explicit: Collection[str]) -> None:
        assert isinstance(config.data, TextDataConfig)
        check_text(config.data.text)

    @staticmethod
    def comparison_key(config: Config) -> dict[str, Any]:
        words = config.batch.global_batch_size * config.batch.seq_len
        return {"steps": config.steps, "data": asdict(config.data), "words": words}

    def data_source(self) -> DataSource:
        assert isinstance(self.config.data, TextDataConfig)
        return text_source(self.config.data.text)

    @property
    def uniform_loss(self) -> float:
        assert isinstance(self.config.data, TextDataConfig)
        return math.log(self.config.data.vocabulary_size)

    def checkpoint_metadata(self) -> dict[str, Any]:
        return {"vocabulary": asdict(self.vocabulary)}

    def reset_state(self, dtype: torch.dtype) -> None:
        """The state before a text's first words: zeros, of the model's `dtype`."""
        assert isinstance(self.config.model, LSTMConfig)
        lanes = torch.zeros(
            1, self.layout.samples_per_rank, 1, dtype=dtype, device=self.mesh.device
        )
        widths = state_widths(self.config.model)
        zeros = tuple(tuple(lanes.repeat(1, 1, width) for width in pair) for pair in widths)
        self.state = [zeros] * self.layout.grad_accum_steps

    def batches(self, step: int, split: str = "train") -> Iterator[LMBatch]:
        """This rank's micro-batches of window `step` (from 0) of a split; of a stream, whatever comes next."""
        timesteps = self.config.batch.seq_len
        for micro in range(self.layout.grad_accum_steps):
            lane_B = np.array(self.layout.local_samples(micro, self.mesh.dp.index))
            if self.stream and split == "train":
                window = self.stream.window(timesteps, lane_B)
            else:
                window = self.lanes[split].window(step * timesteps, timesteps, lane_B)
            input_BS, target_BS, valid_BS = (t.to(self.mesh.device) for t in window)
            position_T = torch.arange(timesteps).repeat(len(lane_B))
            sample_T = torch.from_numpy(lane_B.repeat(timesteps))
            key = (self.config.seed, step, split == "train")
            ctx = token_context(
                self.layout, self.mesh, micro, sample_T, position_T, valid_BS.flatten(), *key
            )
            yield LMBatch(micro, input_BS, target_BS, ctx)

    def loss_denominator(self, batches: list[LMBatch]) -> torch.Tensor:
        """Valid words of the whole step."""
        return all_reduce_sum(sum(b.ctx.valid_T.sum() for b in batches).double(), self.mesh.dp)  # type: ignore[union-attr]

    def loss(
        self, engine: Any, batch: LMBatch, total: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, LayerStats]]:
        """The step's loss is nll per valid word."""
        nll, state, stats = engine(
            batch.input_BS, batch.target_BS, self.state[batch.micro], batch.ctx
        )
        self.state[batch.micro] = _anew_where_not_finite(state)
        sums = {"nll": nll, "tokens": batch.ctx.valid_T.sum()}
        return (nll / total + balance_loss(self.layout, stats)).to(nll.dtype), sums, stats

    def compute_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        loss = sums["nll"] / sums["tokens"]
        return {"loss": loss, "perplexity": perplexity(loss)}

    def eval_batches(self, split: str) -> Iterator[list[LMBatch]]:
        """Who has no words left sends padding. State begins at zero, and training's comes back afterwards."""
        training = self.state
        self.reset_state(training[0][0][0].dtype)
        for window in range(self.lanes[split].num_windows(self.config.batch.seq_len)):
            yield list(self.batches(window, split))
        self.state = training

    def finalize_eval(self, split: str) -> dict[str, float]:
        return {}

    def weight_metrics(self, engine: Any) -> dict[str, float]:
        return {}

    def save_state(self) -> dict[str, torch.Tensor]:
        """Of all lanes: hidden state, (B, width) for h and c of each LSTM; places in a stream, (B, 2). A collective."""
        whole = {}
        for i, pair in enumerate(self.state[0]):
            for kind, like in zip("hc", pair, strict=True):
                rows_BD = like.new_zeros(self.layout.global_batch_size, like.shape[2])
                for micro, state in enumerate(self.state):
                    rows_BD[self._mine(micro)] = state[i]["hc".index(kind)][0]
                whole[f"lstm{i}.{kind}"] = all_reduce_sum(rows_BD, self.mesh.dp)
        if self.stream:
            whole["stream"] = all_reduce_sum(
                self.stream.places().to(self.mesh.device), self.mesh.dp
            )
        return whole

    def load_state(self, saved: dict[str, torch.Tensor]) -> None:
        """Inverse of `save_state`, on any layout."""
        for micro, state in enumerate(self.state):
            mine = self._mine(micro)
            self.state[micro] = tuple(
                tuple(
                    saved[f"lstm{i}.{kind}"][None, mine].to(like)
                    for kind, like in zip("hc", pair, strict=True)
                )
                for i, pair in enumerate(state)
            )
        if self.stream:
            self.stream.load(saved["stream"])

    def _mine(self, micro: int) -> slice:
        mine = self.layout.local_samples(micro, self.mesh.dp.index)
        return slice(mine.start, mine.stop)

    def format_result(self, result: dict[str, float]) -> str:
        """Beside what knowing only word frequencies gives."""
        unigram = unigram_perplexity(self.vocabulary.counts, self.lanes["test"].token_N)
        perplexity = format_perplexity(result["test/perplexity"], result["test/loss"])
        return f"test perplexity {perplexity}    unigram model {unigram:.1f}"


def _anew_where_not_finite(state: State) -> State:
    """Zeros for lanes that would give nothing but NaN from now on (`finite`); without their past."""
    ok_1B1 = torch.stack([t.detach().isfinite().all(-1) for pair in state for t in pair]).all(0)[
        ..., None
    ]
    return tuple(tuple(torch.where(ok_1B1, t.detach(), 0) for t in pair) for pair in state)  # type: ignore[misc]


def saved_vocabulary(saved: dict[str, Any]) -> Vocabulary:
    """Of a checkpoint's state. Raises ValueError where there is none."""
    try:
        return Vocabulary(**{key: tuple(values) for key, values in saved["vocabulary"].items()})
    except (KeyError, TypeError, AttributeError):
        raise ValueError(
            "the run to go on from, or to begin with (init), has no vocabulary with counts: it is no language model, "
            "or too old"
        ) from None
