"""Accumulates metrics over micro-batches, steps and ranks between two log lines.

A log line needs two all-reduces; a step needs none. MoE layer statistics, `moe/LAYER/STATISTIC`,
are measured in training only, over all micro-batches and ranks:

    importance_cv, load_cv,             value in each step (as in Table 6 of Shazeer et al. 2017),
    load_max_over_mean,                 averaged over the steps since the last line
    load_p10_over_mean, ..p50.., ..p90..
    importance_per_expert,              sum over these steps, by expert
    tokens_per_expert
    dead_experts                        experts without a token in these steps
    dropped                             assignments over capacity per step
    drop_rate                           fraction of assignments over capacity

Legend: E experts, S steps, P percentiles or ranks.
"""

import contextlib
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator

import torch

from moe_dist.distributed.collectives import all_reduce_sum
from moe_dist.distributed.labels import TrafficKey
from moe_dist.distributed.mesh import Mesh
from moe_dist.moe.layer import LayerStats
from moe_dist.monitoring.metric_keys import (
    BALANCE_LOSS,
    DEAD_EXPERTS,
    DROP_RATE,
    DROPPED,
    IMPORTANCE_CV,
    IMPORTANCE_PER_EXPERT,
    LOAD_CV,
    LOAD_MAX,
    LOAD_PERCENTILES,
    MAX_PEAK_BYTES,
    PARTS,
    PEAK_BYTES_BY_RANK,
    TFLOPS_PER_DEVICE,
    TOKENS_PER_EXPERT,
    bytes_key,
    layer_key,
    load_percentile,
    throughput_key,
    time_key,
)
from moe_dist.tasks.task import Task

TASK_SUMS = "sums/"  # prefix of the task's sums
MAX_PENDING = 2**23  # numbers kept before they are reduced (64 MiB in float64)
RATIOS = (
    IMPORTANCE_CV,
    LOAD_CV,
    LOAD_MAX,
    *(load_percentile(percent) for percent in LOAD_PERCENTILES),
)
_BALANCE = "balance"

Metrics = dict[str, float | list[float]]


