"""A killed and resumed run is bit-identical on the same layout, and equal up to rounding on
another."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from paths import ROOT
from processes import check_plan
from runs import TINY, Run, tiny
from safetensors.torch import load_file

from moe_dist.checkpoint import manifest
from moe_dist.config.overrides import to_json
from moe_dist.distributed import mesh as meshes
from moe_dist.distributed.launch_env import world_size
from moe_dist.distributed.spawn import run_distributed

STAGES = [(ds, zero) for ds in ("fp32", "bf16") for zero in (0, 1, 2, 3)]


@pytest.mark.timeout(240)
def test_resume_is_bit_identical_at_every_stage_and_precision(
    small_text: Path, tmp_path: Path
) -> None:
    for same in run_distributed(interrupt, 2, str(small_text), tmp_path, timeout=220):
        assert same == {
            stage: {"losses": True, "norms": True, "weights": True, "stepped": True}
            for stage in STAGES
        }


def interrupt(text: str, folder: Path) -> dict[tuple[str, int], dict[str, bool]]:
    """Trains six steps without a break, and three, a checkpoint, and three more in a new run."""
    meshes.init_process_group()
    same = {}
    for ds, zero in STAGES:
        # an odd vocabulary: two ranks do not divide the elements of the softmax's bias
        sets = [
            "mesh.ep=2",
            f"data.text={text}",
            "batch.grad_accum_steps=2",
            "data.vocabulary_size=301",
        ]
        config = tiny(*sets, f"ds_config={ds}", f"zero_stage={zero}")
        whole = Run(config).steps(0, 6)
        first = Run(config).steps(0, 3)
        path = folder / f"{ds}{zero}"
        first.save(path, 3)
        second = Run(config)
        second.load(path)
        second.steps(3, 6)
        expected, got = whole.weights(), second.weights()
        same[ds, zero] = {
            "losses": first.losses + second.losses == whole.losses,
            "norms": first.norms + second.norms == whole.norms,
            "weights": all(torch.equal(expected[k], got[k]) for k in expected),
            "stepped": goes_back(whole, path, 3, 6),
        }
    meshes.shutdown()
    return same


def goes_back(run: Run, folder: Path, first: int, last: int) -> bool:
    """Loads the checkpoint of step `first` into the engine after step `last` and repeats the
    steps; returns whether they are the same."""
    losses, norms, weights = run.losses[first:last], run.norms[first:last], run.weights()
    run.load(folder)
    run.steps(first, last)
    again = run.weights()
    same = all(torch.equal(weights[k], again[k]) for k in weights)
    return same and run.losses[last:] == losses and run.norms[last:] == norms


@pytest.mark.timeout(200)
def test_loading_into_a_used_engine_restores_all_state(small_text: Path, tmp_path: Path) -> None:
    for same in run_distributed(step_and_go_back, 2, str(small_text), tmp_path, timeout=180):
        assert same == dict.fromkeys((0, 1, 2, 3), True)


def step_and_go_back(text: str, folder: Path) -> dict[int, bool]:
    """Uses Adam for experts, gates of groups and rows, with bf16 masters, by ZeRO stage."""
    meshes.init_process_group()
    same = {}
    for zero in (0, 1, 2, 3):
        sets = [
            "model.moe.num_groups=4",
            "optim.expert_optimizer=adam",
            "model.softmax_samples=40",
            "ds_config=bf16",
        ]
        run = Run(
            tiny(*sets, "mesh.ep=2", f"zero_stage={zero}", f"data.text={text}", "optim.lr=1e-2")
        ).steps(0, 2)
        run.save(folder / str(zero), 2)
        same[zero] = goes_back(run.steps(2, 5), folder / str(zero), 2, 5)
    meshes.shutdown()
    return same


@pytest.mark.timeout(200)
def test_skipped_step_is_not_counted_after_resume(small_text: Path, tmp_path: Path) -> None:
    for same in run_distributed(skip_and_resume, 2, str(small_text), tmp_path, timeout=180):
        assert same == [True] * 4


def skip_and_resume(text: str, folder: Path) -> list[bool]:
    """At each stage: a step with an infinite gradient, a checkpoint, and two more steps in a
    new run."""
    meshes.init_process_group()
    same = []
    for zero in (0, 1, 2, 3):
        config = tiny("mesh.ep=2", f"zero_stage={zero}", f"data.text={text}")
        whole = Run(config).steps(0, 2)
        handle = next(iter(whole.model.experts.values())).register_hook(lambda g: g * math.inf)
        whole.steps(2, 3)
        handle.remove()
        whole.save(folder / str(zero), 3)
        again = Run(config)
        again.load(folder / str(zero))
        assert again.optimizer.updates == 2
        expected, got = whole.steps(3, 5).weights(), again.steps(3, 5).weights()
        same.append(all(torch.equal(expected[k], got[k]) for k in expected))
    meshes.shutdown()
    return same


LAYOUTS = ((1, 1, 1), (2, 1, 3), (2, 2, 2), (4, 2, 1))  # world, ep, ZeRO


@pytest.mark.timeout(300)
def test_resume_on_any_other_layout_and_back(small_text: Path, tmp_path: Path) -> None:
    """From (4, 4, 2) to every other layout for 20 steps; from their checkpoints half way, 10
    more steps on (4, 4, 2)."""
    text = str(small_text)
    whole = run_distributed(save_and_go_on, 4, text, tmp_path / "first", timeout=100)[0]
    for world in (1, 2, 4):
        for layout, losses in run_distributed(go_on_from, world, text, tmp_path, timeout=100)[
            0
        ].items():
            assert losses == pytest.approx(whole, rel=1e-5), layout
    back = run_distributed(go_back, 4, text, tmp_path, timeout=100)[0]
    assert back == {layout: pytest.approx(whole[10:], rel=1e-5) for layout in LAYOUTS}


def on(layout: tuple[int, int, int], text: str) -> Run:
    _, ep, zero = layout
    return Run(tiny(f"mesh.ep={ep}", f"zero_stage={zero}", f"data.text={text}"))


def save_and_go_on(text: str, folder: Path) -> list[float]:
    meshes.init_process_group()
    run = on((4, 4, 2), text).steps(0, 5)
    run.save(folder, 5)
    run.steps(5, 25)
    meshes.shutdown()
    return run.losses[5:]


def go_on_from(text: str, folder: Path) -> dict[tuple[int, int, int], list[float]]:
    """Trains on every layout with the number of ranks that have joined."""
    meshes.init_process_group()
    losses = {}
    for layout in (each for each in LAYOUTS if each[0] == world_size()):
        run = on(layout, text)
        run.load(folder / "first")
        run.steps(5, 15)
        run.save(folder / str(layout), 15)
        losses[layout] = run.steps(15, 25).losses
    meshes.shutdown()
    return losses


def go_back(text: str, folder: Path) -> dict[tuple[int, int, int], list[float]]:
    meshes.init_process_group()
    losses = {}
    for layout in LAYOUTS:
        run = on((4, 4, 2), text)
        run.load(folder / str(layout))
        losses[layout] = run.steps(15, 25).losses
    meshes.shutdown()
    return losses


def command(*args: str) -> list[str]:
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    return [*launcher, str(ROOT / "train.py"), *args]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


# fast: test_resume_is_bit_identical_at_every_stage_and_precision, test_run_survives_a_killed_rank
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_killed_run_resumes_bit_identically(small_text: Path, tmp_path: Path) -> None:
    sets = [
        *TINY,
        "steps=90",
        "save_every=30",
        "eval_every=30",
        "log_every=1",
        f"data.text={small_text}",
        "mesh.ep=2",
    ]
    options = [part for s in sets for part in ("--set", s)]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(
        command("lstm_moe_demo", "--folder", str(whole), *options),
        env=environment(),
        check=True,
        timeout=100,
    )
    process = psutil.Popen(
        command("lstm_moe_demo", "--folder", str(killed), *options), env=environment()
    )
    try:
        deadline = time.monotonic() + 100
        while not manifest.folder(killed, 30).exists():
            assert time.monotonic() < deadline and process.poll() is None, (
                "no checkpoint of step 30"
            )
            time.sleep(0.01)
    finally:
        for each in [*process.children(recursive=True), process]:  # ranks outlive a killed launcher
            each.kill()
            each.wait(10)
    assert not manifest.folder(killed, 90).exists(), "killed in the middle"
    subprocess.run(command("--resume", str(killed)), env=environment(), check=True, timeout=100)

    def curves(run: Path) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        clock = {"throughput/tokens_per_sec", "throughput/tflops_per_device"}
        measured = ("time/", "memory/")  # of this machine, as is the clock
        return [
            {k: v for k, v in line.items() if k not in clock and not k.startswith(measured)}
            for line in lines
        ]

    assert curves(killed) == curves(whole)
    for shard in sorted(manifest.folder(whole, 90).glob("*.safetensors")):
        expected, got = load_file(shard), load_file(manifest.folder(killed, 90) / shard.name)
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[k], got[k]) for k in expected)


def test_resume_without_a_run_prints_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(to_json(tiny()))
    for folder in (tmp_path / "missing", tmp_path):
        check_plan(["--resume", str(folder)], str(folder), capsys)
