"""The dense parameters under DeepSpeed ZeRO; the package's only import of deepspeed.

DeepSpeed reduces and shards, and calls our optimizer; it neither clips nor sees an expert. A file of `ds_configs/`
holds precision and ZeRO stage; batch sizes and clipping belong to the run's config.
"""

import logging
import os
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from moe_dist.config.schema import OptimConfig
from moe_dist.distributed.batch_layout import BatchLayout
from moe_dist.distributed.labels import CommLabel
from moe_dist.distributed.mesh import Mesh
from moe_dist.engine.ds_config import compute_dtype
from moe_dist.engine.parallelize import ParallelModel
from moe_dist.optim.optimizer import Optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")


def import_deepspeed() -> Any:
    """Quiet, and without a build at start."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_IGNORE_CUDA_DETECTION", "1")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed calls collectives by names that torch 2.13 deprecates, at every step
    warnings.filterwarnings(
        "ignore", message=".*torch.distributed.*is deprecated", category=FutureWarning
    )
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    # On gloo DeepSpeed would compile a shared-memory op at start: 20 s, a compiler, and a build lock that a killed run
    # leaves behind and that then hangs every later run. Told that the op is not for this machine, it uses gloo alone.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed 0.19.8 imports its Muon optimizer to compare types with it. That compiles a function, for which torch
    # imports its compiler: 3 CPU seconds (test_startup.py). This is what it does with a torch that has no compiler.
    deepspeed.runtime.compiler.compile = lambda: deepspeed.runtime.compiler.dummy_decorator
    return deepspeed


RECORDED_COLLECTIVES = (
    "all_reduce",
    "all_reduce_coalesced",
    "all_gather",
    "all_gather_coalesced",
    "all_gather_into_tensor",
    "barrier",
    "broadcast",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
)


def _record_calls(backend: Any, mesh: Mesh) -> None:
    """Has the calls that DeepSpeed makes by its `backend` recorded like ours: a rank may wait in them for another."""

    def recorded(name: str) -> Any:
        method = getattr(type(backend), name)

        def call(*args: Any, **kwargs: Any) -> Any:
            run = partial(method, backend, *args, **kwargs)
            return mesh.flight_recorder.record_blocking_call(
                CommLabel("DeepSpeed", name), mesh.dp.ranks, run, _work
            )

        return call

    for name in RECORDED_COLLECTIVES:
        setattr(backend, name, recorded(name))


def _work(result: Any) -> Any:
    """What a call has left to wait for."""
    if hasattr(result, "is_completed"):
        return result
    return _OnStream() if torch.cuda.is_available() else None


class _OnStream:
    """What a GPU has been given up to here."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event()
        self.event.record()

    def is_completed(self) -> bool:
        return self.event.query()


