"""Run folders with metrics made up by hand."""

import json
from pathlib import Path
from typing import Any

from runs import tiny

from moe_dist.config.overrides import to_json

LAYOUT = {
    "config": "tiny",
    "world": 4,
    "nodes": 2,
    "ep": 2,
    "edp": 2,
    "zero_stage": 1,
    "dtype": "bf16",
    "global_batch_size": 8,
    "grad_accum_steps": 2,
    "samples_per_rank": 1,
    "parameters": 12345,
    "num_experts": 8,
    "experts_per_rank": 4,
    "experts_per_token": 2,
    "num_groups": None,
    "per_rank": {
        "parameters": 9876,
        "memory_bytes": {"dense parameters": 3_000_000, "activations": 500_000},
    },
}


def line(step: int, slow: float = 1.0) -> dict[str, Any]:
    """Returns a metrics line of a run on two nodes of two ranks, whose steps take 40 ms times
    `slow`."""
    parts = {"gate": 4.0, "dispatch": 8.0, "experts": 12.0, "optimizer": 6.0, "rest": 10.0}
    return {
        "step": step,
        "train/loss": 9 / step,
        "train/lr": 1e-3,
        "train/grad_norm": 1.5,
        "train/skipped_steps": 3,
        "throughput/tokens_per_sec": 1000.0 * step / slow,
        "throughput/tflops_per_device": 0.25,
        **{f"time/{part}_ms": ms * slow for part, ms in parts.items()},
        "memory/peak_bytes_by_rank": [1e9, 3e9, 2e9, 1.5e9],
        "memory/max_peak_bytes": 3e9,
        "comm/middle/dispatch/intra_node_bytes": 1e6 * step,
        "comm/middle/dispatch/inter_node_bytes": 3e6 * step,
        "comm/experts/gradients/intra_node_bytes": 0.5e6,
        "moe/middle/tokens_per_expert": [4.0 * step, 0.0, 2.0, 2.0, 1.0, 1.0, 3.0, 3.0],
        "moe/middle/importance_per_expert": [1.0] * 8,
        "moe/middle/load_max_over_mean": 2.5,
        "moe/middle/dead_experts": 1,
        "moe/middle/drop_rate": 0.125,
        "moe/middle/load_cv": 0.4,
        "moe/middle/importance_cv": 0.1,
        **{f"moe/middle/load_p{p}_over_mean": p / 50 for p in (10, 50, 90)},
    }


def a_run(run: Path, slow: float = 1.0, config: str = to_json(tiny())) -> Path:
    lines = [line(step, slow) for step in range(1, 6)]
    lines += [
        {"step": 5, "valid/loss": 2.5, "valid/perplexity": 12.1825},
        {"step": 5, "test/loss": 2.75},
    ]
    run.mkdir()
    (run / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    (run / "config.json").write_text(config)
    (run / "layout.json").write_text(json.dumps(LAYOUT))
    return run
