"""Learning rate schedules."""

import math

from moe_dist.config.schema import OptimConfig


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Of optimizer step `step` of `steps` (from 1): linear warm-up, then falling with 1/sqrt(step) (Shazeer et al.
    2017, Appendix C.1) or as half a cosine wave to 0 (Xue et al. 2021)."""
    warmup = max(1, config.warmup_steps)
    if step < warmup:
        return config.lr * step / warmup
    if config.schedule == "rsqrt":
        return config.lr * (warmup / step) ** 0.5
    return config.lr * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2
