"""Ranks that stop, die, are late or compute NaN: what the other ranks report, and how the run ends."""

import dataclasses
import math
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import end, set_, start
from runs import TINY, Run, tiny

from experiments import faults
from experiments.elastic import losses
from moe_dist.checkpoint.manifest import list_checkpoints
from moe_dist.config.overrides import override
from moe_dist.distributed import flight_recorder, launch_env, rendezvous_port
from moe_dist.distributed import mesh as meshes
from moe_dist.distributed.record_file import RECORD_WIDTH
from moe_dist.distributed.spawn import run_distributed
from moe_dist.monitoring.metrics_file import read_metrics
from moe_dist.training import fault_injection
from moe_dist.training.step import train_step


def two_ranks(folder: Path, text: Path, *sets: str) -> list[subprocess.Popen[str]]:
    """Starts the two ranks of a run by hand, with a fault of rank 1 in step 3."""
    world = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(rendezvous_port.find_free_port()),
    }
    fault = ("fault_injection.rank=1", "fault_injection.step=3", *sets)
    sets = (*TINY, "steps=6", "save_every=2", "mesh.ep=2", f"data.text={text}", *fault)
    return [
        start(
            "lstm_moe_demo",
            "--folder",
            str(folder),
            *set_(*sets),
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            **world,
        )
        for rank in range(2)
    ]


