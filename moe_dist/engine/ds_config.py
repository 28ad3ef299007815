"""Reads and checks a DeepSpeed config: precision, ZeRO stage and DeepSpeed's own options.

Keys that DeepSpeed would ignore are errors. Batch sizes, clipping and the optimizer belong to the
run's config.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from moe_dist.config.messages import nearest
from moe_dist.config.schema import Config

# a link to ds_configs/ at the top of the repository; a wheel contains its files
DS_CONFIGS = Path(__file__).parent / "ds_configs"
# DeepSpeed config key -> the run config's field that sets it
RUN_CONFIG_KEYS = {
    "train_batch_size": "batch.global_batch_size",
    "train_micro_batch_size_per_gpu": (
        "batch.global_batch_size, batch.grad_accum_steps and the mesh"
    ),
    "gradient_accumulation_steps": "batch.grad_accum_steps",
    "gradient_clipping": "optim.max_grad_norm",
    "optimizer": "optim",
    "scheduler": "optim",
}
ALL_STAGES = (0, 1, 2, 3)
SHARDED_STAGES = (1, 2, 3)
# allowed key -> type, and the ZeRO stages at which DeepSpeed reads it
ALLOWED_KEYS: dict[str, tuple[type, tuple[int, ...]]] = {
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
    """Reads a run's DeepSpeed config.

    Args:
        config: `ds_config` is a name in ds_configs/ or a path that ends with ".json"; `zero_stage`
            replaces the file's stage unless it is None.

    Returns:
        The file's keys, with the stage.

    Raises:
        ValueError: The name is unknown; the file is no JSON object; a key is unknown, given twice,
            not read at this ZeRO stage, or set by the run's config; fp16 is enabled; or the stage
            is not in 0..3.
    """
    path = _find_file(config.ds_config)
    is_own = path.parent != DS_CONFIGS
    file = config.ds_config if is_own else f"ds_configs/{path.name}"
    try:
        ds = _read_object(path)
        values = dict(_flatten(ds))
        for key, value in values.items():
            _check_key(key, value)
    except (ValueError, OSError) as error:
        raise ValueError(f"{file}: {error}") from None
    if ds.get("fp16", {}).get("enabled"):
        raise ValueError(f"{file}: fp16 is not supported; use bf16 or fp32")
    stage = config.zero_stage
    if stage is None:
        stage = ds.get("zero_optimization", {}).get("stage", 0)
    if stage not in ALL_STAGES:
        raise ValueError(f"zero_stage={stage}: a ZeRO stage is 0, 1, 2 or 3")
    for key in values:
        _, stages = ALLOWED_KEYS[key]
        if stage not in stages:
            raise ValueError(
                f"{file}: {key} is read at ZeRO {', '.join(map(str, stages))}, not at "
                f"zero_stage={stage}; "
                "use another file or stage"
            )
    ds["zero_optimization"] = ds.get("zero_optimization", {}) | {"stage": stage}
    return ds


def _find_file(name: str) -> Path:
    """Returns the path of a DeepSpeed config: a name in ds_configs/, or a path to a .json file."""
    if name.endswith(".json"):
        if not Path(name).is_file():
            raise ValueError(
                f"ds_config={name!r}: no such file; give a name in ds_configs/ or a path"
            )
        return Path(name)
    names = [path.stem for path in DS_CONFIGS.glob("*.json")]
    if name not in names:
        raise ValueError(f"ds_config={name!r}: no such file in ds_configs/; {nearest(name, names)}")
    return DS_CONFIGS / f"{name}.json"


def _read_object(path: Path) -> dict[str, Any]:
    """Returns a file's JSON object. Raises ValueError for anything else or a repeated key."""
    ds = json.loads(path.read_text(), object_pairs_hook=_reject_duplicates)
    if not isinstance(ds, dict):
        raise ValueError(f"{ds!r}, expected an object")
    return ds


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the pairs as a dictionary. Raises ValueError for a repeated key."""
    for key, count in Counter(key for key, _ in pairs).items():
        if count > 1:
            raise ValueError(f"{key!r} is given {count} times")
    return dict(pairs)


def _flatten(ds: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields a file's dotted keys and values, no deeper than the keys in `ALLOWED_KEYS`."""
    for key, value in ds.items():
        is_section = any(allowed.startswith(f"{prefix}{key}.") for allowed in ALLOWED_KEYS)
        if not is_section:
            yield prefix + key, value
        elif isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            raise ValueError(f"{prefix + key!r} is {value!r}, expected an object")


def _check_key(key: str, value: Any) -> None:
    """Raises ValueError for a key not allowed in the file, or a value of another type."""
    if key in RUN_CONFIG_KEYS:
        raise ValueError(f"{key!r} is set by {RUN_CONFIG_KEYS[key]} of the run's config; remove it")
    if key not in ALLOWED_KEYS:
        section, dot, name = key.rpartition(".")
        prefix = section + dot
        siblings = set()
        for allowed in ALLOWED_KEYS:
            if allowed.startswith(prefix):
                siblings.add(allowed.removeprefix(prefix).split(".")[0])
        raise ValueError(f"unknown key {key!r}; {nearest(name, siblings)}")
    expected, _ = ALLOWED_KEYS[key]
    is_whole = isinstance(value, float) and value.is_integer()  # such as 5e8, JSON's large numbers
    if type(value) is not expected and not (expected is int and is_whole):
        raise ValueError(f"{key!r} is {value!r}, expected {expected.__name__}")
    if key.endswith("offload_optimizer.device") and value != "cpu":
        raise ValueError(f"{key!r} is {value!r}; use 'cpu', or leave it out")


def compute_dtype(ds: dict[str, Any]) -> torch.dtype:
    """Returns the dtype for parameters and activations."""
    return torch.bfloat16 if ds.get("bf16", {}).get("enabled") else torch.float32
