"""Sums between two log lines, over micro-batches and ranks: one all-reduce per line, none per step."""

import contextlib
import math
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from moe_dist.layer import LayerStats
from moe_dist.parallel.collectives import Label, sum_over
from moe_dist.parallel.mesh import Mesh

SUMS = "sums/"  # before the names of a task's


class Meter:
    """Adds up what micro-batches tell; `read` gives the means over all ranks since the last reading."""

    def __init__(self, mesh: Mesh, task: Any, flops_per_unit: int = 0) -> None:
        """`task`: a `tasks.Task`; `flops_per_unit`: of it, forward and backward, as `summary.counts` has it."""
        self.mesh, self.task, self.flops_per_unit = mesh, task, flops_per_unit
        self._clear()

    def _clear(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.steps = 0
        self.seconds, self.sent = 0.0, Counter[Label]()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around one training step: counts it, its seconds and those of its parts, and the bytes that it sends, by
        (site, direction)."""
        start, sent = time.perf_counter(), self.mesh.sent
        with self.mesh.clock.step():
            yield
        self.steps += 1
        self.seconds += time.perf_counter() - start
        for label, total in self.mesh.sent.items():
            self.sent[label] += total - sent[label]

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
            self._add(f"{name}/importance", layer.importance_E)
            self._add(f"{name}/load", layer.load_E)
            self._add(f"{name}/dropped", layer.dropped)

    def read(self, prefix: str = "train") -> dict[str, float | list[float]]:
        """The task's measures, speed, and the load of each layer; then starts anew. A collective: all ranks must call
        it.

        Of steps also "time/PART_ms", milliseconds a step, the mean of the ranks, for each of `clock.PARTS`, and
        "memory/peak_bytes", a list by rank (`peak_memory`), with the largest as "memory/largest_peak_bytes".
        """
        by_name = {f"exchange/{_place(site)}/{direction}_bytes": n for (site, direction), n in self.sent.items()}
        sent = dict(sorted(by_name.items()))  # one order on every rank
        sums = self.sums | {
            k: torch.tensor(float(n), dtype=torch.float64, device=self.mesh.device) for k, n in sent.items()
        }
        parts: dict[str, float] = {}
        if self.steps:
            parts = {f"time/{part}_ms": 1e3 * seconds for part, seconds in self.mesh.clock.read().items()}
            sums |= {key: torch.tensor(ms, dtype=torch.float64, device=self.mesh.device) for key, ms in parts.items()}
            memory = torch.zeros(self.mesh.dp.size, dtype=torch.float64, device=self.mesh.device)
            memory[self.mesh.dp.index] = peak_memory(self.mesh.device)
            sums["memory/peak_bytes"] = memory  # a place for each rank
        flat = sum_over(torch.cat([v.reshape(-1) for v in sums.values()]), self.mesh.dp)
        total = dict(zip(sums, flat.split([v.numel() for v in sums.values()]), strict=True))
        of_task = {key.removeprefix(SUMS): total[key].item() for key in total if key.startswith(SUMS)}
        values: dict[str, float | list[float]] = {
            f"{prefix}/{name}": value for name, value in self.task.measures(of_task).items()
        }
        if self.steps:
            unit = self.task.unit
            per_second = of_task[unit] / self.seconds
            values[f"{unit}_per_second"] = per_second
            work = of_task.get("work", of_task[unit]) / self.seconds  # units of the size that flops are counted for
            values["tflops_per_device"] = self.flops_per_unit * work / self.mesh.dp.size / 1e12
            values |= {key: total[key].item() / self.steps for key in sent}
            values |= {key: total[key].item() / self.steps / self.mesh.dp.size for key in parts}
            values["memory/peak_bytes"] = total["memory/peak_bytes"].tolist()
            values["memory/largest_peak_bytes"] = total["memory/peak_bytes"].max().item()
            if "balance" in total:
                groups = self.steps * self.task.layout.num_balance_groups
                values["train/balance_loss"] = total["balance"].item() / groups
            for name in [key.removesuffix("/load") for key in total if key.endswith("/load")]:
                values |= _layer(f"moe/{name}", total[f"{name}/importance"], total[f"{name}/load"])
                dropped, kept = total[f"{name}/dropped"].item(), total[f"{name}/load"].sum().item()
                values[f"moe/{name}/dropped"] = dropped / self.steps
                values[f"moe/{name}/drop_rate"] = dropped / max(1, dropped + kept)  # of assignments
        self._clear()
        return values


def _place(site: int | str) -> str:
    return f"site{site}" if isinstance(site, int) else site


def peak_memory(device: torch.device) -> int:
    """Bytes, the most so far: on CUDA of tensors on the device (torch's allocator), on CPU of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def perplexity(loss: float) -> float:
    """exp(loss), infinity where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def _layer(prefix: str, importance_E: torch.Tensor, load_E: torch.Tensor) -> dict[str, float | list[float]]:
    """Importance and load by expert, their coefficients of variation, the largest load and the 10th, 50th and 90th
    percentile over the mean, and how many experts got no row."""
    percentiles = (load_E / load_E.mean()).quantile(load_E.new_tensor([0.1, 0.5, 0.9])).tolist()
    return {
        **{f"{prefix}/p{p}_over_mean_load": value for p, value in zip((10, 50, 90), percentiles, strict=True)},
        f"{prefix}/dead_experts": int((load_E == 0).sum().item()),
        f"{prefix}/importance": importance_E.tolist(),
        f"{prefix}/load": load_E.tolist(),
        f"{prefix}/cv_importance": (importance_E.std(correction=0) / importance_E.mean()).item(),
        f"{prefix}/cv_load": (load_E.std(correction=0) / load_E.mean()).item(),
        f"{prefix}/max_over_mean_load": (load_E.max() / load_E.mean()).item(),
    }
