"""The language model with DeepSpeed's own MoE layer in place of ours, under DeepSpeed's own engine
and clipping, with torch's fused Adam as the client optimizer: what its documentation has, and what
`lm.py` times beside ours.

Its gate for k above 2 has no noise, and its balance loss is that of GShard. Where it drops nothing,
every expert's rows are padded to those of the fullest; where it drops, to the capacity.

Legend: T tokens, D width, E experts.
"""

import math
from typing import Any

import torch
from torch import nn

from moe_dist.config.schema import Config, LSTMConfig
from moe_dist.distributed.batch_layout import BatchLayout
from moe_dist.distributed.mesh import Mesh
from moe_dist.engine.deepspeed import import_deepspeed
from moe_dist.engine.parallelize import parallelize
from moe_dist.moe.layer import LayerStats
from moe_dist.nn.token_context import TokenContext

CAPACITY_FACTOR = 1.25
BALANCE = 0.01  # --moe-loss-coeff of Megatron-DeepSpeed's MoE examples


class Layer(nn.Module):
    """`deepspeed.moe.layer.MoE` as the middle layer of a model. `drops` may be set at any time."""

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__()
        moe = config.moe
        w1, w2 = (
            nn.Linear(config.dim, moe.expert_hidden_dim, bias=False),
            nn.Linear(moe.expert_hidden_dim, config.dim, bias=False),
        )
        self.moe = import_deepspeed().moe.layer.MoE(
            config.dim,
            nn.Sequential(w1, nn.ReLU(), w2),
            moe.num_experts,
            k=moe.k,
            capacity_factor=CAPACITY_FACTOR,
        )
        self.gate = self.moe.deepspeed_moe.gate

    @property
    def drops(self) -> bool:
        return self.gate.drop_tokens

    @drops.setter
    def drops(self, value: bool) -> None:
        self.gate.drop_tokens = value

    def forward(self, x_TD: torch.Tensor, ctx: TokenContext) -> tuple[torch.Tensor, LayerStats]:
        y_TD, balance, load_E = self.moe(x_TD)
        capacity = math.ceil(len(x_TD) / len(load_E) * self.gate.capacity_factor * self.gate.k)
        dropped = (load_E - capacity).clamp(min=0).sum() * self.drops
        return y_TD, LayerStats(BALANCE * balance, load_E.float(), load_E, dropped)


class Adam(torch.optim.Adam):
    """With the one method of our optimizer that a training loop calls."""

    def start_step(self, lr: float) -> None:
        for group in self.param_groups:
            group["lr"] = lr


class Engine:
    """What `moe_dist.engine.deepspeed.Engine` is to a training loop, on one process."""

    def __init__(
        self, model: nn.Module, config: Config, ds: dict[str, Any], layout: BatchLayout, mesh: Mesh
    ) -> None:
        """`model`: on the meta device, as for `parallelize`."""
        deepspeed, optim = import_deepspeed(), config.optim
        del model.middle
        parallelize(
            model, mesh, config.seed, torch.float32
        )  # fills embedding, LSTMs and softmax as ours are
        torch.manual_seed(config.seed)
        model.middle = self.layer = Layer(config.model).to(mesh.device)
        groups = deepspeed.moe.utils.split_params_into_different_moe_groups_for_optimizer(
            {"params": list(model.parameters()), "name": "parameters"}
        )
        self.optimizer = Adam(groups, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)
        full = ds | {
            "train_micro_batch_size_per_gpu": layout.samples_per_rank,
            "gradient_clipping": optim.max_grad_norm,
            "steps_per_print": None,
            "zero_optimization": {"stage": 0},
        }
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=self.optimizer, config=full)

    def __call__(self, *args: Any) -> Any:
        return self.engine(*args)

    def backward(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss)
        self.engine.step()
