"""Next-word prediction on one long text, cut into parallel lanes. A sample is one lane.

Legend: B samples (lanes of text), S timesteps, T = B S tokens, D width.
"""

import math
from collections.abc import Collection, Iterable, Iterator
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
from moe_dist.monitoring.metric_format import format_perplexity, perplexity
from moe_dist.nn.token_context import TokenContext
from moe_dist.tasks.data_fit import DataFit
from moe_dist.tasks.encoder_base import balance_loss, build_on_meta, token_context
from moe_dist.tasks.task import LossResult, ModelEngine

VOCABULARY_SIZE = "data.vocabulary_size"


@dataclass(frozen=True)
class LMBatch:
    """This rank's share of one micro-batch.

    Attributes:
        micro: The micro-batch's number in its step.
        input_BS: Words, int64.
        target_BS: The next word for each input.
        ctx: The words' context.
    """

    micro: int
    input_BS: torch.Tensor
    target_BS: torch.Tensor
    ctx: TokenContext


class LanguageModel:
    """A next-word task that carries each lane's state from step to step. See `tasks.Task`.

    Attributes:
        vocabulary: The words, by falling frequency.
        lanes: Each split's text, in memory and cut into lanes.
        stream: The training split if it is read while training, else None.
        state: This rank's LSTM state after the last window, by micro-batch.
    """

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
        """Opens the text and the vocabulary; see `tasks.Task`.

        The vocabulary is the saved one, or built from the training split on the main rank in one
        pass; `data.vocabulary_size` is then its maximum size.

        Args:
            config: The run's config.
            layout: The batch layout.
            mesh: The ranks.
            saved: `checkpoint_metadata` from the run that this run continues or starts from.
            explicit: Dotted keys set by the user.

        Raises:
            ValueError: The text cannot be found, read or split, or has fewer words than the user
                has set or than one step reads.
        """
        self.layout = layout
        self.mesh = mesh
        data = config.data
        assert isinstance(data, TextDataConfig)
        lines = open_text(data.text, data.streamed)
        fit = DataFit(config, explicit)
        self.vocabulary = self._load_vocabulary(lines["train"], fit, saved)
        self.config = fit.config
        self.notes = fit.notes
        num_lanes = layout.global_batch_size
        seq_len = config.batch.seq_len
        run_on_main(lambda: check_lanes(lines["train"], num_lanes, seq_len, data.streamed))
        self.lanes: dict[str, Lanes] = {}
        for split in ("valid", "test") if data.streamed else ("train", "valid", "test"):
            tokens = self.vocabulary.encode(lines[split])
            self.lanes[split] = Lanes(tokens, num_lanes, split == "train")
        self.stream: Stream | None = None
        if data.streamed:
            local_lanes: list[int] = []
            for micro in range(layout.grad_accum_steps):
                local_lanes += layout.local_samples(micro, mesh.dp.index)
            self.stream = Stream(lines["train"], self.vocabulary, num_lanes, local_lanes)
        self.state: list[Any] = []

    @staticmethod
    def _load_vocabulary(
        lines: Iterable[str], fit: DataFit, saved: dict[str, Any] | None
    ) -> Vocabulary:
        """Returns the saved or a new vocabulary and sets its size in the config. A collective."""
        data = fit.config.data
        assert isinstance(data, TextDataConfig)
        if saved:
            vocabulary = saved_vocabulary(saved)
            reason = (
                "the run to continue (--resume) or to start from (init_from) has "
                f"{len(vocabulary)} words"
            )
        else:
            exact = VOCABULARY_SIZE in fit.explicit_keys
            size = data.vocabulary_size
            vocabulary = run_on_main(lambda: Vocabulary.build(lines, size, exact))
            reason = f"data.text={data.text!r} has no more words"
        fit.take(VOCABULARY_SIZE, len(vocabulary), reason)
        return vocabulary

    @staticmethod
    def build_model(config: Config) -> nn.Module:
        """Returns the LSTM model on the meta device."""
        assert isinstance(config.model, LSTMConfig) and isinstance(config.data, TextDataConfig)
        return build_on_meta(LSTMLanguageModel, config.model, config.data.vocabulary_size)

    @staticmethod
    def check_data(config: Config, main: bool, explicit: Collection[str]) -> None:
        """Checks that the text exists."""
        assert isinstance(config.data, TextDataConfig)
        check_text(config.data.text)

    @staticmethod
    def comparison_key(config: Config) -> dict[str, Any]:
        """Returns steps, data and words per step."""
        words = config.batch.global_batch_size * config.batch.seq_len
        return {"steps": config.steps, "data": asdict(config.data), "words": words}

    def data_source(self) -> DataSource:
        """Returns the files with the text."""
        assert isinstance(self.config.data, TextDataConfig)
        return text_source(self.config.data.text)

    @property
    def uniform_loss(self) -> float:
        """Loss with equal probabilities for all words, in nats."""
        assert isinstance(self.config.data, TextDataConfig)
        return math.log(self.config.data.vocabulary_size)

    def checkpoint_metadata(self) -> dict[str, Any]:
        """Returns the vocabulary."""
        return {"vocabulary": asdict(self.vocabulary)}

    def reset_state(self, dtype: torch.dtype) -> None:
        """Sets the state before a text's first words: zeros.

        Args:
            dtype: The model's dtype.
        """
        assert isinstance(self.config.model, LSTMConfig)
        num_lanes = self.layout.samples_per_rank
        lanes = torch.zeros(1, num_lanes, 1, dtype=dtype, device=self.mesh.device)
        zeros: list[tuple[torch.Tensor, torch.Tensor]] = []
        for h_width, c_width in state_widths(self.config.model):
            zeros.append((lanes.repeat(1, 1, h_width), lanes.repeat(1, 1, c_width)))
        self.state = [tuple(zeros)] * self.layout.grad_accum_steps

    def batches(self, step: int, split: str = "train") -> Iterator[LMBatch]:
        """Iterates over this rank's micro-batches in one window of the text.

        Args:
            step: The window's number, from 0; a stream ignores it and continues.
            split: The split's name.

        Yields:
            The micro-batches.
        """
        seq_len = self.config.batch.seq_len
        for micro in range(self.layout.grad_accum_steps):
            lane_B = np.array(self.layout.local_samples(micro, self.mesh.dp.index))
            if self.stream and split == "train":
                window = self.stream.window(seq_len, lane_B)
            else:
                window = self.lanes[split].window(step * seq_len, seq_len, lane_B)
            input_BS, target_BS, valid_BS = (t.to(self.mesh.device) for t in window)
            ctx = token_context(
                self.layout,
                self.mesh,
                micro,
                sample_T=torch.from_numpy(lane_B.repeat(seq_len)),
                position_T=torch.arange(seq_len).repeat(len(lane_B)),
                valid_T=valid_BS.flatten(),
                seed=self.config.seed,
                step=step,
                train=split == "train",
            )
            yield LMBatch(micro, input_BS, target_BS, ctx)

    def loss_denominator(self, batches: list[LMBatch]) -> torch.Tensor:
        """Counts the valid words in the step, float64. A collective."""
        num_words = torch.stack([batch.ctx.valid_T.sum() for batch in batches]).sum()
        return all_reduce_sum(num_words.double(), self.mesh.dp)

    def loss(self, engine: ModelEngine, batch: LMBatch, total: torch.Tensor) -> LossResult:
        """Returns the nll per valid word, and carries the lanes' state to the next window."""
        nll, state, stats = engine(
            batch.input_BS, batch.target_BS, self.state[batch.micro], batch.ctx
        )
        self.state[batch.micro] = _reset_nonfinite_lanes(state)
        sums = {"nll": nll, "tokens": batch.ctx.valid_T.sum()}
        return (nll / total + balance_loss(self.layout, stats)).to(nll.dtype), sums, stats

    def compute_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Returns loss and perplexity."""
        loss = sums["nll"] / sums["tokens"]
        return {"loss": loss, "perplexity": perplexity(loss)}

    def eval_batches(self, split: str) -> Iterator[list[LMBatch]]:
        """Iterates over a split's windows; a lane without words left is padding.

        The LSTM state starts at zero; training's state is restored at the end.

        Args:
            split: The split's name.

        Yields:
            Each window's micro-batches.
        """
        training_state = self.state
        self.reset_state(training_state[0][0][0].dtype)
        for window in range(self.lanes[split].num_windows(self.config.batch.seq_len)):
            yield list(self.batches(window, split))
        self.state = training_state

    def finalize_eval(self, split: str) -> dict[str, float]:
        """Returns no further metrics."""
        return {}

    def weight_metrics(self, engine: ModelEngine) -> dict[str, float]:
        """Returns no metrics."""
        return {}

    def save_state(self) -> dict[str, torch.Tensor]:
        """Returns all lanes' state. A collective.

        Returns:
            "lstm0.h", "lstm0.c" and so on, (B, width), and "stream", places in a stream, (B, 2).
        """
        whole: dict[str, torch.Tensor] = {}
        for i in range(len(self.state[0])):
            for j, part in enumerate(("h", "c")):
                like = self.state[0][i][j]
                rows_BD = like.new_zeros(self.layout.global_batch_size, like.shape[2])
                for micro, state in enumerate(self.state):
                    rows_BD[self._local_lanes(micro)] = state[i][j][0]
                whole[f"lstm{i}.{part}"] = all_reduce_sum(rows_BD, self.mesh.dp)
        if self.stream:
            places = self.stream.places().to(self.mesh.device)
            whole["stream"] = all_reduce_sum(places, self.mesh.dp)
        return whole

    def load_state(self, saved: dict[str, torch.Tensor]) -> None:
        """Restores a saved state, on any layout.

        Args:
            saved: The result of `save_state`.
        """
        for micro, state in enumerate(self.state):
            lanes = self._local_lanes(micro)
            loaded: list[tuple[torch.Tensor, torch.Tensor]] = []
            for i, (h, c) in enumerate(state):
                saved_h = saved[f"lstm{i}.h"][None, lanes]
                saved_c = saved[f"lstm{i}.c"][None, lanes]
                loaded.append((saved_h.to(h), saved_c.to(c)))
            self.state[micro] = tuple(loaded)
        if self.stream:
            self.stream.load(saved["stream"])

    def _local_lanes(self, micro: int) -> slice:
        """Returns this rank's lanes in a micro-batch."""
        lanes = self.layout.local_samples(micro, self.mesh.dp.index)
        return slice(lanes.start, lanes.stop)

    def format_result(self, result: dict[str, float]) -> str:
        """Returns the test perplexity, and that of a unigram model for comparison."""
        unigram = unigram_perplexity(self.vocabulary.counts, self.lanes["test"].token_N)
        perplexity = format_perplexity(result["test/perplexity"], result["test/loss"])
        return f"test perplexity {perplexity}    unigram model {unigram:.1f}"


def _reset_nonfinite_lanes(state: State) -> State:
    """Returns the state without its autograd graph, and with zeros for lanes with NaN or infinity.

    Otherwise such a lane has only NaN from then on (`nan_detector`).
    """
    finite = [t.detach().isfinite().all(-1) for pair in state for t in pair]
    finite_1B1 = torch.stack(finite).all(0)[..., None]
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    for h, c in state:
        kept.append(
            (torch.where(finite_1B1, h.detach(), 0), torch.where(finite_1B1, c.detach(), 0))
        )
    return tuple(kept)


def saved_vocabulary(saved: dict[str, Any]) -> Vocabulary:
    """Restores a vocabulary.

    Args:
        saved: A checkpoint's metadata.

    Returns:
        The vocabulary.

    Raises:
        ValueError: The checkpoint has no vocabulary, or one without counts.
    """
    try:
        return Vocabulary(**{key: tuple(values) for key, values in saved["vocabulary"].items()})
    except (KeyError, TypeError, AttributeError):
        raise ValueError(
            "the run to continue (--resume) or to start from (init_from) has no vocabulary with "
            "counts; use a run of a language model of this version"
        ) from None
