"""The base class for text encoder tasks: pre-training, classification and question answering.

Legend: B texts (or pairs, or windows), S tokens in each, T = B S tokens.
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
    """This rank's share of one micro-batch.

    Attributes:
        token_BS: Tokens, int64.
        kind_BS: Each token's kind: 0 for a first text, 1 for a second one.
        targets: The task's targets, (B, S) or (B,); -100 for positions without a target.
        first: The first sample's number in the split.
        ctx: The tokens' context.
    """

    token_BS: torch.Tensor
    kind_BS: torch.Tensor
    targets: tuple[torch.Tensor, ...]
    first: int
    ctx: TokenContext


class TextTask(EncoderTask):
    """A base class for text encoder tasks.

    Attributes:
        model_class: The encoder with the task's heads.
        tokens: The tokenizer.
        splits: The data for each split; each has `batch` and `num_batches`.
        saved: `checkpoint_metadata` from the run that this run continues or starts from, or None.
        fit: The config, fitted to the data.
    """

    model_config: type = TextConfig
    throughput_unit: str = "texts"
    required_metadata: tuple[str, ...] = ("tokens",)
    fields_from_data: tuple[str, ...] = (VOCABULARY_SIZE,)
    model_class: type[nn.Module]
    tokens: WordPieceTokenizer
    splits: dict[str, Any]

    def __init__(
        self,
        config: Config,
        layout: BatchLayout,
        mesh: Mesh,
        saved: dict[str, Any] | None,
        explicit: Collection[str] = (),
    ) -> None:
        """Opens the data and the tokenizer; see `tasks.Task`."""
        self.layout = layout
        self.mesh = mesh
        self.saved = saved
        self.fit = DataFit(config, explicit)
        self.open_data()
        self.fit.note_repeats(len(self.splits["train"].order.length_N), self.throughput_unit)

    @property
    def config(self) -> Config:
        """The run's config, fitted to the data."""
        return self.fit.config

    @property
    def notes(self) -> list[str]:
        """Notes about the data for the user, one line each."""
        return self.fit.notes

    @property
    def model(self) -> TextConfig:
        """The config's section `model`."""
        assert isinstance(self.config.model, TextConfig)
        return self.config.model

    def open_data(self) -> None:
        """Sets `tokens` and `splits`, and fits the config to the data."""
        raise NotImplementedError

    def load_tokens(self, lines: Iterable[str], source: str) -> WordPieceTokenizer:
        """Loads the saved tokenizer, or builds one on the main rank. A collective.

        Also sets `model.vocabulary_size`, which is the maximum for a new tokenizer.

        Args:
            lines: The training split's texts.
            source: The field that names the data, with its value.

        Returns:
            The tokenizer.

        Raises:
            ValueError: The earlier run has no tokenizer, or the user has set another size.
        """
        if self.saved is None:
            exact = VOCABULARY_SIZE in self.fit.explicit_keys
            size = self.model.vocabulary_size
            tokens = run_on_main(lambda: WordPieceTokenizer.build(lines, size, exact))
            reason = f"the text of {source} has pieces for {len(tokens)} tokens"
        elif "tokens" not in self.saved:
            raise ValueError(
                "the run to continue (--resume) or to start from (init_from) has no tokens; "
                "use a run of a text encoder"
            )
        else:
            tokens = WordPieceTokenizer.from_json(self.saved["tokens"])
            reason = (
                f"the run to continue (--resume) or to start from (init_from) has {len(tokens)} "
                "tokens"
            )
        self.fit.take(VOCABULARY_SIZE, len(tokens), reason)
        return tokens

    def shuffle_seed(self, split: str) -> int | None:
        """Returns the seed that shuffles a split; None for a split in its own order."""
        return self.config.seed if split == "train" else None

    @classmethod
    def build_model(cls, config: Config) -> nn.Module:
        """Returns the encoder with its heads on the meta device."""
        assert isinstance(config.model, TextConfig)
        return build_on_meta(cls.model_class, config.model)

    @staticmethod
    def comparison_key(config: Config) -> dict[str, Any]:
        """Returns steps, data and batch size, with the tokenizer size in pre-training."""
        model = config.model
        assert isinstance(model, TextConfig)
        key = {
            "steps": config.steps,
            "data": asdict(config.data),
            "texts": config.batch.global_batch_size,
        }
        if config.task == "pretraining":
            # losses per word are comparable only for the same tokens
            key["vocabulary_size"] = model.vocabulary_size
            key["max_tokens"] = model.max_tokens
        return key

    def checkpoint_metadata(self) -> dict[str, Any]:
        """Returns the tokenizer."""
        return {"tokens": self.tokens.to_json()}

    def reset_state(self, dtype: torch.dtype) -> None:
        """Does nothing: there is no state."""

    def batches(self, step: int, split: str = "train") -> Iterator[TextBatch]:
        """Iterates over this rank's micro-batches in a step.

        Samples are padded to the step's longest one on all ranks and in all micro-batches.

        Args:
            step: The step's number, from 0.
            split: The split's name.

        Yields:
            The micro-batches.
        """
        device = self.mesh.device
        for micro in range(self.layout.grad_accum_steps):
            samples = self.layout.local_samples(micro, self.mesh.dp.index)
            token_BS, kind_BS, valid_BS, *targets = self.splits[split].batch(step, samples)
            width = token_BS.shape[1]
            ctx = token_context(
                self.layout,
                self.mesh,
                micro,
                sample_T=torch.arange(samples.start, samples.stop).repeat_interleave(width),
                position_T=torch.arange(width).repeat(len(samples)),
                valid_T=valid_BS.flatten(),
                seed=self.config.seed,
                step=step,
                train=split == "train",
            )
            yield TextBatch(
                token_BS.to(device),
                kind_BS.to(device),
                tuple(target.to(device) for target in targets),
                step * self.layout.global_batch_size + samples.start,
                ctx,
            )

    def eval_batches(self, split: str) -> Iterator[list[TextBatch]]:
        """Yields every sample once."""
        for step in range(self.splits[split].num_batches):
            yield list(self.batches(step, split))

    def work(self, batch: TextBatch) -> torch.Tensor:
        """Counts valid tokens in units of `max_tokens`, for FLOP counts."""
        return batch.ctx.valid_T.sum().double() / self.model.max_tokens

    def loss_denominator(self, batches: list[TextBatch]) -> torch.Tensor:
        """Counts the targets in the step for each kind, at least 1. A collective."""
        counts: list[torch.Tensor] = []
        for batch in batches:
            valid = [valid_targets(target, batch) != IGNORE_INDEX for target in batch.targets]
            counts.append(torch.stack([mask.sum() for mask in valid]))
        return all_reduce_sum(torch.stack(counts).sum(0).double(), self.mesh.dp).clamp(min=1)


def valid_targets(target: torch.Tensor, batch: TextBatch) -> torch.Tensor:
    """Replaces targets at padding.

    Args:
        target: Targets for tokens (B, S) or for texts (B,).
        batch: The batch that they belong to.

    Returns:
        The targets, with `IGNORE_INDEX` at padding.
    """
    valid_BS = batch.ctx.valid_T.view(batch.token_BS.shape)
    return torch.where(valid_BS if target.dim() == 2 else valid_BS[:, 0], target, IGNORE_INDEX)


def sum_nll(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Returns the negative log likelihood, summed over targets: nats, float32 or wider."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, target, ignore_index=IGNORE_INDEX, reduction="sum")


def count_correct(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Counts the targets that have the largest logit, int64 scalar."""
    return (logits.argmax(-1) == target).sum()
