"""Hides all but the dense parameters from DeepSpeed.

DeepSpeed moves, casts, shards and reduces every parameter it finds in a model. It must not find
experts, which differ on every expert-parallel rank, nor vocabulary rows, which are reduced one by
one (`optim`). They stay in the module tree for all other code.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from moe_dist.engine.parallelize import ParallelModel
from moe_dist.moe.layer import MoE

# a layer's hidden submodules: experts, and the dispatcher, which has no parameters
HIDDEN_MODULES = ("dispatcher", "experts")


class DenseView(nn.Module):
    """Calls the model, and lists its dense parameters alone."""

    def __init__(self, model: ParallelModel) -> None:
        """Wraps the model; its parameters keep their identity."""
        super().__init__()
        self.model = model.module
        self._dense = {id(p) for p in model.dense_parameters().values()}

    def forward(self, *args: Any) -> Any:
        """Returns the model's result."""
        return self.model(*args)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields names and dense parameters; `parameters` and DeepSpeed's reductions use it."""
        for name, p in super().named_parameters(*args, **kwargs):
            if id(p) in self._dense:
                yield name, p


# FENCE. Tried with DeepSpeed 0.19.8, held by test_dense_view.py and, at ZeRO 3,
# test_large_vocabulary.py. While DeepSpeed's engine is constructed, it walks the module tree
# itself: it casts every module to bf16, moves it, and at ZeRO 3 removes each module's parameters
# and hooks its forward. So the modules with other parameters leave the tree for that time. Later
# the engine uses `DenseView.named_parameters`.
@contextlib.contextmanager
def experts_detached(model: ParallelModel) -> Iterator[None]:
    """Removes experts, dispatchers and row tables from the module tree inside the block."""
    tables = [model.module.get_submodule(name) for name in model.row_tables]
    children_before = {parent: dict(parent._modules) for parent in model.module.modules()}
    try:
        for parent, children in children_before.items():
            for name, child in children.items():
                in_layer = isinstance(parent, MoE) and name in HIDDEN_MODULES
                if in_layer or any(child is table for table in tables):
                    del parent._modules[name]
        yield
    finally:
        for parent, children in children_before.items():
            parent._modules.clear()
            parent._modules.update(children)
