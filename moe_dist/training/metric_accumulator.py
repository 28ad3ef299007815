"""Sums between two log lines, over micro-batches and ranks: two all-reduces per line, none per step.

The keys of a MoE layer, `moe/LAYER/KEY`, are measured in training only; a "step" is all micro-batches on all ranks:

    importance_cv, load_cv, load_max_over_mean, load_p10_, load_p50_, load_p90_over_mean
                        the value of each step (as in Table 6 of Shazeer et al. 2017), averaged over the line's steps
    importance_per_expert, tokens_per_expert
                        the sum over the steps of the line, by expert
    dead_experts        experts without a row in all steps of the line
    dropped             assignments over capacity in a step, averaged over the steps of the line
    drop_rate           the part of all assignments of the line that is over capacity
"""

import contextlib
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

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
    PEAK_BYTES_BY_RANK,
    TFLOPS_PER_DEVICE,
    TOKENS_PER_EXPERT,
    bytes_key,
    layer_key,
    load_percentile,
    throughput_key,
    time_key,
)

SUMS = "sums/"  # before the names of a task's
MOST_PENDING = 2**23  # numbers of steps that are not summed over ranks yet (64 MiB)
RATIOS = (
    IMPORTANCE_CV,
    LOAD_CV,
    LOAD_MAX,
    *(load_percentile(percent) for percent in LOAD_PERCENTILES),
)


