"""A plain model on a mesh, changed from outside, in this order:

  1. every rank keeps the experts that the mesh says are its own;
  2. parameters, so far on the meta device, are filled: dense ones keyed by name, experts by name and global id;
  3. each MoE layer gets the exchange of the mesh, and the sum that its balance loss needs;
  4. the experts leave the module tree: DeepSpeed sees dense parameters only, and `optim` updates both.

Legend: a stacked expert parameter holds this rank's experts along its first dimension.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from moe_dist.dispatch.exchange import LocalExchange, RaggedExchange
from moe_dist.layer import MoE
from moe_dist.parallel.collectives import shared_sum
from moe_dist.parallel.mesh import Mesh
from moe_dist.parameters import bounds_of, initialize


@dataclass(frozen=True)
class ParallelModel:
    """`dense` runs the whole model and registers its dense parameters alone; `experts` holds the others by name."""

    dense: nn.Module
    experts: dict[str, nn.Parameter]


def parallelize(model: nn.Module, mesh: Mesh, seed: int, dtype: torch.dtype) -> ParallelModel:
    """`model` must be on the meta device; afterwards it is on the mesh's, in `dtype`."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoE)}
    ids = {name: mesh.my_experts(layer.gate.num_experts) for name, layer in layers.items()}
    bounds = bounds_of(model)
    for name, layer in layers.items():  # 1
        mine = slice(ids[name].start, ids[name].stop)
        for module in layer.experts.modules():
            for key, p in module.named_parameters(recurse=False):
                setattr(module, key, nn.Parameter(p[mine].contiguous()))
    model.to_empty(device=mesh.device).to(dtype)
    experts: dict[str, nn.Parameter] = {}
    for name, layer in layers.items():
        owned = {f"{name}.experts.{key}": p for key, p in layer.experts.named_parameters()}
        for key, p in owned.items():
            initialize(p, key, bounds[key], seed, ids[name])  # 2
        experts |= owned
        layer.exchange = LocalExchange() if mesh.ep.size == 1 else RaggedExchange(mesh.ep)  # 3
        layer.shared_sum = partial(shared_sum, axis=mesh.dp)
        layer.__dict__["experts"] = layer._modules.pop("experts")  # 4: an attribute, no longer a submodule
    for name, p in model.named_parameters():
        initialize(p, name, bounds[name], seed)  # 2, the dense ones
    return ParallelModel(model, experts)
