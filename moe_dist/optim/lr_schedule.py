"""Learning rate schedules."""

import math

from moe_dist.config.schema import OptimConfig


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Computes the learning rate of one optimizer step; `Optimizer.start_step` sets it.

    The rate rises linearly during warm-up. Then it falls with 1/sqrt(step) (Shazeer et al. 2017,
    Appendix C.1) or as half a cosine wave to 0 (Xue et al. 2021).

    Args:
        config: Peak rate, warm-up steps and schedule.
        step: The step's number, from 1.
        steps: Steps in the run.

    Returns:
        The learning rate.
    """
    warmup = max(1, config.warmup_steps)
    if step < warmup:
        return config.lr * step / warmup
    if config.schedule == "rsqrt":
        return config.lr * (warmup / step) ** 0.5
    return config.lr * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2
