"""DeepSpeed itself: the keys that ds_configs/ may have, offloading, and the quoting of its
launcher."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from runs import Run, tiny

from moe_dist.distributed import mesh as meshes
from moe_dist.distributed.spawn import run_distributed
from moe_dist.engine.deepspeed import import_deepspeed
from moe_dist.engine.ds_config import ALLOWED_KEYS

SAME = (
    ("offload", 1, "bf16"),
    ("offload", 2, "zero2"),
    ("offload", 3, "zero3"),
)  # where the state lies, no more


def test_deepspeed_defines_every_allowed_key() -> None:
    """Checks the sections that DeepSpeed reads with classes; these classes forbid unknown keys."""
    import_deepspeed()
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig

    classes = {
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "comms_logger": CommsLoggerConfig,
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
    }
    checked = 0
    for key in ALLOWED_KEYS:
        section, _, name = key.rpartition(".")
        if section in classes:
            fields = classes[section].model_fields
            assert name in {*fields, *(field.alias for field in fields.values())}, key
            checked += 1
    assert checked > 15


@pytest.mark.timeout(150)
def test_offloaded_state_changes_nothing(small_text: Path) -> None:
    for losses in run_distributed(train, 2, str(small_text), timeout=120):
        for stage, (offloaded, here) in losses.items():
            assert offloaded == here and len(here) == 4, stage


def train(text: str) -> dict[int, tuple[list[float], list[float]]]:
    meshes.init_process_group()
    told = {}
    for offload, stage, other in SAME:
        runs = [
            Run(
                tiny(
                    f"ds_config={name}",
                    f"zero_stage={stage}",
                    "mesh.ep=2",
                    f"data.text={text}",
                    "optim.lr=1e-3",
                )
            )
            for name in (offload, other)
        ]
        told[stage] = (runs[0].steps(0, 4).losses, runs[1].steps(0, 4).losses)
    meshes.shutdown()
    return told


def test_deepspeed_quotes_arguments_as_the_launch_script_expects() -> None:
    """DeepSpeed puts a word with a space between double quotes and leaves others;
    launch/deepspeed.sh quotes the rest."""
    import_deepspeed()
    from deepspeed.launcher.multinode_runner import PDSHRunner

    words = [
        "a b",
        'a "b"',
        "a\\ b",
        "$x y",
        "plain",
        'a"b',
        "a'b",
        "$x",
        "a\\b",
        "*",
        "%h",
        "a\nb",
        "",
    ]
    runner = PDSHRunner(SimpleNamespace(user_args=words, user_script="env"), "")
    assert runner.user_arguments == ['"a b"', '"a \\"b\\""', '"a\\ b"', '"$x y"', *words[4:]]
