"""Text encoders: pre-training, classification and answers to questions.

Legend: B texts (or pairs of them, or windows), S tokens of each, T = B S tokens, V vocabulary, N tokens to be told, C
classes, W windows of a split.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moe_dist.config.schema import Config, TextConfig
from moe_dist.data.text.wordpiece import IGNORE_INDEX, WordPieceTokenizer
from moe_dist.distributed.batch_layout import BatchLayout
from moe_dist.distributed.collectives import all_reduce_sum, run_on_main
from moe_dist.distributed.mesh import Mesh
from moe_dist.nn.token_context import TokenContext
from moe_dist.tasks.data_fit import DataFit
from moe_dist.tasks.encoder_base import EncoderTask, build_on_meta, token_context

SPLITS = ("train", "valid", "test")
VOCABULARY_SIZE = "model.vocabulary_size"


@dataclass(frozen=True)
class TextBatch:
    """This rank's share of one micro-batch. `targets` are the task's own, -100 where nothing is to be learned."""

    token_BS: torch.Tensor
    kind_BS: torch.Tensor
    targets: tuple[torch.Tensor, ...]
    first: int  # of the split's samples, which one is the first of the step
    ctx: TokenContext


class TextTask(EncoderTask):
    """What the tasks below have in common."""

    model_config: type = TextConfig
    throughput_unit: str = "texts"
    required_metadata: tuple[str, ...] = ("tokens",)
    fields_from_data: tuple[str, ...] = (VOCABULARY_SIZE,)
    model_class: type[nn.Module]
    tokens: WordPieceTokenizer
    splits: dict[str, Any]  # each with `batch` and `num_batches`

    def __init__(
        self,
        config: Config,
        layout: BatchLayout,
        mesh: Mesh,
        saved: dict[str, Any] | None,
        explicit: Collection[str] = (),
    ) -> None:
        """Opens the data. Tokens are the saved ones, or built from the training split on the main rank;
        `model.vocabulary_size` is their largest number. See `tasks.Task`."""
        self.layout, self.mesh, self.saved = layout, mesh, saved
        self.fit = DataFit(config, explicit)
        self.open()
        self.fit.note_repeats(len(self.splits["train"].order.length_N), self.throughput_unit)

    @property
    def config(self) -> Config:
        return self.fit.config

    @property
    def notes(self) -> list[str]:
        return self.fit.notes

    @property
    def model(self) -> TextConfig:
        assert isinstance(self.config.model, TextConfig)
        return self.config.model

    def open(self) -> None:
        """Sets `tokens` and `splits`, and fits the config."""
        raise NotImplementedError

    def tokens_for(self, lines: Iterable[str], source: str) -> WordPieceTokenizer:
        """Returns the tokens of the run that goes on, or else builds them, and fits `model.vocabulary_size`.

        Args:
            lines: The texts of the training split.
            source: The field that names the data, with its value.

        Raises:
            ValueError: The run has no tokens, or the user has set another number of them.
        """
        if self.saved is None:
            exact = VOCABULARY_SIZE in self.fit.explicit_keys
            tokens = run_on_main(
                lambda: WordPieceTokenizer.build(lines, self.model.vocabulary_size, exact)
            )
            why = f"the text of {source} has pieces for {len(tokens)} tokens"
        elif "tokens" not in self.saved:
            raise ValueError(
                "the run to go on from, or to begin with (init), has no tokens: it is no text encoder"
            )
        else:
            tokens = WordPieceTokenizer.from_json(self.saved["tokens"])
            why = f"the run to go on from, or to begin with (init), has {len(tokens)} tokens"
        self.fit.take(VOCABULARY_SIZE, len(tokens), why)
        return tokens

    def seed(self, split: str) -> int | None:
        """None in evaluation."""
        return self.config.seed if split == "train" else None

    @classmethod
    def build_model(cls, config: Config) -> nn.Module:
        assert isinstance(config.model, TextConfig)
        return build_on_meta(cls.model_class, config.model)

    @staticmethod
    def comparison_key(config: Config) -> dict[str, Any]:
        model = config.model
        assert isinstance(model, TextConfig)
        told = {
            "steps": config.steps,
            "data": asdict(config.data),
            "texts": config.batch.global_batch_size,
        }
        if config.task == "pretraining":  # a word is another thing with other tokens
            told |= {"vocabulary_size": model.vocabulary_size, "max_tokens": model.max_tokens}
        return told

    def checkpoint_metadata(self) -> dict[str, Any]:
        return {"tokens": self.tokens.to_json()}

    def reset_state(self, dtype: torch.dtype) -> None:
        """There is no state."""

    def batches(self, step: int, split: str = "train") -> Iterator[TextBatch]:
        """Samples are padded to the longest of the step, of all ranks and micro-batches."""
        device = self.mesh.device
        for micro in range(self.layout.grad_accum_steps):
            mine = self.layout.local_samples(micro, self.mesh.dp.index)
            token_BS, kind_BS, valid_BS, *targets = self.splits[split].batch(step, mine)
            width = token_BS.shape[1]
            sample_T = torch.arange(mine.start, mine.stop).repeat_interleave(width)
            position_T = torch.arange(width).repeat(len(mine))
            key = (self.config.seed, step, split == "train")
            ctx = token_context(
                self.layout, self.mesh, micro, sample_T, position_T, valid_BS.flatten(), *key
            )
            first = step * self.layout.global_batch_size + mine.start
            yield TextBatch(
                token_BS.to(device),
                kind_BS.to(device),
                tuple(t.to(device) for t in targets),
                first,
                ctx,
            )

    def eval_batches(self, split: str) -> Iterator[list[TextBatch]]:
        for step in range(self.splits[split].num_batches):
            yield list(self.batches(step, split))

    def work(self, batch: TextBatch) -> torch.Tensor:
        """Texts of `max_tokens` that the batch's valid tokens come to, which is what multiply-adds are counted for."""
        return batch.ctx.valid_T.sum().double() / self.model.max_tokens

    def loss_denominator(self, batches: list[TextBatch]) -> torch.Tensor:
        """How much there is to be learned of each of the targets."""
        counts = [
            torch.stack([(_shown(t, b) != IGNORE_INDEX).sum() for t in b.targets]) for b in batches
        ]
        return all_reduce_sum(torch.stack(counts).sum(0).double(), self.mesh.dp).clamp(min=1)


def _shown(target: torch.Tensor, batch: TextBatch) -> torch.Tensor:
    """Targets of a token or of a text; nothing is learned from what the context calls padding."""
    valid_BS = batch.ctx.valid_T.view(batch.token_BS.shape)
    return torch.where(valid_BS if target.dim() == 2 else valid_BS[:, 0], target, IGNORE_INDEX)


def _nll(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Summed over what is to be learned, nats, in float32 at least."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, target, ignore_index=IGNORE_INDEX, reduction="sum")


def _correct(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (logits.argmax(-1) == target).sum()
