"""Shows DeepSpeed a model without its experts.

DeepSpeed moves, casts, shards and reduces every parameter that it finds in a model, and so it must not find
the others: experts are different on every expert-parallel rank, and rows of a vocabulary are reduced one by
one (`optim`). They stay in the module tree for everybody else.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from moe_dist.engine.parallelize import ParallelModel
from moe_dist.moe.layer import MoE

# submodules of a layer that are not shown: experts, and the dispatcher, which has no parameters
HIDDEN_MODULES = ("dispatcher", "experts")


class DenseView(nn.Module):
    """Calls the model, and lists its dense parameters alone."""

    def __init__(self, model: ParallelModel) -> None:
        """Wraps the model; its parameters keep their identity."""
        super().__init__()
        self.model = model.module
        self._dense = {id(p) for p in model.dense_parameters().values()}

    def forward(self, *args: Any) -> Any:
        """Returns what the model returns."""
        return self.model(*args)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields names and dense parameters; `parameters` and DeepSpeed's reductions use it."""
        for name, p in super().named_parameters(*args, **kwargs):
            if id(p) in self._dense:
                yield name, p


# FENCE. Tried with DeepSpeed 0.19.8, held by tests of the experts' dtypes and of ZeRO 3 (test_parallelize.py,
# test_layouts.py). While it is constructed, DeepSpeed walks the module tree itself: it casts every module to
# bf16, moves it, and at ZeRO 3 takes the parameters of each module away and hooks its forward. So the experts
# are out of the tree for that time. Later it goes through `DenseView.named_parameters`.
@contextlib.contextmanager
def experts_detached(model: ParallelModel) -> Iterator[None]:
    """Takes everything but dense parameters out of the module tree, and puts it back at the end."""
    kept_modules = {}
    kept_parameters = {}
    for module in model.module.modules():
        if isinstance(module, MoE):
            kept_modules[module] = dict(module._modules)
    for name in model.row_tables:
        module = model.module.get_submodule(name)
        kept_parameters[module] = dict(module._parameters)
    for module in kept_modules:
        for hidden in HIDDEN_MODULES:
            del module._modules[hidden]
    for module in kept_parameters:
        module._parameters.clear()
    try:
        yield
    finally:
        for module, modules in kept_modules.items():
            module._modules.clear()
            module._modules.update(modules)
        for module, parameters in kept_parameters.items():
            module._parameters.update(parameters)
