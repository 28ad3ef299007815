"""Image classification.

Legend: B images, S patches in each, T = B S tokens, N classes, Q color channels, Y and X pixels.
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
from moe_dist.monitoring.metric_format import format_metric
from moe_dist.nn.token_context import TokenContext
from moe_dist.tasks.data_fit import DataFit
from moe_dist.tasks.encoder_base import EncoderTask, balance_loss, build_on_meta, token_context
from moe_dist.tasks.task import LossResult, ModelEngine


@dataclass(frozen=True)
class ImageBatch:
    """This rank's share of one micro-batch.

    Attributes:
        image_BQYX: Images, in the model's dtype.
        target_BN: Target probabilities, smoothed and mixed in training.
        ctx: The patches' context.
    """

    image_BQYX: torch.Tensor
    target_BN: torch.Tensor
    ctx: TokenContext


class ImageClassification(EncoderTask):
    """A task from images to classes. A step's number determines its batch.

    Attributes:
        splits: The data for each split.
        num_patches: Patches in an image.
        dtype: The model's dtype.
        next_step: The step that `reading` continues with; -1 before the first one.
        reading: The training images, read ahead by worker processes from step to step.
    """

    model_config: type = VisionConfig
    data_config: type = ImageDataConfig
    throughput_unit: str = "images"
    primary_metric: str = "accuracy"

    required_metadata: tuple[str, ...] = ("classes",)
    fields_from_data: tuple[str, ...] = ("model.num_classes", "model.channels")
    reading: Iterator[AugmentedImages]

    def __init__(
        self,
        config: Config,
        layout: BatchLayout,
        mesh: Mesh,
        saved: dict[str, Any] | None,
        explicit: Collection[str] = (),
    ) -> None:
        """Opens the images; see `tasks.Task`."""
        assert isinstance(config.data, ImageDataConfig)
        self.layout = layout
        self.mesh = mesh
        splits = open_images(
            config.data, _with_any_classes(config), layout.global_batch_size, config.seed
        )
        images = splits["train"].images
        source = f"data.images={config.data.images!r}"
        fit = DataFit(config, explicit)
        fit.take_classes(images.classes, source)
        fit.take_channels(images.channels(), source)
        fit.note_repeats(len(images), self.throughput_unit)
        for split in splits.values():
            # a held-out "valid" has the same note as "train"
            note = split.images.note
            if note and note not in fit.notes:
                fit.notes.append(note)
        self.config = fit.config
        self.notes = fit.notes
        model = self.config.model
        assert isinstance(model, VisionConfig)
        self.splits = {name: replace(split, model=model) for name, split in splits.items()}
        self.num_patches = (model.image_size // model.patch_size) ** 2
        self.dtype = torch.float32
        self.next_step = -1

    @staticmethod
    def build_model(config: Config) -> nn.Module:
        """Returns the vision transformer on the meta device."""
        assert isinstance(config.model, VisionConfig)
        return build_on_meta(VisionTransformer, config.model)

    @staticmethod
    def check_data(config: Config, main: bool, explicit: Collection[str]) -> None:
        """Checks the data; see `tasks.Task`.

        Only the main rank reads the headers of image files; there may be a million files.

        Args:
            config: The run's config.
            main: True on the main rank.
            explicit: Dotted keys set by the user.
        """
        assert isinstance(config.data, ImageDataConfig)
        assert isinstance(config.model, VisionConfig)
        model = config.model if "model.num_classes" in explicit else _with_any_classes(config)
        check_images(config.data, model, files=main)

    @staticmethod
    def comparison_key(config: Config) -> dict[str, Any]:
        """Returns steps, data and batch size, without the images' location."""
        data = asdict(config.data)
        del data["image_root"]
        del data["workers"]
        return {"steps": config.steps, "data": data, "images": config.batch.global_batch_size}

    def data_source(self) -> DataSource:
        """Returns the arrays or files with the images."""
        data = self.config.data
        assert isinstance(data, ImageDataConfig)
        splits = {name: split.images for name, split in self.splits.items()}
        if splits["train"].item_I.ndim > 1:
            arrays = {name: (images.item_I, images.label_I) for name, images in splits.items()}
            return arrays_source(data.images, arrays)
        files = itertools.chain.from_iterable(images.item_I for images in splits.values())
        return files_source("folder", files, data.images)

    @property
    def uniform_loss(self) -> float:
        """Loss with equal probabilities for all classes, in nats."""
        assert isinstance(self.config.model, VisionConfig)
        return math.log(max(2, self.config.model.num_classes))

    def checkpoint_metadata(self) -> dict[str, Any]:
        """Returns the class names."""
        return {"classes": list(self.splits["train"].images.classes)}

    def reset_state(self, dtype: torch.dtype) -> None:
        """Stores the dtype for images; there is no other state."""
        self.dtype = dtype

    def batches(self, step: int, split: str = "train") -> Iterator[ImageBatch]:
        """Returns this rank's micro-batches; training continues one iterator over all steps."""
        if split != "train":
            reading = self.splits[split].batches(step, self._local_samples)
            return self._read_step(reading, step, train=False)
        if self.next_step != step:
            self.reading = self.splits[split].batches(step, self._local_samples)
        self.next_step = step + 1
        return self._read_step(self.reading, step, train=True)

    @property
    def _local_samples(self) -> list[range]:
        """This rank's samples in each micro-batch."""
        micros = range(self.layout.grad_accum_steps)
        return [self.layout.local_samples(micro, self.mesh.dp.index) for micro in micros]

    def _read_step(
        self, reading: Iterator[AugmentedImages], step: int, train: bool
    ) -> Iterator[ImageBatch]:
        """Yields one step's micro-batches. Raises OSError for a damaged file."""
        for micro, samples in enumerate(self._local_samples):
            try:
                images = next(reading)
            except ValueError as error:
                # a file was damaged after the check, or only its header is intact
                raise OSError(str(error)) from None
            ctx = token_context(
                self.layout,
                self.mesh,
                micro,
                sample_T=torch.arange(samples.start, samples.stop).repeat_interleave(
                    self.num_patches
                ),
                position_T=torch.arange(self.num_patches).repeat(len(samples)),
                valid_T=images.valid_B.repeat_interleave(self.num_patches),
                seed=self.config.seed,
                step=step,
                train=train,
            )
            image_BQYX = images.image_BQYX.to(self.mesh.device, self.dtype)
            yield ImageBatch(image_BQYX, images.target_BN.to(self.mesh.device), ctx)

    def loss_denominator(self, batches: list[ImageBatch]) -> torch.Tensor:
        """Counts the images in the step, float64. A collective."""
        num_images = torch.stack([self._valid_B(batch).sum() for batch in batches]).sum()
        return all_reduce_sum(num_images.double(), self.mesh.dp)

    def loss(self, engine: ModelEngine, batch: ImageBatch, total: torch.Tensor) -> LossResult:
        """Returns the cross-entropy per image."""
        logit_BN, stats = engine(batch.image_BQYX, batch.ctx)
        valid_B = self._valid_B(batch)
        wide_BN = logit_BN.to(torch.promote_types(logit_BN.dtype, torch.float32))
        nll_B = -(batch.target_BN * wide_BN.log_softmax(1)).sum(1)
        nll = torch.where(valid_B, nll_B, 0).sum()
        # for two mixed images, the one with the larger weight counts
        correct_B = logit_BN.argmax(1) == batch.target_BN.argmax(1)
        sums = {"nll": nll, "images": valid_B.sum(), "correct": (correct_B & valid_B).sum()}
        return (nll / total + balance_loss(self.layout, stats)).to(nll.dtype), sums, stats

    def _valid_B(self, batch: ImageBatch) -> torch.Tensor:
        """Returns False for images that are padding."""
        return batch.ctx.valid_T.view(-1, self.num_patches)[:, 0]

    def compute_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Returns loss and accuracy."""
        return {"loss": sums["nll"] / sums["images"], "accuracy": sums["correct"] / sums["images"]}

    def eval_batches(self, split: str) -> Iterator[list[ImageBatch]]:
        """Yields every image once; padding follows the last one."""
        reading = self.splits[split].batches(0, self._local_samples)
        for step in range(self.splits[split].num_steps):
            yield list(self._read_step(reading, step, train=False))

    def format_result(self, result: dict[str, float]) -> str:
        """Returns the test accuracy and loss in one line."""
        accuracy = format_metric("accuracy", result["test/accuracy"])
        return f"test accuracy {accuracy}    loss {result['test/loss']:.4f} nats per image"


def _with_any_classes(config: Config) -> VisionConfig:
    """Returns the section `model` with as many classes as any data can have."""
    assert isinstance(config.model, VisionConfig)
    return replace(config.model, num_classes=MAX_COUNT)
