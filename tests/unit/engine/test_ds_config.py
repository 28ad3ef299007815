"""The files of ds_configs/."""

import pytest
from runs import tiny

from moe_dist.engine.ds_config import DS_CONFIGS, read_ds_config

NAMES = sorted(path.stem for path in DS_CONFIGS.glob("*.json"))


@pytest.mark.parametrize("name", NAMES)
def test_each_ds_config_is_accepted_and_described(name: str) -> None:
    assert read_ds_config(tiny(f"ds_config={name}"))["zero_optimization"]["stage"] in (1, 2, 3)
    assert f"| `{name}` |" in (DS_CONFIGS / "README.md").read_text()
