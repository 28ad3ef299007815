"""The engine: dense parameters under DeepSpeed ZeRO. The package's only import of deepspeed.

DeepSpeed reduces and shards the dense parameters and calls our optimizer; it does not clip
gradients and does not see the experts. A `ds_configs/` file contains precision and ZeRO stage;
batch sizes and clipping belong to the run's config.
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
from moe_dist.engine.dense_view import DenseView, experts_detached
from moe_dist.engine.ds_config import compute_dtype
from moe_dist.engine.parallelize import ParallelModel
from moe_dist.optim.optimizer import Optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")
# DeepSpeed backend methods to record in the flight recorder
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


def import_deepspeed() -> Any:
    """Imports `deepspeed` without its log lines and its compilation at start."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_IGNORE_CUDA_DETECTION", "1")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # at every step, DeepSpeed calls collectives by names deprecated in torch 2.13
    warnings.filterwarnings(
        "ignore", message=".*torch.distributed.*is deprecated", category=FutureWarning
    )
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    # FENCE. Both lines tried with DeepSpeed 0.19.8 and torch 2.13, held by test_startup.py.
    # On gloo DeepSpeed would compile a shared-memory op at start: it takes 20 s and a compiler, and
    # a killed run leaves a build lock behind, on which every later run hangs. If the op is marked
    # as not compatible, DeepSpeed uses gloo alone.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # To compare types, DeepSpeed imports its Muon optimizer, whose import compiles a function, so
    # torch imports its compiler: 3 CPU seconds. The replacement is DeepSpeed's own path for a torch
    # without a compiler.
    deepspeed.runtime.compiler.compile = lambda: deepspeed.runtime.compiler.dummy_decorator
    return deepspeed


def _record_calls(backend: Any, mesh: Mesh) -> None:
    """Records DeepSpeed's collectives in the flight recorder: a rank may hang there, too."""

    def recorded(name: str) -> Any:
        method = getattr(type(backend), name)

        def call(*args: Any, **kwargs: Any) -> Any:
            run = partial(method, backend, *args, **kwargs)
            label = CommLabel("DeepSpeed", name)
            return mesh.flight_recorder.record_blocking_call(label, mesh.dp.ranks, run, _work)

        return call

    for name in RECORDED_COLLECTIVES:
        setattr(backend, name, recorded(name))


def _work(result: Any) -> Any:
    """Returns a collective's unfinished work, None if there is none."""
    if hasattr(result, "is_completed"):
        return result
    return _StreamPosition() if torch.cuda.is_available() else None


