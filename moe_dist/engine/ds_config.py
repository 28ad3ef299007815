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
OF_THE_RUN = {  # keys of a DeepSpeed config that the run's config decides -> where
    "train_batch_size": "batch.samples",
    "train_micro_batch_size_per_gpu": "batch.samples, batch.accumulation and the mesh",
    "gradient_accumulation_steps": "batch.accumulation",
    "gradient_clipping": "optim.clip_norm",
    "optimizer": "optim",
    "scheduler": "optim",
}
EVERY, SHARDED = (0, 1, 2, 3), (1, 2, 3)
KEYS: dict[str, tuple[type, tuple[int, ...]]] = {  # that a file may have -> type, and the ZeRO stages that read it
    "bf16.enabled": (bool, EVERY),
    "fp16.enabled": (bool, EVERY),
    "zero_optimization.stage": (int, EVERY),
    "zero_optimization.overlap_comm": (bool, SHARDED),
    "zero_optimization.contiguous_gradients": (bool, SHARDED),
    "zero_optimization.reduce_scatter": (bool, SHARDED),
    "zero_optimization.reduce_bucket_size": (int, SHARDED),
    "zero_optimization.allgather_bucket_size": (int, (1, 2)),
    "zero_optimization.round_robin_gradients": (bool, (1, 2)),
    "zero_optimization.stage3_prefetch_bucket_size": (int, (3,)),
    "zero_optimization.stage3_max_live_parameters": (int, (3,)),
    "zero_optimization.stage3_max_reuse_distance": (int, (3,)),
    "zero_optimization.offload_optimizer.device": (str, SHARDED),
    "zero_optimization.offload_optimizer.pin_memory": (bool, SHARDED),
    "comms_logger.enabled": (bool, EVERY),
    "comms_logger.verbose": (bool, EVERY),
    "comms_logger.prof_all": (bool, EVERY),
    "comms_logger.debug": (bool, EVERY),
    "flops_profiler.enabled": (bool, EVERY),
    "flops_profiler.profile_step": (int, EVERY),
    "flops_profiler.module_depth": (int, EVERY),
    "flops_profiler.top_modules": (int, EVERY),
    "flops_profiler.detailed": (bool, EVERY),
    "wall_clock_breakdown": (bool, EVERY),
    "memory_breakdown": (bool, EVERY),
    "dump_state": (bool, EVERY),
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
        ds = json.loads((DS_CONFIGS / f"{config.ds_config}.json").read_text(), object_pairs_hook=_without_twins)
        if not isinstance(ds, dict):
            raise ValueError(f"{ds!r}, expected an object")
        given = dict(_flat(ds))
        for key, value in given.items():
            _check_key(key, value)
    except (ValueError, OSError) as error:
        raise ValueError(f"{file}: {error}") from None
    if ds.get("fp16", {}).get("enabled"):
        raise ValueError(f"{file}: fp16 is not supported; use bf16 or fp32")
    stage = ds.get("zero_optimization", {}).get("stage", 0) if config.zero is None else config.zero
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"zero={stage}: a ZeRO stage is 0, 1, 2 or 3")
    for key in given:
        if stage not in KEYS[key][1]:
            stages = ", ".join(map(str, KEYS[key][1]))
            raise ValueError(f"{file}: {key} is read at ZeRO {stages}, not at zero={stage}; give another file or stage")
    ds["zero_optimization"] = ds.get("zero_optimization", {}) | {"stage": stage}
    return ds


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for key, times in Counter(key for key, _ in pairs).items():
        if times > 1:
            raise ValueError(f"{key!r} is given {times} times")
    return dict(pairs)


def _flat(ds: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of a file, no deeper than `KEYS` goes."""
    for key, value in ds.items():
        inside = any(known.startswith(f"{prefix}{key}.") for known in KEYS)
        if inside and not isinstance(value, dict):
            raise ValueError(f"{prefix + key!r} is {value!r}, expected an object")
        yield from _flat(value, f"{prefix}{key}.") if inside else [(prefix + key, value)]


def _check_key(key: str, value: Any) -> None:
    if key in OF_THE_RUN:
        raise ValueError(f"{key!r} is set by {OF_THE_RUN[key]} of the run's config; remove it")
    if key not in KEYS:
        section, dot, name = key.rpartition(".")
        siblings = {
            known.removeprefix(section + dot).split(".")[0] for known in KEYS if known.startswith(section + dot)
        }
        raise ValueError(f"unknown key {key!r}; {nearest(name, siblings)}")
    kind = KEYS[key][0]
    whole = isinstance(value, float) and value.is_integer()  # 5e8, as JSON has large numbers
    if type(value) is not kind and not (kind is int and whole):
        raise ValueError(f"{key!r} is {value!r}, expected {kind.__name__}")
    if key.endswith("offload_optimizer.device") and value != "cpu":
        raise ValueError(f"{key!r} is {value!r}; 'cpu', or leave it out")


def compute_dtype(ds: dict[str, Any]) -> torch.dtype:
    """Of parameters and activations."""
    return torch.bfloat16 if ds.get("bf16", {}).get("enabled") else torch.float32