class MetricAccumulator:
    """Adds up what micro-batches tell; `read` gives the means over all ranks since the last reading."""

    def __init__(self, mesh: Mesh, task: Any, flops_per_unit: int = 0) -> None:
        """`task`: a `tasks.Task`; `flops_per_unit`: of it, forward and backward, as `summary.counts` has it."""
        self.mesh, self.task, self.flops_per_unit = mesh, task, flops_per_unit
        self._clear()

    def _clear(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.used: dict[
            str, torch.Tensor
        ] = {}  # importance and load (2, E) of the step so far, by layer
        self.pending: list[
            dict[str, torch.Tensor]
        ] = []  # `used` of steps that are not summed over ranks yet
        self.layers: dict[
            str, torch.Tensor
        ] = {}  # importance and load (2, E), summed over ranks and steps
        self.ratios: dict[str, torch.Tensor] = {}  # RATIOS of each layer, summed over steps
        self.steps = 0
        self.seconds, self.sent = 0.0, Counter[TrafficKey]()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around one training step: counts it, its seconds and those of its parts, and the bytes that it sends."""
        start, sent = time.perf_counter(), self.mesh.bytes_sent
        with self.mesh.step_timer.step():
            yield
        self.steps += 1
        self.seconds += time.perf_counter() - start
        for key, total in self.mesh.bytes_sent.items():
            self.sent[key] += total - sent[key]
        self.pending.append(self.used)
        self.used = {}
        if (
            len(self.pending) * sum(used.numel() for used in self.pending[0].values())
            > MOST_PENDING
        ):
            self._sum_pending()

    def _sum_pending(self) -> None:
        """Sums the pending steps over all ranks, then adds them up and their ratios. A collective."""
        if not self.pending or not self.pending[0]:
            return
        stacks = {
            name: torch.stack([used[name] for used in self.pending]) for name in self.pending[0]
        }
        flat = all_reduce_sum(
            torch.cat([stack.flatten() for stack in stacks.values()]), self.mesh.dp
        )
        summed = flat.split([stack.numel() for stack in stacks.values()])
        for (name, stack), part in zip(stacks.items(), summed, strict=True):
            used_S2E = part.view_as(stack)
            self.layers[name] = used_S2E.sum(0) + self.layers.get(name, 0)
            self.ratios[name] = _ratios(*used_S2E.unbind(1)).sum(0) + self.ratios.get(name, 0)
        self.pending.clear()

    def _add(self, key: str, value: torch.Tensor) -> None:
        value = value.detach().double()
        self.sums[key] = self.sums[key] + value if key in self.sums else value

    def add(self, sums: dict[str, torch.Tensor], stats: dict[str, LayerStats]) -> None:
        """One micro-batch of this rank: the task's sums, statistics by layer name."""
        for name, value in sums.items():
            self._add(f"{SUMS}{name}", value)
        for name, layer in stats.items():
            # the balance loss is the same on every rank
            self._add("balance", layer.balance_loss / self.mesh.dp.size)
            self._add(f"{name}/dropped", layer.dropped)
            used = torch.stack([layer.importance_E.double(), layer.load_E.double()])
            self.used[name] = used + self.used.get(name, 0)

    def reduce_and_reset(self, prefix: str = "train") -> dict[str, float | list[float]]:
        """The task's measures, speed, and the load of each layer; then starts anew. A collective: all ranks must call
        it.

        Of steps also "time/PART_ms", milliseconds a step, the mean of the ranks, for each of `clock.PARTS`, and
        "memory/peak_bytes_by_rank", a list (`peak_memory`), with the largest as "memory/max_peak_bytes".
        """
        by_name = {bytes_key(*key): num_bytes for key, num_bytes in self.sent.items()}
        sent = dict(sorted(by_name.items()))  # one order on every rank
        self._sum_pending()
        sums = self.sums | {
            k: torch.tensor(float(n), dtype=torch.float64, device=self.mesh.device)
            for k, n in sent.items()
        }
        parts: dict[str, float] = {}
        if self.steps:
            parts = {
                time_key(part): 1e3 * seconds
                for part, seconds in self.mesh.step_timer.read_and_reset().items()
            }
            sums |= {
                key: torch.tensor(ms, dtype=torch.float64, device=self.mesh.device)
                for key, ms in parts.items()
            }
            memory = torch.zeros(self.mesh.dp.size, dtype=torch.float64, device=self.mesh.device)
            memory[self.mesh.dp.index] = peak_memory(self.mesh.device)
            sums[PEAK_BYTES_BY_RANK] = memory  # a place for each rank
        flat = all_reduce_sum(torch.cat([v.reshape(-1) for v in sums.values()]), self.mesh.dp)
        total = dict(zip(sums, flat.split([v.numel() for v in sums.values()]), strict=True))
        of_task = {
            key.removeprefix(SUMS): total[key].item() for key in total if key.startswith(SUMS)
        }
        values: dict[str, float | list[float]] = {
            f"{prefix}/{name}": value for name, value in self.task.compute_metrics(of_task).items()
        }
        if self.steps:
            unit = self.task.throughput_unit
            per_second = of_task[unit] / self.seconds
            values[throughput_key(unit)] = per_second
            work = (
                of_task.get("work", of_task[unit]) / self.seconds
            )  # units of the size that flops are counted for
            values[TFLOPS_PER_DEVICE] = self.flops_per_unit * work / self.mesh.dp.size / 1e12
            values |= {key: total[key].item() / self.steps for key in sent}
            values |= {key: total[key].item() / self.steps / self.mesh.dp.size for key in parts}
            values[PEAK_BYTES_BY_RANK] = total[PEAK_BYTES_BY_RANK].tolist()
            values[MAX_PEAK_BYTES] = total[PEAK_BYTES_BY_RANK].max().item()
            if "balance" in total:
                groups = self.steps * self.task.layout.num_balance_groups
                values[BALANCE_LOSS] = total["balance"].item() / groups
            for name in self.layers:
                values |= self._layer(name, total[f"{name}/dropped"].item())
        self._clear()
        return values

    def _layer(self, name: str, dropped: float) -> dict[str, float | list[float]]:
        """Returns the keys of one layer that the head of this file lists. `dropped`: the sum over all steps."""
        importance_E, load_E = self.layers[name].tolist()
        kept = sum(load_E)
        values: dict[str, float | list[float]] = {
            layer_key(name, key): value / self.steps
            for key, value in zip(RATIOS, self.ratios[name].tolist(), strict=True)
        }
        return values | {
            layer_key(name, DEAD_EXPERTS): load_E.count(0),
            layer_key(name, IMPORTANCE_PER_EXPERT): importance_E,
            layer_key(name, TOKENS_PER_EXPERT): load_E,
            layer_key(name, DROPPED): dropped / self.steps,
            layer_key(name, DROP_RATE): dropped / max(1, dropped + kept),
        }


def peak_memory(device: torch.device) -> int:
    """Bytes, the most so far: on CUDA of tensors on the device (torch's allocator), on CPU of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _ratios(importance_SE: torch.Tensor, load_SE: torch.Tensor) -> torch.Tensor:
    """Returns the RATIOS of steps, which are 0 where a step has no rows: (S, 6), float64."""
    shares = []
    for x_SE in (importance_SE, load_SE):
        mean_S1 = x_SE.mean(1, keepdim=True)
        shares.append(x_SE / torch.where(mean_S1 > 0, mean_S1, 1))
    importance_SE, load_SE = shares
    percentiles_PS = load_SE.quantile(load_SE.new_tensor(LOAD_PERCENTILES) / 100, dim=1)
    cv_importance_S, cv_load_S = (share_SE.std(1, correction=0) for share_SE in shares)
    return torch.stack([cv_importance_S, cv_load_S, load_SE.amax(1), *percentiles_PS], 1)