def told(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    """Returns (status, warnings and errors)."""
    status, stderr = end(process)
    return status, [line for line in stderr.splitlines() if line.startswith(("warning", "error"))]


@pytest.mark.timeout(120)
def test_stopped_rank_is_named_with_layer_direction_and_rows(
    small_text: Path, tmp_path: Path
) -> None:
    """The other rank ends within the timeout and 5 seconds; its record has the call and the
    time that it waited."""
    run = tmp_path / "run"
    other, stopped = two_ranks(
        run,
        small_text,
        "fault_injection.fault=stop",
        "fault_injection.phase=dispatch",
        "mesh.timeout_s=4",
    )
    try:
        status, (warning, error) = told(other)
    finally:
        stopped.kill()
        stopped.communicate()
    assert status == 1
    named = re.compile(
        r"(?:warning|error on rank 0): has waited for (\d+) s in dispatch of middle \(layer call 2\), step 3: "
        rf"rank 1 \((\d+) rows to it, (\d+) from it\): stopped or dead \(see {run}/calls\)"
    )
    (after, _, _), (waited, out, back) = (
        map(int, named.fullmatch(line).groups()) for line in (warning, error)
    )  # type: ignore[union-attr]
    assert 2 <= after < 4 <= waited <= 4 + 5
    mine, theirs = ((run / "calls" / f"rank0000{rank}.txt").read_text() for rank in range(2))
    assert {len(line) for line in mine.splitlines()} == {
        RECORD_WIDTH - 1
    } and ", ended, in forward" in mine
    # 4 lanes x 6 words x 2 experts = 48 rows of each rank
    # rows and their weights are on their way, as many of each
    calls = re.findall(
        r"dispatch of middle .layer call 2., step 3, (\d+) rows out, (\d+) in: begun", mine
    )
    ((mine_out, mine_in),) = set(calls)
    assert (
        mine_out == "48" and int(mine_in) == 48 - out + back
    )  # rows to itself, and from the stopped one
    assert (
        "counts of middle (layer call 2), step 3" in theirs
        and "dispatch of middle (layer call 2), step 3" not in theirs
    )
    assert read_metrics(run)[-1]["step"] == 2 and [path.name for path in list_checkpoints(run)] == [
        "step_00000002"
    ]


@pytest.mark.timeout(120)
def test_dead_rank_is_named_at_once(small_text: Path, tmp_path: Path) -> None:
    other, dead = two_ranks(
        tmp_path,
        small_text,
        "fault_injection.fault=kill",
        "fault_injection.phase=forward",
        "mesh.timeout_s=600",
    )
    status, (error,) = told(other)
    assert status == 1 and dead.wait() == -9 and dead.communicate()
    where = r"lost another rank in counts of middle \(layer call 2\), step 3: rank 1: stopped or dead \(see .*/calls\): \w"
    assert re.match(f"error on rank 0: {where}", error), error


@pytest.mark.slow  # fast: test_late_rank_in_a_deepspeed_collective_is_named
@pytest.mark.timeout(120)
def test_late_rank_is_reported_and_changes_nothing(small_text: Path, tmp_path: Path) -> None:
    """A living rank is not reported as dead, and its delay does not change the losses."""
    late = (
        "fault_injection.fault=delay",
        "fault_injection.phase=forward",
        "fault_injection.seconds=5",
        "mesh.timeout_s=6",
    )
    statuses, warnings = zip(
        *map(told, two_ranks(tmp_path / "late", small_text, *late)), strict=True
    )
    assert statuses == (0, 0)
    (warning,) = [line for line in warnings[0] if "waited" in line]
    assert " in counts of middle (layer call 2), step 3: rank 1, late in forward (see" in warning
    (whole,) = run_distributed(unbroken, 1, "steps=6", f"data.text={small_text}")
    assert list(losses(tmp_path / "late").values()) == pytest.approx(whole, abs=1e-5)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("zero", [0, 3])
def test_late_rank_in_a_deepspeed_collective_is_named(
    zero: int, small_text: Path, tmp_path: Path
) -> None:
    """At ep 1 only DeepSpeed makes the two ranks wait for each other."""
    late = (
        "mesh.ep=1",
        f"zero_stage={zero}",
        "fault_injection.fault=delay",
        "fault_injection.phase=backward",
        "fault_injection.seconds=60",
    )
    other, slow = two_ranks(tmp_path, small_text, *late, "mesh.timeout_s=4")
    try:
        status, (_, error) = told(other)
    finally:
        slow.kill()
        slow.communicate()
    named = r"error on rank 0: has waited for \d s in [a-z_]+ of DeepSpeed, step 3: rank 1, late in backward \(see"
    assert status == 1 and re.match(named, error), error


def unbroken(*sets: str) -> list[float]:
    """Returns the losses of an uninterrupted run."""
    meshes.init_process_group()
    config = tiny(*sets)
    return Run(config).steps(0, config.steps).losses


@pytest.mark.timeout(120)
def test_nan_is_skipped_and_reported_with_its_layer(small_text: Path, tmp_path: Path) -> None:
    """On one rank and on two: NaN in an activation, in a gradient, in the weights' gradients,
    and too many in a row, which end the run."""
    for world in (1, 2):
        for seen in run_distributed(
            not_a_number, world, str(small_text), tmp_path / str(world), timeout=100
        ):
            rank = world - 1
            assert seen == {
                "input": f"step 2: the output of lstm1 is not finite (rank {rank})",
                "gradient": "step 4: the gradient of lstm2's output is not finite (rank 0)",
                "weights": "step 5: a gradient of weights is not finite, though the outputs of all layers are",
                "updates": 5 - 3,
                "unchanged": True,
                "then": True,
                "end": "step 9: a gradient of weights is not finite, though the outputs of all layers are; 3 steps in a "
                "row",
            }


def not_a_number(text: str, folder: Path) -> dict[str, Any]:
    meshes.init_process_group()
    folder.mkdir(exist_ok=True)
    rank = launch_env.world_size() - 1
    sets = (
        "fault_injection.fault=nan",
        f"fault_injection.rank={rank}",
        "fault_injection.step=2",
        "optim.max_consecutive_skipped_steps=3",
        f"data.text={text}",
    )
    run = Run(tiny(f"mesh.ep={rank + 1}", *sets))
    fault_injection.inject(run.training, folder)
    seen: dict[str, Any] = {}
    before = run.steps(0, 1).weights()
    run.steps(1, 2)
    seen["input"] = run.training.nan_detector.read_and_reset()["train/nonfinite_source"]
    seen["unchanged"] = all(torch.equal(before[key], t) for key, t in run.weights().items())
    run.steps(2, 3)
    assert run.training.nan_detector.read_and_reset() == {} and all(
        map(math.isfinite, [*run.losses[2:], run.norms[2]])
    )

    def spoil(module: Any, args: Any, y: Any) -> None:
        if meshes.dist.get_rank() == 0:
            y[0].register_hook(lambda g: g * math.inf)

    handle = dict(run.model.module.named_modules())["lstm2"].register_forward_hook(
        spoil, prepend=True
    )
    run.steps(3, 4)
    handle.remove()
    seen["gradient"] = run.training.nan_detector.read_and_reset()["train/nonfinite_source"]
    experts = next(iter(run.model.experts.values()))
    handle = experts.register_hook(lambda g: g * math.inf)
    run.steps(4, 5)
    seen["weights"] = run.training.nan_detector.read_and_reset()["train/nonfinite_source"]
    seen["updates"] = run.optimizer.updates
    handle.remove()
    run.steps(5, 6)
    seen["then"] = run.training.nan_detector.skipped == 0
    experts.register_hook(lambda g: g * math.inf)
    try:
        run.steps(6, 20)
    except FloatingPointError as error:
        seen["end"] = str(error).partition(" were skipped")[0]
    meshes.shutdown()
    return seen


@pytest.mark.timeout(120)
def test_extreme_routings_train_on_any_layout(small_text: Path) -> None:
    """All tokens to one expert, ranks that send nothing, a rank whose experts get nothing: the
    same losses with experts spread over two ranks or not, with chunks, and with deduplicated
    dispatch."""
    for kind in ("one_expert", "ragged"):
        plain, *others = run_distributed(spread_and_not, 2, str(small_text), kind, timeout=100)[0]
        assert len(set(plain[0])) == 3  # it trains
        for each in others:
            assert each[0] == pytest.approx(plain[0], abs=1e-6)
            assert each[1] == plain[1]
    ((_, load), *_) = run_distributed(
        spread_and_not, 2, str(small_text), "empty_rank", timeout=100
    )[0][1:]
    assert min(load[:4]) > 0 and load[4:] == [0] * 4


def spread_and_not(text: str, kind: str) -> list[tuple[list[float], list[int]]]:
    """Returns (losses, load of the last step) at ep 1, and at ep 2 with each dispatcher."""
    meshes.init_process_group()
    found_ = []
    for sets in (
        ["mesh.ep=1"],
        ["mesh.ep=2"],
        ["mesh.ep=2", "mesh.overlap_chunks=2"],
        ["mesh.ep=2", "mesh.dispatcher=dedup_rank"],
    ):
        run = Run(tiny(*sets, f"fault_injection.routing={kind}", f"data.text={text}"))
        fault_injection.inject(run.training, Path("nowhere"))
        run.steps(0, 2)
        sums: Any = 0
        for _, values, stats in train_step(run.training, 3):
            sums = values["nll"] / values["tokens"] + sums
            load_E = stats["middle"].load_E
        run.losses.append(sums.item())
        meshes.dist.all_reduce(load_E)
        found_.append((run.losses, load_E.tolist()))
    meshes.shutdown()
    return found_


@pytest.mark.timeout(120)
def test_impossible_faults_are_rejected(small_text: Path, tmp_path: Path) -> None:
    """A fault that never happens looks like one that was survived. The run has 30 steps in one
    process without torchrun."""
    assert run_distributed(refusals, 1, str(small_text), tmp_path) == [
        [
            "fault_injection.rank=1: use 0 to 0",
            "fault_injection.step=31: the run has 30 steps",
            "fault_injection.phase='dispatch': one expert-parallel rank dispatches nothing; set "
            "mesh.ep to 2 or "
            "more",
            "fault_injection.step=3: a checkpoint is saved at multiples of save_every=2",
            "fault_injection.step=3: evaluations are at multiples of eval_every=2",
            "fault_injection.step=3: fault_injection.phase='report' follows the last step, 30",
            "fault_injection.fault='kill_agent': this process has no agent; start it with torchrun",
        ]
    ]


def refusals(text: str, folder: Path) -> list[str]:
    meshes.init_process_group()
    sets = [
        "fault_injection.rank=1",
        "fault_injection.step=31",
        "fault_injection.phase=dispatch",
        "fault_injection.phase=save",
        "fault_injection.phase=evaluation",
    ]
    sets += ["fault_injection.phase=report", "fault_injection.fault=kill_agent"]
    training = Run(tiny("steps=30", "save_every=2", "eval_every=2", f"data.text={text}")).training
    told = []
    for each in sets:
        more = [
            "fault_injection.fault=kill",
            "fault_injection.step=3",
            "fault_injection.phase=forward",
            each,
        ]
        config = override(training.config, ["fault_injection.rank=0", *more])
        with pytest.raises(ValueError) as error:
            fault_injection.inject(dataclasses.replace(training, config=config), folder)
        told.append(str(error.value))
    config = override(
        training.config,
        ["fault_injection.fault=kill", "fault_injection.rank=1", "fault_injection.step=3"],
    )
    fault_injection.inject(
        dataclasses.replace(training, config=config), folder, new_run=False
    )  # it goes on, on fewer ranks
    return told


def test_the_watch_names_a_silent_rank_in_real_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread of `recording`, with 0.1 s between heartbeats and a timeout of 1.6 s. All other
    cases have a fake clock (unit/distributed/test_flight_recorder.py)."""
    monkeypatch.setattr(flight_recorder, "HEARTBEAT_S", 0.1)
    errors: list[str] = []
    monkeypatch.setattr(
        flight_recorder.FlightRecorder, "_end", lambda self, message: errors.append(message)
    )
    silent = flight_recorder.FlightRecorder(1, 2)
    assert silent._start(tmp_path, 600, lambda: None)
    start = time.monotonic()
    with flight_recorder.FlightRecorder(0, 2).recording(tmp_path, 1.6):
        silent._write_header()  # its last one; a header from before the start is an earlier run's
        while not errors and time.monotonic() < start + 60:
            time.sleep(0.05)
    assert "rank 1: stopped or dead" in errors[0] and time.monotonic() - start > 1.4
    silent._stop()


def survive(fault: faults.Fault, text: Path, folder: Path) -> str:
    """`experiments/faults.py` in short: the losses are those of an unbroken run, from the newest
    checkpoint on.

    Returns the log of the run.
    """
    sets = (*TINY, *faults.SETS, "write_report=false", "wandb.mode=off", f"data.text={text}")
    (found_,) = run_distributed(unbroken, 1, *sets)
    whole = dict(enumerate(found_, 1))
    assert len(whole) == faults.STEPS
    outcome = faults.survive(fault, folder / fault.fault, whole, "lstm_moe_demo", *sets)
    log = (folder / f"{fault.fault}.log").read_text()
    assert outcome.holds and outcome.after == 10, f"{outcome}\n{log}"
    return log


@pytest.mark.timeout(200)
def test_run_survives_a_killed_rank(small_text: Path, tmp_path: Path) -> None:
    assert "starting it again" not in survive(
        faults.Fault("kill", 1, 13, "dispatch"), small_text, tmp_path
    )


@pytest.mark.slow  # fast: test_run_survives_a_killed_rank, test_only_a_dead_agent_is_restarted
@pytest.mark.timeout(200)
def test_run_survives_a_killed_agent(small_text: Path, tmp_path: Path) -> None:
    log = survive(faults.Fault("kill_agent", 0, 15, "save"), small_text, tmp_path)
    assert "the agent ended with status 137; starting it again (1 left)" in log