class _StreamPosition:
    """A CUDA stream position as a work handle: completed once the GPU has passed it."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event()
        self.event.record()

    def is_completed(self) -> bool:
        """Returns True if the GPU has passed it."""
        return self.event.query()


class Engine:
    """Runs forward, backward and step; DeepSpeed shards the model's dense parameters.

    Attributes:
        deepspeed: The module.
        engine: DeepSpeed's own engine.
        stage: ZeRO stage.
        world: Number of ranks.
        optimizer: The optimizer for all parameters.
        names: Dense parameters by name.
    """

    def __init__(
        self,
        model: ParallelModel,
        config: OptimConfig,
        ds: dict[str, Any],
        layout: BatchLayout,
        mesh: Mesh,
    ) -> None:
        """Hands the dense parameters to DeepSpeed, and all of them to the optimizer.

        Args:
            model: The parallel model.
            config: The config's section `optim`.
            ds: The DeepSpeed config (`ds_config.read_ds_config`).
            layout: The batch layout.
            mesh: The ranks.

        Raises:
            ValueError: `optim.expert_optimizer` is unknown.
        """
        self.deepspeed = import_deepspeed()
        self.stage: int = ds["zero_optimization"]["stage"]
        self.world = layout.world
        self.names = model.dense_parameters()
        self.optimizer = Optimizer(
            self.names.values(),
            model.experts,
            model.group_gates,
            model.row_tables,
            config,
            mesh,
            self.stage,
        )
        self.optimizer.local_matrix_shards = self._local_matrix_shards
        with experts_detached(model):
            self.engine, *_ = self.deepspeed.initialize(
                model=DenseView(model),
                optimizer=self.optimizer,
                config=self._complete_config(ds, layout),
            )
        _record_calls(self.deepspeed.comm.comm.cdb, mesh)

    def _complete_config(self, ds: dict[str, Any], layout: BatchLayout) -> dict[str, Any]:
        """Returns the DeepSpeed config completed with the run's keys."""
        # one sub-group, so ZeRO 3 calls step() once; threshold 0, so it shards small parameters too
        zero = {"stage3_param_persistence_threshold": 0, "sub_group_size": 10**12}
        complete = ds | {
            "train_micro_batch_size_per_gpu": layout.samples_per_rank,
            "gradient_accumulation_steps": layout.grad_accum_steps,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": None,
            "zero_optimization": zero | ds["zero_optimization"],
        }
        # stages 0 and 1 accumulate micro-batches in float32 in any case
        if compute_dtype(ds) == torch.bfloat16 and self.stage >= 2:
            complete["data_types"] = {"grad_accum_dtype": "fp32"}
            complete["communication_data_type"] = "fp32"
        return complete

    def __call__(self, *args: Any) -> Any:
        """Returns the model's result, called through DeepSpeed and `DenseView`."""
        return self.engine(*args)

    def backward(self, loss: torch.Tensor) -> None:
        """Runs backward for this rank's part of one micro-batch's loss.

        Gradients are summed over ranks and micro-batches; hooks on the parameters outside DeepSpeed
        collect theirs meanwhile (`optim.expert_state`). `self.engine.step()` does nothing before a
        step's last micro-batch; then it calls `Optimizer.step` through ZeRO's wrapper.

        Args:
            loss: A scalar.

        Raises:
            FloatingPointError: On every rank, a step with a non-finite gradient could not be
                skipped.
        """
        # the factor undoes DeepSpeed's averaging over ranks
        self.engine.backward(loss * self.world, scale_wrt_gas=False)
        with self.optimizer.mesh.step_timer.range("optimizer"):
            self.engine.step()
        self.optimizer.check_not_skipped()

    def _local_matrix_shards(self) -> list[torch.Tensor]:
        """Returns, for each dense matrix, a view of this rank's part of its fp32 master.

        A view is empty if this rank has no part.
        """
        parameters: list[Any] = list(self.names.values())
        matrices = [i for i, p in enumerate(parameters) if len(self.shape(p)) > 1]
        if self.stage == 0:
            return [self.flat_masters()[i].detach() for i in matrices]
        if self.stage == 3:
            local_part = self.deepspeed.utils.safe_get_local_fp32_param
            return [local_part(parameters[i]) for i in matrices]
        shards = []
        for i in matrices:
            mapping = parameters[i]._hp_mapping  # None if it is not in this rank's partition
            if mapping is None:
                shards.append(self.flat_masters()[0][:0])
            else:
                shards.append(mapping.get_hp_fragment())
        return shards

    def flat_masters(self) -> list[torch.Tensor]:
        """Returns the tensors used as keys in the optimizer's state.

        At ZeRO 0 they are the whole parameters in order, at ZeRO 1 to 3 this rank's flat
        partitions.
        """
        if self.stage == 0:
            return self.optimizer.param_groups[0]["params"]
        zero = self.engine.optimizer
        if self.stage == 3:
            return zero.fp32_partitioned_groups_flat
        return zero.single_partition_of_fp32_groups

    def dense_weight(self, name: str) -> torch.Tensor:
        """Returns a dense parameter's whole float32 master. A collective at stages 1 to 3."""
        if self.stage == 0:
            return self.flat_masters()[list(self.names).index(name)].detach()
        p = self.names[name]
        return self.deepspeed.utils.safe_get_full_fp32_param(p).view(self.shape(p))

    def dense_state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields whole tensors by name, the same at any stage.

        A collective at stages 1 to 3: all ranks must exhaust the iterator.

        Yields:
            "NAME" with the float32 master, "NAME.exp_avg" and "NAME.exp_avg_sq" with Adam's
            moments.
        """
        for i, (name, p) in enumerate(self.names.items()):
            yield name, self.dense_weight(name)
            for moment in MOMENTS:
                if self.optimizer.updates == 0:  # Adam has no moments yet
                    whole = torch.zeros(self.shape(p))
                elif self.stage == 0:
                    whole = self.optimizer.state[self.flat_masters()[i]][moment]
                else:
                    full_state = self.deepspeed.utils.safe_get_full_optimizer_state
                    whole = full_state(p, moment).view(self.shape(p))
                yield f"{name}.{moment}", whole

    def empty_dense_state(self) -> dict[str, torch.Tensor]:
        """Returns tensors for a checkpoint to fill, with the keys and shapes of `dense_state`."""
        state = {}
        for name, p in self.names.items():
            for key in (name, *(f"{name}.{moment}" for moment in MOMENTS)):
                state[key] = torch.empty(self.shape(p), dtype=torch.float32)
        return state

    def load_dense_state(self, state: dict[str, torch.Tensor], updates: int) -> None:
        """Fills parameters, masters and Adam's moments, before or after training steps.

        Args:
            state: Whole tensors, with the keys of `dense_state`.
            updates: Number of updates before they were saved.
        """
        for flat in self.flat_masters():
            adam = self.optimizer.state[flat]
            for moment in MOMENTS:
                # the same tensors as torch's fused Adam creates; existing ones stay, because
                # DeepSpeed has views into them
                adam.setdefault(moment, torch.zeros_like(flat))
            adam["step"] = torch.tensor(float(updates), device=flat.device)
        if self.stage in (1, 2):
            # lets DeepSpeed's safe_* functions find the moments, as after a first step
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()
        for i, (name, p) in enumerate(self.names.items()):
            moments = {moment: state[f"{name}.{moment}"] for moment in MOMENTS}
            gathered = self.deepspeed.zero.GatheredParameters(
                [p], modifier_rank=0, enabled=self.stage == 3
            )
            with gathered, torch.no_grad():
                p.copy_(state[name])
            if self.stage == 0:
                self._load_whole(self.flat_masters()[i], state[name], moments)
            elif self.stage == 3:
                self._load_local_part(p, state[name], moments)
            else:
                self._load_full(p, state[name], moments)

    def _load_whole(
        self, master: torch.Tensor, weight: torch.Tensor, moments: dict[str, torch.Tensor]
    ) -> None:
        """Fills a master and its moments at ZeRO 0."""
        with torch.no_grad():
            master.copy_(weight)
        for moment, value in moments.items():
            self.optimizer.state[master][moment].copy_(value)

    def _load_local_part(
        self, p: Any, weight: torch.Tensor, moments: dict[str, torch.Tensor]
    ) -> None:
        """Fills this rank's partition at ZeRO 3.

        DeepSpeed's own function for whole tensors fails if the ranks do not divide the elements
        (0.19.8).
        """
        utils = self.deepspeed.utils
        utils.safe_set_local_fp32_param(p, self._local_part(p, weight))
        for moment, value in moments.items():
            utils.safe_set_local_optimizer_state(p, self._local_part(p, value), moment)

    def _load_full(self, p: Any, weight: torch.Tensor, moments: dict[str, torch.Tensor]) -> None:
        """Fills this rank's partition at ZeRO 1 and 2."""
        utils = self.deepspeed.utils
        utils.safe_set_full_fp32_param(p, weight.to(p.device))
        for moment, value in moments.items():
            utils.safe_set_full_optimizer_state(p, value.to(p.device), moment)

    def _local_part(self, p: Any, whole: torch.Tensor) -> torch.Tensor:
        """Returns this rank's partition of a whole tensor at ZeRO 3, padded with zeros."""
        flat = whole.flatten()
        size = p.ds_tensor.numel()
        padded = torch.cat([flat, flat.new_zeros(size * self.world - len(flat))])
        return padded.view(self.world, size)[self.optimizer.mesh.dp.index].to(p.device)

    @staticmethod
    def shape(p: torch.Tensor) -> torch.Size:
        """Returns the whole parameter's shape; ZeRO 3 replaces the parameter by an empty one."""
        return getattr(p, "ds_shape", p.shape)
