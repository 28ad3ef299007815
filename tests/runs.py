"""Short training runs inside one process of a test, on any layout."""

from typing import Any

import torch
import torch.distributed as dist

from moe_dist.config import Config, override
from moe_dist.configs import get
from moe_dist.engine import Engine, compute_dtype, read_ds_config
from moe_dist.optim import learning_rate
from moe_dist.parallel import mesh as meshes
from moe_dist.parallelize import parallelize
from moe_dist.tasks import LanguageModel

TINY = [
    "steps=20", "log_every=1", "wandb.mode=off", "data.vocabulary_size=300", "model.dim=16", "model.moe.num_experts=8",
    "model.moe.k=2", "model.moe.hidden=24", "batch.samples=8", "batch.timesteps=6", "batch.samples_per_balance_group=4",
    "optim.lr=1e-4", "optim.warmup_steps=5", "optim.clip_norm=0.3",
]  # fmt: skip


def tiny(*more: str) -> Config:
    """The demo with small numbers: dropout, noise and clipping on."""
    return override(get("lstm_moe_demo"), [*TINY, *more])


class Run:
    """Everything that train.py sets up, and its step."""

    def __init__(self, config: Config, text: dict[str, Any] | None = None) -> None:
        ds = read_ds_config(config)
        self.config, self.mesh = config, meshes.arrange(config.mesh.ep)
        self.layout = meshes.lay_out(config, self.mesh.dp.size)
        self.task = LanguageModel(config, self.layout, self.mesh)
        self.model = parallelize(self.task.plain_model(config), self.mesh, config.seed, compute_dtype(ds))
        self.engine = Engine(self.model, config.optim, ds, self.layout, self.mesh)
        self.optimizer = self.engine.optimizer
        self.task.start(compute_dtype(ds))
        self.losses: list[float] = []
        self.norms: list[float] = []

    def steps(self, first: int, last: int) -> "Run":
        """Optimizer steps first + 1 .. last."""
        for step in range(first + 1, last + 1):
            self.optimizer.begin(learning_rate(self.config.optim, step))
            batches = list(self.task.batches(step - 1))
            words = self.task.words(batches)
            total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
            for batch in batches:
                loss, nll, _ = self.task.loss(self.engine, batch, words)
                self.engine.backward(loss)
                total += nll.double() / words
            dist.all_reduce(total)
            self.losses.append(total.item())
            self.norms.append(self.optimizer.norm)
        return self

    def weights(self) -> dict[str, torch.Tensor]:
        """Whole masters by name, experts stacked by global id, and rows."""
        whole = {name: t.detach().clone() for name, t in self.engine.dense_state() if "exp_avg" not in name}
        tables = [table.named for table in self.optimizer.rows.values()]
        whole |= {name: state.master.clone() for named in tables for name, state in named.items()}
        for name, state in (self.optimizer.experts | self.optimizer.gates).items():
            part = state.master
            parts = [torch.empty_like(part) for _ in range(self.mesh.ep.size)]
            dist.all_gather(parts, part, group=self.mesh.ep.group)
            whole[name] = torch.cat(parts)
        return whole