class MetricAccumulator:
    """Accumulates micro-batch metrics; `reduce_and_reset` reduces and averages them."""

    def __init__(self, mesh: Mesh, task: Task, flops_per_unit: int = 0) -> None:
        """Creates an empty accumulator.

        Args:
            mesh: The ranks.
            task: A `tasks.task.Task`; it computes its metrics from its sums.
            flops_per_unit: Training FLOPs (forward and backward) per word or sample
                (`training.model_stats.count_params_and_flops`).
        """
        self.mesh = mesh
        self.task = task
        self.flops_per_unit = flops_per_unit
        self._reset()

    def _reset(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}  # float64, this rank's
        # (2, E) importance and load by layer: `usage` for this rank's current step, `pending` for
        # its finished steps until they are reduced, `total_usage` for all reduced steps and ranks
        self.usage: dict[str, torch.Tensor] = {}
        self.pending: list[dict[str, torch.Tensor]] = []
        self.total_usage: dict[str, torch.Tensor] = {}
        self.ratios: dict[str, torch.Tensor] = {}  # RATIOS by layer, summed over steps
        self.steps = 0
        self.seconds = 0.0
        self.sent = Counter[TrafficKey]()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Measures one training step: its time, its parts and its traffic."""
        start = time.perf_counter()
        sent_before = self.mesh.bytes_sent
        with self.mesh.step_timer.step():
            yield
        self.steps += 1
        self.seconds += time.perf_counter() - start
        for key, num_bytes in self.mesh.bytes_sent.items():
            self.sent[key] += num_bytes - sent_before[key]
        self.pending.append(self.usage)
        self.usage = {}
        numel_per_step = sum(usage_2E.numel() for usage_2E in self.pending[0].values())
        if len(self.pending) * numel_per_step > MAX_PENDING:
            self._reduce_pending()

    def _reduce_pending(self) -> None:
        """Reduces the pending steps over all ranks and adds them to the totals. A collective."""
        if not self.pending or not self.pending[0]:
            return
        stacks: dict[str, torch.Tensor] = {}  # (S, 2, E) by layer
        for name in self.pending[0]:
            stacks[name] = torch.stack([usage[name] for usage in self.pending])
        for name, usage_S2E in self._all_reduce(stacks).items():
            self.total_usage[name] = usage_S2E.sum(0) + self.total_usage.get(name, 0)
            ratios = _ratios(*usage_S2E.unbind(1)).sum(0)
            self.ratios[name] = ratios + self.ratios.get(name, 0)
        self.pending.clear()

    def _all_reduce(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Sums float64 tensors over all ranks with one all-reduce; returns the sums by name."""
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors.values()])
        parts = all_reduce_sum(flat, self.mesh.dp).split([t.numel() for t in tensors.values()])
        reduced = {}
        for (name, tensor), part in zip(tensors.items(), parts, strict=True):
            reduced[name] = part.view_as(tensor)
        return reduced

    def _add(self, key: str, value: torch.Tensor) -> None:
        value = value.detach().double()
        self.sums[key] = self.sums[key] + value if key in self.sums else value

    def add(self, sums: dict[str, torch.Tensor], stats: dict[str, LayerStats]) -> None:
        """Adds one of this rank's micro-batches.

        Args:
            sums: The task's sums by name, scalars.
            stats: MoE layer statistics by layer name.
        """
        for name, value in sums.items():
            self._add(f"{TASK_SUMS}{name}", value)
        for name, layer in stats.items():
            # the balance loss is the same on every rank
            self._add(_BALANCE, layer.balance_loss / self.mesh.dp.size)
            self._add(f"{name}/dropped", layer.dropped)
            usage_2E = torch.stack([layer.importance_E.double(), layer.load_E.double()])
            self.usage[name] = usage_2E + self.usage.get(name, 0)

    def reduce_and_reset(self, prefix: str = "train") -> Metrics:
        """Reduces the metrics over all ranks and resets the accumulator. A collective.

        Args:
            prefix: Prefix for the task's metric keys.

        Returns:
            The task's metrics. If steps were measured, also throughput, milliseconds per step part
            (mean over ranks), bytes sent per step (sum over ranks), peak memory by rank, the
            balance loss, and each MoE layer's statistics.
        """
        sent: dict[str, float] = {}
        for label, num_bytes in self.sent.items():
            sent[bytes_key(*label)] = float(num_bytes)
        sent = dict(sorted(sent.items()))  # the same order on every rank
        self._reduce_pending()
        sums = self.sums | {key: self._scalar(num_bytes) for key, num_bytes in sent.items()}
        if self.steps:
            for part, seconds in self.mesh.step_timer.read_and_reset().items():
                sums[time_key(part)] = self._scalar(1e3 * seconds)
            # each rank fills its own entry, so the sum is a gather
            peak_P = torch.zeros(self.mesh.dp.size, dtype=torch.float64, device=self.mesh.device)
            peak_P[self.mesh.dp.index] = peak_memory(self.mesh.device)
            sums[PEAK_BYTES_BY_RANK] = peak_P
        totals = self._all_reduce(sums)
        task_sums = {}
        for key, total in totals.items():
            if key.startswith(TASK_SUMS):
                task_sums[key.removeprefix(TASK_SUMS)] = total.item()
        values: Metrics = {}
        for name, value in self.task.compute_metrics(task_sums).items():
            values[f"{prefix}/{name}"] = value
        if self.steps:
            values |= self._throughput(task_sums)
            values |= {key: totals[key].item() / self.steps for key in sent}
            values |= self._step_metrics(totals)
        self._reset()
        return values

    def _scalar(self, value: float) -> torch.Tensor:
        return torch.tensor(value, dtype=torch.float64, device=self.mesh.device)

    def _throughput(self, task_sums: dict[str, float]) -> Metrics:
        """Returns all ranks' units per second, and TFLOPS per device."""
        unit = self.task.throughput_unit
        num_units = task_sums[unit]
        # if units differ in size, "work" counts units of the size that flops_per_unit is for
        work_per_second = task_sums.get("work", num_units) / self.seconds
        flops_per_device = self.flops_per_unit * work_per_second / self.mesh.dp.size
        return {
            throughput_key(unit): num_units / self.seconds,
            TFLOPS_PER_DEVICE: flops_per_device / 1e12,
        }

    def _step_metrics(self, totals: dict[str, torch.Tensor]) -> Metrics:
        """Returns the times, memory, balance loss and layer statistics from their totals."""
        values: Metrics = {}
        for part in PARTS:
            total = totals[time_key(part)].item()
            values[time_key(part)] = total / self.steps / self.mesh.dp.size
        values[PEAK_BYTES_BY_RANK] = totals[PEAK_BYTES_BY_RANK].tolist()
        values[MAX_PEAK_BYTES] = totals[PEAK_BYTES_BY_RANK].max().item()
        if _BALANCE in totals:
            num_groups = self.steps * self.task.layout.num_balance_groups
            values[BALANCE_LOSS] = totals[_BALANCE].item() / num_groups
        for name in self.total_usage:
            values |= self._layer_statistics(name, totals[f"{name}/dropped"].item())
        return values

    def _layer_statistics(self, name: str, dropped: float) -> Metrics:
        """Returns one layer's statistics; `dropped` is a sum over steps and ranks."""
        importance_E, load_E = self.total_usage[name].tolist()
        values: Metrics = {}
        for statistic, total in zip(RATIOS, self.ratios[name].tolist(), strict=True):
            values[layer_key(name, statistic)] = total / self.steps
        return values | {
            layer_key(name, DEAD_EXPERTS): load_E.count(0),
            layer_key(name, IMPORTANCE_PER_EXPERT): importance_E,
            layer_key(name, TOKENS_PER_EXPERT): load_E,
            layer_key(name, DROPPED): dropped / self.steps,
            layer_key(name, DROP_RATE): dropped / max(1, dropped + sum(load_E)),
        }


def peak_memory(device: torch.device) -> int:
    """Returns the peak memory so far in bytes.

    Args:
        device: CUDA counts tensors on the device (torch's allocator); CPU counts the whole process.

    Returns:
        Bytes.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _ratios(importance_SE: torch.Tensor, load_SE: torch.Tensor) -> torch.Tensor:
    """Returns each step's RATIOS, zeros for a step without tokens: (S, 3 + P)."""
    importance_SE = _over_mean(importance_SE)
    load_SE = _over_mean(load_SE)
    percentiles_PS = load_SE.quantile(load_SE.new_tensor(LOAD_PERCENTILES) / 100, dim=1)
    importance_cv_S = importance_SE.std(1, correction=0)
    load_cv_S = load_SE.std(1, correction=0)
    return torch.stack([importance_cv_S, load_cv_S, load_SE.amax(1), *percentiles_PS], 1)


def _over_mean(x_SE: torch.Tensor) -> torch.Tensor:
    mean_S1 = x_SE.mean(1, keepdim=True)
    return x_SE / torch.where(mean_S1 > 0, mean_S1, 1)
