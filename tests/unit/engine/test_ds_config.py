"""The files of ds_configs/."""

from pathlib import Path

import pytest
from runs import tiny

from moe_dist.engine.ds_config import DS_CONFIGS, read_ds_config

NAMES = sorted(path.stem for path in DS_CONFIGS.glob("*.json"))


@pytest.mark.parametrize("name", NAMES)
def test_each_ds_config_is_accepted_and_described(name: str) -> None:
    assert read_ds_config(tiny(f"ds_config={name}"))["zero_optimization"]["stage"] in (1, 2, 3)
    assert f"| `{name}` |" in (DS_CONFIGS / "README.md").read_text()


def test_path_of_an_own_file_is_accepted(tmp_path: Path) -> None:
    own = tmp_path / "mine.json"
    own.write_text('{"bf16": {"enabled": true}, "zero_optimization": {"stage": 2}}')
    assert read_ds_config(tiny(f"ds_config={own}"))["zero_optimization"]["stage"] == 2
    own.write_text('{"fp16": {"enabled": true}}')
    with pytest.raises(ValueError, match=rf"^{own}: fp16 is not supported"):
        read_ds_config(tiny(f"ds_config={own}"))


def test_unknown_file_is_named(tmp_path: Path) -> None:
    absent = tmp_path / "absent.json"
    with pytest.raises(ValueError, match=f"ds_config='{absent}': no such file"):
        read_ds_config(tiny(f"ds_config={absent}"))
    with pytest.raises(
        ValueError, match="ds_config='bf61': no such file in ds_configs/; did you mean"
    ):
        read_ds_config(tiny("ds_config=bf61"))
