"""A run's services: metrics, checkpoints, preemption, profiler, flight recorder."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from types import TracebackType
from typing import Any

from moe_dist.checkpoint.saver import Saver
from moe_dist.config.overrides import to_json
from moe_dist.distributed.collectives import barrier_without_timeout
from moe_dist.distributed.preemption import PreemptionHandler
from moe_dist.monitoring.metrics_logger import MetricsLogger
from moe_dist.training.metric_accumulator import MetricAccumulator
from moe_dist.training.profiler import profile_steps
from moe_dist.training.resume import Resume
from moe_dist.training.run_directory import RunDirectory
from moe_dist.training.run_spec import RunSpec
from moe_dist.training.setup import Training


class TrainingSession:
    """Context manager that keeps a run's services open.

    Attributes:
        spec: The run.
        resume: The checkpoint it continues from, if any.
        training: Model, task and engine.
        folder: The run folder's path.
        accumulator: Sums metrics between two metrics lines.
        saver: Writes checkpoints.
        preemption: Handles SIGTERM.
        metrics: Writes metrics lines.
        last_metrics: The newest training metrics, and the test metrics once there are any.
    """

    metrics: MetricsLogger
    _end_profiled_step: Callable[[], None]

    def __init__(
        self, spec: RunSpec, resume: Resume, training: Training, directory: RunDirectory
    ) -> None:
        """Creates the services; entering opens them."""
        self.spec = spec
        self.resume = resume
        self.training = training
        self.folder = directory.path
        mesh = training.mesh
        config = spec.config
        flops_per_unit = spec.layout_report["flops_per_unit"]
        self.accumulator = MetricAccumulator(mesh, training.task, flops_per_unit)
        self.saver = Saver(
            self.folder,
            training.engine,
            training.task,
            mesh,
            keep=config.keep_last_n,
            in_background=config.async_save,
            refused=resume.refused,
            config=to_json(config),
            restore=directory.restore,
        )
        self.preemption = PreemptionHandler(mesh)
        self.last_metrics: dict[str, Any] = {}
        self._directory = directory
        self._services = contextlib.ExitStack()

    def __enter__(self) -> "TrainingSession":
        """Opens the services."""
        with contextlib.ExitStack() as services:
            services.enter_context(self.saver)
            services.enter_context(self.preemption)
            profiler = profile_steps(self.folder, self.training.mesh, self.spec.profile)
            self._end_profiled_step = services.enter_context(profiler)
            self.metrics = services.enter_context(self._open_metrics())
            self._services = services.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the services, the last one first."""
        self._services.__exit__(kind, error, trace)

    def _open_metrics(self) -> MetricsLogger:
        """Returns the logger, which continues a resumed run's metrics file and wandb run."""
        config = self.spec.config
        # a grown run is a new one in wandb
        wandb_id = None if self.spec.upcycling else self.resume.state.get("wandb_id")
        return MetricsLogger(
            self.folder,
            asdict(config),
            enabled=self.training.mesh.is_main,
            wandb_mode=config.wandb.mode,
            total_steps=config.steps,
            start_step=self.resume.step,
            wandb_id=wandb_id,
            wandb_labels=asdict(config.wandb),
            restore=self._directory.restore,
        )

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Records collectives in the run folder, names the blocking rank. A collective."""
        timeout_s = self.spec.config.mesh.timeout_s
        recorder = self.training.mesh.flight_recorder
        with recorder.recording(self.folder, timeout_s, barrier_without_timeout):
            yield

    def end_step(self) -> None:
        """Ends a step for the profiler."""
        self._end_profiled_step()

    def save(self, step: int) -> None:
        """Writes a checkpoint after `step` steps. A collective."""
        state = {"wandb_id": self.metrics.wandb_id} | self.training.metadata
        self.saver.save(step, state)
