"""Reads and checks a DeepSpeed config of ds_configs/."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from moe_dist.config.messages import nearest
from moe_dist.config.schema import Config

DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
RUN_CONFIG_KEYS = {  # keys of a DeepSpeed config that the run's config decides -> where
    "train_batch_size": "batch.global_batch_size",
    "train_micro_batch_size_per_gpu": "batch.global_batch_size, batch.grad_accum_steps and the mesh",
    "gradient_accumulation_steps": "batch.grad_accum_steps",
    "gradient_clipping": "optim.max_grad_norm",
    "optimizer": "optim",
    "scheduler": "optim",
}
ALL_STAGES, SHARDED_STAGES = (0, 1, 2, 3), (1, 2, 3)
ALLOWED_KEYS: dict[
    str, tuple[type, tuple[int, ...]]
] = {  # that a file may have -> type, and the ZeRO stages that read it
    "bf16.enabled": (bool, ALL_STAGES),
    "fp16.enabled": (bool, ALL_STAGES),
    "zero_optimization.stage": (int, ALL_STAGES),
    "zero_optimization.overlap_comm": (bool, SHARDED_STAGES),
    "zero_optimization.contiguous_gradients": (bool, SHARDED_STAGES),
    "zero_optimization.reduce_scatter": (bool, SHARDED_STAGES),
    "zero_optimization.reduce_bucket_size": (int, SHARDED_STAGES),
    "zero_optimization.allgather_bucket_size": (int, (1, 2)),
    "zero_optimization.round_robin_gradients": (bool, (1, 2)),
    "zero_optimization.stage3_prefetch_bucket_size": (int, (3,)),
    "zero_optimization.stage3_max_live_parameters": (int, (3,)),
    "zero_optimization.stage3_max_reuse_distance": (int, (3,)),
    "zero_optimization.offload_optimizer.device": (str, SHARDED_STAGES),
    "zero_optimization.offload_optimizer.pin_memory": (bool, SHARDED_STAGES),
    "comms_logger.enabled": (bool, ALL_STAGES),
    "comms_logger.verbose": (bool, ALL_STAGES),
    "comms_logger.prof_all": (bool, ALL_STAGES),
    "comms_logger.debug": (bool, ALL_STAGES),
    "flops_profiler.enabled": (bool, ALL_STAGES),
    "flops_profiler.profile_step": (int, ALL_STAGES),
    "flops_profiler.module_depth": (int, ALL_STAGES),
    "flops_profiler.top_modules": (int, ALL_STAGES),
    "flops_profiler.detailed": (bool, ALL_STAGES),
    "wall_clock_breakdown": (bool, ALL_STAGES),
    "memory_breakdown": (bool, ALL_STAGES),
    "dump_state": (bool, ALL_STAGES),
}


def read_ds_config(config: Config) -> dict[str, Any]:
    """The file that `config.ds_config` names, with the stage that `config.zero` asks for.

    Raises ValueError for an unknown name, a file that is no JSON object, a key that DeepSpeed would ignore (unknown,
    twice there, or not read at the run's ZeRO stage) or that contradicts the config, fp16, or a stage not in 0..3.
    """
    names = [path.stem for path in DS_CONFIGS.glob("*.json")]
    if config.ds_config not in names:
        raise ValueError(
            f"ds_config={config.ds_config!r}: no such file in ds_configs/; {nearest(config.ds_config, names)}"
        )
    file = f"ds_configs/{config.ds_config}.json"
    try:
        ds = json.loads(
            (DS_CONFIGS / f"{config.ds_config}.json").read_text(), object_pairs_hook=_without_twins
        )
        if not isinstance(ds, dict):
            raise ValueError(f"{ds!r}, expected an object")
        given = dict(_flat(ds))
        for key, value in given.items():
            _check_key(key, value)
    except (ValueError, OSError) as error:
        raise ValueError(f"{file}: {error}") from None
    if ds.get("fp16", {}).get("enabled"):
        raise ValueError(f"{file}: fp16 is not supported; use bf16 or fp32")
    stage = (
        ds.get("zero_optimization", {}).get("stage", 0)
        if config.zero_stage is None
        else config.zero_stage
    )
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"zero_stage={stage}: a ZeRO stage is 0, 1, 2 or 3")
    for key in given:
        if stage not in ALLOWED_KEYS[key][1]:
            stages = ", ".join(map(str, ALLOWED_KEYS[key][1]))
            raise ValueError(
                f"{file}: {key} is read at ZeRO {stages}, not at zero_stage={stage}; give another file or stage"
            )
    ds["zero_optimization"] = ds.get("zero_optimization", {}) | {"stage": stage}
    return ds


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for key, times in Counter(key for key, _ in pairs).items():
        if times > 1:
            raise ValueError(f"{key!r} is given {times} times")
    return dict(pairs)


def _flat(ds: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of a file, no deeper than `ALLOWED_KEYS` goes."""
    for key, value in ds.items():
        inside = any(known.startswith(f"{prefix}{key}.") for known in ALLOWED_KEYS)
        if inside and not isinstance(value, dict):
            raise ValueError(f"{prefix + key!r} is {value!r}, expected an object")
        yield from _flat(value, f"{prefix}{key}.") if inside else [(prefix + key, value)]


def _check_key(key: str, value: Any) -> None:
    if key in RUN_CONFIG_KEYS:
        raise ValueError(f"{key!r} is set by {RUN_CONFIG_KEYS[key]} of the run's config; remove it")
    if key not in ALLOWED_KEYS:
        section, dot, name = key.rpartition(".")
        siblings = {
            known.removeprefix(section + dot).split(".")[0]
            for known in ALLOWED_KEYS
            if known.startswith(section + dot)
        }
        raise ValueError(f"unknown key {key!r}; {nearest(name, siblings)}")
    kind = ALLOWED_KEYS[key][0]
    whole = isinstance(value, float) and value.is_integer()  # 5e8, as JSON has large numbers
    if type(value) is not kind and not (kind is int and whole):
        raise ValueError(f"{key!r} is {value!r}, expected {kind.__name__}")
    if key.endswith("offload_optimizer.device") and value != "cpu":
        raise ValueError(f"{key!r} is {value!r}; 'cpu', or leave it out")


def compute_dtype(ds: dict[str, Any]) -> torch.dtype:
    """Of parameters and activations."""
    return torch.bfloat16 if ds.get("bf16", {}).get("enabled") else torch.float32
