"""Time of a step by part, against milliseconds worked out by hand."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import check_plan
from torch.utils.checkpoint import checkpoint

from moe_dist.moe.routing import Routing
from moe_dist.monitoring import step_timer as clocks
from moe_dist.monitoring.step_timer import StepTimer
from moe_dist.training.profiler import profile_steps


class Work(torch.autograd.Function):
    """Takes `forward` and `backward` milliseconds of a fake clock."""

    now = 0.0

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, forward: int, backward: int) -> torch.Tensor:
        ctx.save_for_backward(
            x
        )  # as real work has it, so that a checkpoint has something to compute again
        ctx.backward_ms = backward
        Work.now += forward / 1e3
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grad: torch.Tensor) -> tuple:
        assert ctx.saved_tensors
        Work.now += ctx.backward_ms / 1e3
        return grad[0], None, None


def work(x: torch.Tensor, forward: int, backward: int) -> torch.Tensor:
    return Work.apply(x, forward, backward)


class Event:
    """A CUDA event on a stream that is 40 ms behind until the host waits for it."""

    behind = 0.04

    def __init__(self) -> None:
        self.at = Work.now

    def query(self) -> bool:
        return self.at <= Work.now - Event.behind

    def synchronize(self) -> None:
        Event.behind = 0.0

    def elapsed_time(self, other: "Event") -> float:
        assert other.query(), "an event that the stream has not passed"
        return 1e3 * (other.at - self.at)


@pytest.fixture(params=["cpu", "cuda"])
def clock(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> StepTimer:
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: Work.now)
    monkeypatch.setattr(clocks, "_event", Event)
    monkeypatch.setattr(Event, "behind", 0.04)
    return StepTimer(torch.device(request.param))


class Call(torch.nn.Module):
    """A module whose forward is a function."""

    def __init__(self, function: Callable[..., tuple]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> tuple:
        return self.function(*args)


def timed(clock: StepTimer, part: str, function: Callable[..., tuple], name: str) -> Call:
    module = Call(function)
    clock.attach(module, part, name)
    return module


def step(clock: StepTimer, recompute: bool = False, learned: bool = True) -> None:
    """Runs a gate, a dispatch with experts in it, and work before, behind and after them.
    Without a `learned` gate it gets no gradient."""

    def gate(x: torch.Tensor) -> tuple[Routing, None]:
        weight = work(x, 1, 2) if learned else work(x.detach(), 1, 2)
        return Routing(torch.zeros(1), weight, torch.zeros(1)), None

    def experts(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, None]:
        y = checkpoint(work, x, 7, 11, use_reentrant=False) if recompute else work(x, 7, 11)
        return y * weight, None

    def exchange(x: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, None]:
        y, _ = timed_experts(work(x, 3, 5), routing.gate_N)
        return work(y, 13, 17), None

    timed_gate = timed(clock, "gate", gate, "gate")
    timed_exchange = timed(clock, "dispatch", exchange, "dispatch")
    timed_experts = timed(clock, "experts", experts, "experts")
    x = work(torch.ones(1, requires_grad=True), 19, 23)
    routing, _ = timed_gate(x)
    y, _ = timed_exchange(x, routing)
    work(y + x, 29, 31).sum().backward()
    with clock.range("optimizer"):
        Work.now += 37 / 1e3


@pytest.mark.parametrize("recompute", [False, True])
def test_each_part_has_forward_and_backward_time(clock: StepTimer, recompute: bool) -> None:
    for _ in range(2):
        with clock.step():
            step(clock, recompute)
        Work.now += 1.0  # between steps
    again = 7 if recompute else 0  # the experts' forward, within their backward
    one = {
        "gate": 1 + 2,
        "dispatch": 3 + 13 + 5 + 17,
        "experts": 7 + 11 + again,
        "optimizer": 37,
        "rest": 19 + 23 + 29 + 31,
    }
    assert clock.read_and_reset() == pytest.approx({part: 2 * ms / 1e3 for part, ms in one.items()})
    assert set(clock.read_and_reset().values()) == {0.0}


def test_events_are_read_after_the_stream_has_passed_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocks, "_event", Event)
    monkeypatch.setattr(Event, "behind", 0.04)
    clock = StepTimer(torch.device("cuda"))
    for _ in range(50):
        with clock.step():
            step(clock)
    assert len(clock._events) <= 2 * 20, "those of the last step, not of all"
    assert sum(clock.read_and_reset().values()) == pytest.approx(
        50 * 0.198
    )  # 19 + 1 + 3 + 7 + 13 + 29 + ... of a step


def test_parts_without_gradient_do_not_disturb_others(clock: StepTimer) -> None:
    with clock.step():
        step(clock, learned=False)
    expected = {
        "gate": 1,
        "dispatch": 3 + 13 + 5 + 17,
        "experts": 7 + 11,
        "optimizer": 37,
        "rest": 19 + 23 + 29 + 31,
    }
    assert clock.read_and_reset() == pytest.approx(
        {part: ms / 1e3 for part, ms in expected.items()}
    )


def test_unclosed_range_ends_with_its_parent(clock: StepTimer) -> None:
    """The output has a gradient, but does not depend on the argument."""
    weight = torch.ones(1, requires_grad=True)
    experts = timed(clock, "experts", lambda x: (work(weight, 1, 2), None), "experts")
    exchange = timed(clock, "dispatch", lambda x: (experts(x)[0] + work(x, 3, 5), None), "dispatch")
    with clock.step():
        exchange(work(torch.ones(1, requires_grad=True), 7, 11))[0].sum().backward()
        Work.now += 13 / 1e3
    expected = {"gate": 0, "dispatch": 3 + 5, "experts": 1 + 2, "optimizer": 0, "rest": 7 + 11 + 13}
    assert clock.read_and_reset() == pytest.approx(
        {part: ms / 1e3 for part, ms in expected.items()}
    )


def test_argument_without_gradient_times_only_forward(clock: StepTimer) -> None:
    weight = torch.ones(1, requires_grad=True)
    with clock.step():
        timed(clock, "experts", lambda x: (work(weight, 1, 2), None), "experts")(torch.ones(1))[
            0
        ].sum().backward()
        Work.now += 13 / 1e3
    assert clock.read_and_reset() == pytest.approx(
        {part: {"experts": 1e-3, "rest": 15e-3}.get(part, 0.0) for part in clocks.PARTS}
    )


class Fail(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grad: torch.Tensor) -> Any:
        raise FloatingPointError


def test_error_in_backward_does_not_affect_the_next_step(clock: StepTimer) -> None:
    x = torch.ones(1, requires_grad=True)
    with pytest.raises(FloatingPointError), clock.step():
        timed(clock, "experts", lambda x: (Fail.apply(x), None), "experts")(x)[0].sum().backward()
    clock.read_and_reset()
    with clock.step():
        Work.now += 0.25
    assert clock.read_and_reset() == pytest.approx(
        {part: 0.25 if part == "rest" else 0.0 for part in clocks.PARTS}
    )


def test_failed_forward_ends_its_range(clock: StepTimer) -> None:
    """Experts fail after 7 ms inside of a dispatch, which goes on for 3 ms; 11 ms of rest follow."""

    def fail(x: torch.Tensor) -> tuple:
        Work.now += 7 / 1e3
        raise ValueError("no memory")

    experts = timed(clock, "experts", fail, "experts")

    def dispatch(x: torch.Tensor) -> tuple[torch.Tensor, None]:
        with pytest.raises(ValueError, match="no memory"):
            experts(x)
        return work(x, 3, 5), None

    with clock.step():
        y, _ = timed(clock, "dispatch", dispatch, "dispatch")(torch.ones(1, requires_grad=True))
        work(y, 11, 0).sum().backward()
    assert not clock._forwards
    expected = {"gate": 0, "experts": 7, "dispatch": 3 + 5, "rest": 11, "optimizer": 0}
    assert clock.read_and_reset() == pytest.approx({p: ms / 1e3 for p, ms in expected.items()})


def test_call_with_keywords_is_not_timed(clock: StepTimer) -> None:
    class ByKeyword(torch.nn.Module):
        def forward(self, *, x: torch.Tensor) -> tuple[torch.Tensor, None]:
            return work(x, 3, 5), None

    module = ByKeyword()
    clock.attach(module, "gate", "gate")
    with clock.step():
        module(x=torch.ones(1, requires_grad=True))[0].sum().backward()
    assert clock.read_and_reset()["rest"] == pytest.approx(8 / 1e3)


def test_timer_outside_a_step_does_nothing(clock: StepTimer) -> None:
    x = torch.ones(1, requires_grad=True)
    y, _ = timed(clock, "experts", lambda x: (x * 2, None), "experts")(x)
    assert type(y.grad_fn).__name__ == "MulBackward0"  # no view
    step(clock)
    assert set(clock.read_and_reset().values()) == {0.0}


def test_only_training_is_profiled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_plan(["--evaluate", str(tmp_path), "--profile"], "--profile: only of training", capsys)


def test_full_disk_loses_only_the_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "profile").write_text("no folder can be made here")
    mesh: Any = SimpleNamespace(
        dp=SimpleNamespace(index=0),
        step_timer=SimpleNamespace(annotate_profile=False),
        is_main=True,
    )
    with profile_steps(tmp_path, mesh, True) as step:
        for _ in range(6):
            step()
    assert (
        capsys.readouterr().err
        == f"warning: {tmp_path}/profile/rank0.json.gz cannot be written (File exists)\n"
    )
