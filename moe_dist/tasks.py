"""What is trained on what: a task gives the plain model, this rank's micro-batches of a step, and their loss.

Legend: B samples (lanes of text), S timesteps, T = B S tokens, D width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from moe_dist.config import Config
from moe_dist.context import Context
from moe_dist.data.sources import open_text
from moe_dist.data.stream import Stream
from moe_dist.data.text import Lanes, Vocabulary, unigram_perplexity
from moe_dist.layer import LayerStats
from moe_dist.models.lstm_lm import LSTMLanguageModel, state_widths
from moe_dist.parallel.collectives import from_main, sum_over
from moe_dist.parallel.mesh import Layout, Mesh


@dataclass(frozen=True)
class Batch:
    """This rank's share of one micro-batch."""

    micro: int
    input_BS: torch.Tensor
    target_BS: torch.Tensor
    ctx: Context


class LanguageModel:
    """Next-word prediction on one long text. The state of each lane is carried from step to step."""

    def __init__(self, config: Config, layout: Layout, mesh: Mesh, vocabulary: Vocabulary | None = None) -> None:
        """Opens the text. `vocabulary`: of an earlier run; None builds it from the training split, on the main rank.

        Raises ValueError for text that cannot be found, read or split, or a vocabulary that does not fit it.
        """
        self.config, self.layout, self.mesh = config, layout, mesh
        data = config.data
        lines = open_text(data.text, data.streamed)
        self.vocabulary = vocabulary or from_main(lambda: Vocabulary.build(lines["train"], data.vocabulary_size))
        in_memory = ("valid", "test") if data.streamed else ("train", "valid", "test")
        self.lanes = {s: Lanes(self.vocabulary.encode(lines[s]), layout.samples, s == "train") for s in in_memory}
        mine = [lane for micro in range(layout.accumulation) for lane in layout.my_samples(micro, mesh.dp.index)]
        self.stream = Stream(lines["train"], self.vocabulary, layout.samples, mine) if data.streamed else None
        self.state: list[Any] = []  # of this rank's lanes after the last window, by micro-batch

    @staticmethod
    def plain_model(config: Config) -> nn.Module:
        """On the meta device: shapes alone, no memory. Raises ValueError for a model that cannot be."""
        try:
            with torch.device("meta"):
                return LSTMLanguageModel(config.model, config.data.vocabulary_size)
        except RuntimeError as error:  # sizes whose product is beyond 64 bits
            raise ValueError(f"a model of these sizes cannot be, make some smaller ({error})") from None

    def start(self, dtype: torch.dtype) -> None:
        """The state before a text's first words: zeros, of the model's `dtype`."""
        lanes = torch.zeros(1, self.layout.samples_per_rank, 1, dtype=dtype, device=self.mesh.device)
        widths = state_widths(self.config.model)
        zeros = tuple(tuple(lanes.repeat(1, 1, width) for width in pair) for pair in widths)
        self.state = [zeros] * self.layout.accumulation

    def batches(self, step: int, split: str = "train") -> Iterator[Batch]:
        """This rank's micro-batches of window `step` (from 0) of a split; of a stream, whatever comes next."""
        timesteps = self.config.batch.timesteps
        for micro in range(self.layout.accumulation):
            lane_B = np.array(self.layout.my_samples(micro, self.mesh.dp.index))
            if self.stream and split == "train":
                window = self.stream.window(timesteps, lane_B)
            else:
                window = self.lanes[split].window(step * timesteps, timesteps, lane_B)
            input_BS, target_BS, valid_BS = (t.to(self.mesh.device) for t in window)
            ctx = Context(
                sample_T=torch.from_numpy(lane_B.repeat(timesteps)).to(self.mesh.device),
                position_T=torch.arange(timesteps, device=self.mesh.device).repeat(len(lane_B)),
                valid_T=valid_BS.flatten(),
                seed=self.config.seed,
                step=step,
                train=split == "train",
                first_sample=self.layout.first_sample(micro),
                num_samples=self.layout.samples_per_micro_batch,
                samples_per_balance_group=self.layout.samples_per_balance_group,
                samples_per_token_group=self.layout.samples_per_token_group,
            )
            yield Batch(micro, input_BS, target_BS, ctx)

    def words(self, batches: list[Batch]) -> torch.Tensor:
        """Valid words of the whole step, over all ranks and micro-batches (float64 scalar)."""
        return sum_over(sum(b.ctx.valid_T.sum() for b in batches).double(), self.mesh.dp)  # type: ignore[union-attr]

    def loss(
        self, engine: Any, batch: Batch, words: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, LayerStats]]:
        """This micro-batch's part of the step's loss, its summed nll (nats), and its layers' statistics.

        The step's loss is nll per valid word, of which every rank and micro-batch has a part, plus the mean over the
        step's balance groups of the balance losses, which every rank has whole and differentiates for its own rows
        (`shared_sum`).
        """
        nll, state, stats = engine(batch.input_BS, batch.target_BS, self.state[batch.micro], batch.ctx)
        self.state[batch.micro] = tuple(tuple(t.detach() for t in lstm) for lstm in state)
        balance = sum(s.balance_loss for s in stats.values()) / self.layout.num_balance_groups
        return (nll / words + balance).to(nll.dtype), nll, stats

    def evaluation(self, split: str) -> Iterator[list[Batch]]:
        """Every window of a split, the same number on every rank: who has no words left sends padding."""
        for window in range(self.lanes[split].num_windows(self.config.batch.timesteps)):
            yield list(self.batches(window, split))

    def save_state(self) -> dict[str, torch.Tensor]:
        """Of all lanes: hidden state, (B, width) for h and c of each LSTM; places in a stream, (B, 2). A collective."""
        whole = {}
        for i, pair in enumerate(self.state[0]):
            for kind, like in zip("hc", pair, strict=True):
                rows_BD = like.new_zeros(self.layout.samples, like.shape[2])
                for micro, state in enumerate(self.state):
                    rows_BD[self._mine(micro)] = state[i]["hc".index(kind)][0]
                whole[f"lstm{i}.{kind}"] = sum_over(rows_BD, self.mesh.dp)
        if self.stream:
            whole["stream"] = sum_over(self.stream.places().to(self.mesh.device), self.mesh.dp)
        return whole

    def load_state(self, saved: dict[str, torch.Tensor]) -> None:
        """Inverse of `save_state`, on any layout."""
        for micro, state in enumerate(self.state):
            mine = self._mine(micro)
            self.state[micro] = tuple(
                tuple(saved[f"lstm{i}.{kind}"][None, mine].to(like) for kind, like in zip("hc", pair, strict=True))
                for i, pair in enumerate(state)
            )
        if self.stream:
            self.stream.load(saved["stream"])

    def _mine(self, micro: int) -> slice:
        mine = self.layout.my_samples(micro, self.mesh.dp.index)
        return slice(mine.start, mine.stop)

    def unigram_perplexity(self) -> float:
        """Of the test split: what knowing only word frequencies gives."""
        return unigram_perplexity(self.vocabulary.counts, self.lanes["test"].token_N)


TASKS: dict[str, type[LanguageModel]] = {"language_model": LanguageModel}