class Engine:
    """Forward, backward and step of a model whose dense parameters DeepSpeed shards."""

    def __init__(
        self,
        model: ParallelModel,
        config: OptimConfig,
        ds: dict[str, Any],
        layout: BatchLayout,
        mesh: Mesh,
    ) -> None:
        """Raises ValueError for an unknown `expert_form`."""
        self.deepspeed = import_deepspeed()
        self.stage: int = ds["zero_optimization"]["stage"]
        self.world = layout.world
        outside = (model.experts, model.gates, model.row_tables)
        self.optimizer = Optimizer(model.dense.parameters(), *outside, config, mesh, self.stage)
        # one sub-group, so that ZeRO 3 calls step() once; nothing persistent, so that it shards small parameters too
        zero = {"stage3_param_persistence_threshold": 0, "sub_group_size": 10**12} | ds[
            "zero_optimization"
        ]
        full = ds | {
            "train_micro_batch_size_per_gpu": layout.samples_per_rank,
            "gradient_accumulation_steps": layout.grad_accum_steps,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": None,
            "zero_optimization": zero,
        }
        if (
            compute_dtype(ds) == torch.bfloat16 and self.stage >= 2
        ):  # 0 and 1 add micro-batches up in float32 anyway
            full |= {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
        self.names = {name: p for name, p in model.dense.named_parameters()}
        self.optimizer.local_matrix_shards = self._local_matrix_shards
        self.engine, *_ = self.deepspeed.initialize(
            model=model.dense, optimizer=self.optimizer, config=full
        )
        _record_calls(self.deepspeed.comm.comm.cdb, mesh)

    def _local_matrix_shards(self) -> list[torch.Tensor]:
        """Of the float32 master of each dense matrix what this rank updates, maybe nothing; views."""
        matrices = [i for i, p in enumerate(self.names.values()) if len(self.shape(p)) > 1]
        if self.stage == 0:
            return [self.flat_masters()[i].detach() for i in matrices]
        parameters: list[Any] = list(self.names.values())
        if self.stage == 3:
            local = self.deepspeed.utils.safe_get_local_fp32_param
            return [local(parameters[i]) for i in matrices]
        maps = [
            parameters[i]._hp_mapping for i in matrices
        ]  # None where the rank's partition has none of it
        return [self.flat_masters()[0][:0] if m is None else m.get_hp_fragment() for m in maps]

    def __call__(self, *args: Any) -> Any:
        return self.engine(*args)

    def backward(self, loss: torch.Tensor) -> None:
        """Backward of this rank's part of one micro-batch's loss. Gradients are summed over ranks and micro-batches;
        after the last micro-batch of a step comes the update.

        Raises FloatingPointError, on every rank, for a step that could not be skipped."""
        self.engine.backward(
            loss * self.world, scale_wrt_gas=False
        )  # undoes the engine's averaging over ranks
        with self.optimizer.mesh.step_timer.range("optimizer"):
            self.engine.step()
        self.optimizer.check_not_skipped()

    def flat_masters(self) -> list[torch.Tensor]:
        """What the optimizer's state belongs to: whole parameters in order at ZeRO 0, this rank's partition above."""
        if self.stage == 0:
            return self.optimizer.param_groups[0]["params"]
        zero = self.engine.optimizer
        return (
            zero.fp32_partitioned_groups_flat
            if self.stage == 3
            else zero.single_partition_of_fp32_groups
        )

    def dense_weight(self, name: str) -> torch.Tensor:
        """The whole float32 master of a parameter. A collective at stages 1 to 3."""
        if self.stage == 0:
            return self.flat_masters()[list(self.names).index(name)].detach()
        p = self.names[name]
        return self.deepspeed.utils.safe_get_full_fp32_param(p).view(self.shape(p))

    def dense_state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole tensors by meaning, on any stage: "NAME" (float32 master), "NAME.exp_avg", "NAME.exp_avg_sq".

        A collective at stages 1 to 3: all ranks must run through it.
        """
        fragment = self.deepspeed.utils
        for i, (name, p) in enumerate(self.names.items()):
            yield name, self.dense_weight(name)
            for moment in MOMENTS:
                if self.optimizer.updates == 0:  # there are none yet
                    yield f"{name}.{moment}", torch.zeros(self.shape(p))
                elif self.stage == 0:
                    yield f"{name}.{moment}", self.optimizer.state[self.flat_masters()[i]][moment]
                else:
                    yield (
                        f"{name}.{moment}",
                        fragment.safe_get_full_optimizer_state(p, moment).view(self.shape(p)),
                    )

    def empty_dense_state(self) -> dict[str, torch.Tensor]:
        """Tensors to be filled by a checkpoint, with the keys and shapes of `dense_state`."""
        keys = (
            (key, p)
            for name, p in self.names.items()
            for key in (name, *(f"{name}.{m}" for m in MOMENTS))
        )
        return {key: torch.empty(self.shape(p), dtype=torch.float32) for key, p in keys}

    def load_dense_state(self, state: dict[str, torch.Tensor], updates: int) -> None:
        """Fills parameters, their masters and Adam's moments, also of an engine that has made steps.

        Args:
            state: Whole tensors, with the keys of `dense_state`.
            updates: Number of updates after which they were saved.
        """
        for flat in self.flat_masters():
            of_flat = self.optimizer.state[flat]
            for m in MOMENTS:  # as torch's fused Adam makes them; those that are there stay, for DeepSpeed keeps views
                of_flat.setdefault(m, torch.zeros_like(flat))
            of_flat["step"] = torch.tensor(float(updates), device=flat.device)
        fragment = self.deepspeed.utils
        if self.stage in (
            1,
            2,
        ):  # lets the safe_* functions find the moments, as after a first step
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()
        for i, (name, p) in enumerate(self.names.items()):
            with (
                self.deepspeed.zero.GatheredParameters(
                    [p], modifier_rank=0, enabled=self.stage == 3
                ),
                torch.no_grad(),
            ):
                p.copy_(state[name])
            if self.stage == 0:
                master = self.flat_masters()[i]
                with torch.no_grad():
                    master.copy_(state[name])
                for m in MOMENTS:
                    self.optimizer.state[master][m].copy_(state[f"{name}.{m}"])
            elif (
                self.stage == 3
            ):  # its own way from a whole tensor fails where the ranks do not divide the elements
                fragment.safe_set_local_fp32_param(p, self._mine(p, state[name]))
                for m in MOMENTS:
                    fragment.safe_set_local_optimizer_state(
                        p, self._mine(p, state[f"{name}.{m}"]), m
                    )
            else:
                fragment.safe_set_full_fp32_param(p, state[name].to(p.device))
                for m in MOMENTS:
                    fragment.safe_set_full_optimizer_state(p, state[f"{name}.{m}"].to(p.device), m)

    def _mine(self, p: Any, whole: torch.Tensor) -> torch.Tensor:
        """This rank's partition at ZeRO 3, the last one filled up with zeros."""
        flat, size = whole.flatten(), p.ds_tensor.numel()
        padded = torch.cat([flat, flat.new_zeros(size * self.world - len(flat))])
        return padded.view(self.world, size)[self.optimizer.mesh.dp.index].to(p.device)

    @staticmethod
    def shape(p: torch.Tensor) -> torch.Size:
        """Of the whole parameter, which ZeRO 3 has taken away."""
        return getattr(p, "ds_shape", p.shape)
