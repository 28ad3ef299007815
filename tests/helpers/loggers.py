"""A metrics logger of a made-up run, and the warnings that it prints."""

import pathlib

from moe_dist.monitoring.metrics_logger import MetricsLogger

CONFIG = {"experts": 4, "lr": 0.5, "data": {"name": "tiny"}}


def make(run: pathlib.Path, **options) -> MetricsLogger:
    return MetricsLogger(
        run, CONFIG, **{"enabled": True, "wandb_mode": "off", "total_steps": 10} | options
    )


def warnings_in(err: str) -> list[str]:
    return [
        line
        for line in err.splitlines()
        if not line.startswith(("step ", "note: nobody is logged in to wandb"))
    ]
