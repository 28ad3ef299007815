"""The learning rate by step."""

import dataclasses

import pytest

from moe_dist.config.schema import OptimConfig
from moe_dist.optim.lr_schedule import learning_rate


def test_schedule_by_hand() -> None:
    # warm-up of 4 steps to 8, then 8 sqrt(4 / step): step 16 -> 4
    config = OptimConfig(lr=8.0, warmup_steps=4)
    assert [learning_rate(config, s, 16) for s in (1, 2, 4, 16)] == [2.0, 4.0, 8.0, 4.0]
    # then 8 (1 + cos(pi (step - 4) / (20 - 4))) / 2: a quarter, half and all of the way
    cosine = dataclasses.replace(config, schedule="cosine")
    told = [learning_rate(cosine, s, 20) for s in (2, 4, 8, 12, 20)]
    assert told == pytest.approx([4.0, 8.0, 4 * (1 + 0.5**0.5), 4.0, 0.0], abs=1e-12)
