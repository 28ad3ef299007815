"""Images to classes.

Legend: B images, S patches of each, T = B S tokens, N classes, Q colours, Y and X pixels.
"""

import itertools
import math
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from moe_dist.config.schema import Config, ImageDataConfig, VisionConfig
from moe_dist.config.validate import MAX_COUNT
from moe_dist.data.data_source import DataSource, arrays_source, files_source
from moe_dist.data.images.pipeline import AugmentedImages, check_images, open_images
from moe_dist.distributed.batch_layout import BatchLayout
from moe_dist.distributed.collectives import all_reduce_sum
from moe_dist.distributed.mesh import Mesh
from moe_dist.models.vision_transformer import VisionTransformer
from moe_dist.moe.layer import LayerStats
from moe_dist.monitoring.metric_format import format_metric
from moe_dist.nn.token_context import TokenContext
from moe_dist.tasks.data_fit import DataFit
from moe_dist.tasks.encoder_base import EncoderTask, balance_loss, build_on_meta, token_context


@dataclass(frozen=True)
class ImageTaskBatch:
    """This rank's share of one micro-batch."""

    image_BQYX: torch.Tensor
    target_BN: torch.Tensor  # probabilities, smoothed and mixed in training
    ctx: TokenContext


class ImageClassification(EncoderTask):
    """What a batch holds follows from the step alone."""

    model_config: type = VisionConfig
    data_config: type = ImageDataConfig
    throughput_unit: str = "images"
    primary_metric: str = "accuracy"

    required_metadata: tuple[str, ...] = ("classes",)
    fields_from_data: tuple[str, ...] = ("model.num_classes", "model.channels")

    def __init__(
        self,
        config: Config,
        layout: BatchLayout,
        mesh: Mesh,
        saved: dict[str, Any] | None,
        explicit: Collection[str] = (),
    ) -> None:
        """See `tasks.Task`."""
        assert isinstance(config.data, ImageDataConfig)
        self.layout, self.mesh = layout, mesh
        splits = open_images(
            config.data, _of_any_classes(config), layout.global_batch_size, config.seed
        )
        images, source = splits["train"].images, f"data.images={config.data.images!r}"
        fit = DataFit(config, explicit)
        fit.take_classes(images.classes, source)
        fit.take_channels(images.channels(), source)
        fit.note_repeats(len(images), self.throughput_unit)
        # the notes of a "valid" that is held out are those of "train"
        fit.notes += filter(None, dict.fromkeys(split.images.note for split in splits.values()))
        self.config, self.notes = fit.config, fit.notes
        model = self.config.model
        assert isinstance(model, VisionConfig)
        self.splits = {name: replace(split, model=model) for name, split in splits.items()}
        self.num_patches = (model.image_size // model.patch_size) ** 2
        self.dtype, self.next_step = torch.float32, -1
        self.reading: Iterator[AugmentedImages]

    @staticmethod
    def build_model(config: Config) -> nn.Module:
        assert isinstance(config.model, VisionConfig)
        return build_on_meta(VisionTransformer, config.model)

    @staticmethod
    def check_data(config: Config, main: bool, explicit: Collection[str]) -> None:
        """Looks at the data as `tasks.Task` says. The main rank alone reads the heads of files, of which there may be a
        million."""
        assert isinstance(config.data, ImageDataConfig) and isinstance(config.model, VisionConfig)
        model = config.model if "model.num_classes" in explicit else _of_any_classes(config)
        check_images(config.data, model, files=main)

    @staticmethod
    def comparison_key(config: Config) -> dict[str, Any]:
        data = {
            key: value
            for key, value in asdict(config.data).items()
            if key not in ("image_root", "workers")
        }
        return {"steps": config.steps, "data": data, "images": config.batch.global_batch_size}

    def data_source(self) -> DataSource:
        splits = {name: split.images for name, split in self.splits.items()}
        given = self.config.data.images  # type: ignore[union-attr]
        if splits["train"].item_I.ndim > 1:
            return arrays_source(
                given, {name: (images.item_I, images.label_I) for name, images in splits.items()}
            )
        files = itertools.chain.from_iterable(images.item_I for images in splits.values())
        return files_source("folder", files, given)

    @property
    def uniform_loss(self) -> float:
        assert isinstance(self.config.model, VisionConfig)
        return math.log(max(2, self.config.model.num_classes))

    def checkpoint_metadata(self) -> dict[str, Any]:
        return {"classes": list(self.splits["train"].images.classes)}

    def reset_state(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def batches(self, step: int, split: str = "train") -> Iterator[ImageTaskBatch]:
        reading = self.splits[split].batches(step, self._parts)
        if (
            split == "train"
        ):  # goes on from step to step, for there may be processes that read ahead
            if self.next_step != step:
                self.reading = reading
            self.next_step, reading = step + 1, self.reading
        return self._step(reading, step, split == "train")

    @property
    def _parts(self) -> list[range]:
        """This rank's samples of each micro-batch."""
        return [
            self.layout.local_samples(micro, self.mesh.dp.index)
            for micro in range(self.layout.grad_accum_steps)
        ]

    def _step(
        self, reading: Iterator[AugmentedImages], step: int, train: bool
    ) -> Iterator[ImageTaskBatch]:
        for micro, mine in enumerate(self._parts):
            try:
                read = next(reading)
            except (
                ValueError
            ) as error:  # a file that broke, or whose head alone is whole: no mistake of ours
                raise OSError(str(error)) from None
            sample_T = torch.arange(mine.start, mine.stop).repeat_interleave(self.num_patches)
            position_T = torch.arange(self.num_patches).repeat(len(mine))
            valid_T = read.valid_B.repeat_interleave(self.num_patches)
            key = (self.config.seed, step, train)
            ctx = token_context(self.layout, self.mesh, micro, sample_T, position_T, valid_T, *key)
            image_BQYX = read.image_BQYX.to(self.mesh.device, self.dtype)
            yield ImageTaskBatch(image_BQYX, read.target_BN.to(self.mesh.device), ctx)

    def loss_denominator(self, batches: list[ImageTaskBatch]) -> torch.Tensor:
        """Images of the whole step."""
        return all_reduce_sum(sum(self._valid_B(b).sum() for b in batches).double(), self.mesh.dp)  # type: ignore[union-attr]

    def loss(
        self, engine: Any, batch: ImageTaskBatch, total: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, LayerStats]]:
        """The step's loss is cross-entropy per image."""
        logit_BN, stats = engine(batch.image_BQYX, batch.ctx)
        valid_B = self._valid_B(batch)
        nll_B = -(
            batch.target_BN
            * logit_BN.to(torch.promote_types(logit_BN.dtype, torch.float32)).log_softmax(1)
        ).sum(1)
        nll = torch.where(valid_B, nll_B, 0).sum()
        correct = (
            (logit_BN.argmax(1) == batch.target_BN.argmax(1)) & valid_B
        ).sum()  # of two that are mixed the main one
        sums = {"nll": nll, "images": valid_B.sum(), "correct": correct}
        return (nll / total + balance_loss(self.layout, stats)).to(nll.dtype), sums, stats

    def _valid_B(self, batch: ImageTaskBatch) -> torch.Tensor:
        return batch.ctx.valid_T.view(-1, self.num_patches)[:, 0]

    def compute_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        return {"loss": sums["nll"] / sums["images"], "accuracy": sums["correct"] / sums["images"]}

    def eval_batches(self, split: str) -> Iterator[list[ImageTaskBatch]]:
        """What is behind the last image is padding."""
        reading = self.splits[split].batches(0, self._parts)
        for step in range(self.splits[split].num_steps):
            yield list(self._step(reading, step, train=False))

    def format_result(self, result: dict[str, float]) -> str:
        accuracy = format_metric("accuracy", result["test/accuracy"])
        return f"test accuracy {accuracy}    loss {result['test/loss']:.4f} nats per image"


def _of_any_classes(config: Config) -> VisionConfig:
    """Returns the section of the model, which the classes of any data fit."""
    assert isinstance(config.model, VisionConfig)
    return replace(config.model, num_classes=MAX_COUNT)
