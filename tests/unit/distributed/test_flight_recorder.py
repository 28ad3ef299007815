"""The watch of the flight recorder under a fake clock: three ranks, of which rank 1 never starts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_dist.distributed.flight_recorder import HEARTBEAT_S, FlightRecorder
from moe_dist.distributed.labels import CommLabel
from moe_dist.distributed.watch_state import TRANSITIONS, Watch, WatchEvent, WatchState

TIMEOUT_S = 8.0
# rank 0 looks at the others from 3.5 to 5.5 s, when it has made no progress for 4 s; if it is still
# stalled, again from 7.5 to 9.5 s
FIRST_LOOK = (3.0, 5.75)
SECOND_LOOK = (7.0, 12.0)
DISPATCH = CommLabel("middle", "dispatch", 2)


class Work:
    """A collective of torch.distributed that completes at a given time."""

    def __init__(self, world: "World", completes_at: float = float("inf")) -> None:
        self.world = world
        self.completes_at = completes_at

    def is_completed(self) -> bool:
        return self.world.now() >= self.completes_at


class World:
    """Ranks 0 and 2 on one clock. Rank 2 writes a heartbeat with each of rank 0's unless silent."""

    def __init__(self, folder: Path, silences: list[tuple[float, float]]) -> None:
        self.time = 0.0
        self.silences = silences
        self.errors: list[str] = []
        (folder / "calls").mkdir()
        stale = "line 9, 7 calls begun, in step, long ago; rank 1 of 3\n"
        (folder / "calls" / "rank00001.txt").write_text(stale)
        self.watched = FlightRecorder(0, 3, step=3, clock=self)
        self.other = FlightRecorder(2, 3, step=3, phase="forward", clock=self)
        for recorder in (self.watched, self.other):
            assert recorder._start(folder, TIMEOUT_S, lambda: None)
        self.watched._end = self.errors.append  # type: ignore[method-assign, assignment]

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds
        if self.other.files and not any(a <= self.time < b for a, b in self.silences):
            self.other._write_header()

    def run_until(self, time: float) -> None:
        while self.time < time and not self.errors:
            self.sleep(HEARTBEAT_S)
            self.watched._tick()

    def open_call(self, completes_at: float = float("inf")) -> None:
        self.watched.start_call(DISPATCH, (0, 2), lambda: Work(self, completes_at), [5, 7], [5, 6])


@pytest.fixture
def warnings(capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    yield lambda: [line for line in capsys.readouterr().err.splitlines() if "warning" in line]


@pytest.mark.parametrize(
    ("silences", "num_warnings", "is_lost"),
    [
        ([], 0, False),
        ([(5.75, 7.25)], 0, False),  # between two looks
        ([FIRST_LOOK], 1, False),  # a slow disk
        ([FIRST_LOOK, SECOND_LOOK], 1, False),  # alive in between
        ([(3.0, 100.0)], 1, True),
    ],
)
def test_a_silent_rank_is_dead_only_if_it_was_silent_since_the_warning(
    silences: list[tuple[float, float]],
    num_warnings: int,
    is_lost: bool,
    tmp_path: Path,
    warnings: Any,
) -> None:
    """Rank 0 computes and waits for nobody. The file of rank 1 is from an earlier start."""
    world = World(tmp_path, silences)
    world.run_until(10)
    lines = [*warnings(), *world.errors]
    assert len(lines) == num_warnings + is_lost
    assert bool(world.errors) == is_lost
    assert all("a call that is not recorded, step 3: rank 2: stopped or dead" in x for x in lines)


def test_a_rank_that_is_silent_while_another_waits_is_dead(tmp_path: Path, warnings: Any) -> None:
    world = World(tmp_path, [SECOND_LOOK])
    world.open_call()
    world.run_until(20)
    where = "dispatch of middle (layer call 2), step 3: rank 2 (7 rows to it, 6 from it)"
    (warning,) = warnings()
    assert f"has waited for 4 s in {where}, late in forward (see" in warning
    (error,) = world.errors
    assert f"has waited for 8 s in {where}: stopped or dead (see" in error


def test_a_late_rank_has_ended_or_is_in_the_call(tmp_path: Path, warnings: Any) -> None:
    world = World(tmp_path, [])
    world.open_call()
    world.run_until(6)
    world.other.start_call(DISPATCH, (0, 2), lambda: Work(world))
    world.run_until(20)
    assert "rank 2 (7 rows to it, 6 from it), late in forward" in warnings()[0]
    assert "all ranks are in it, so the network may be broken" in world.errors[0]

    world.errors.clear()
    world.watched.start_call(DISPATCH, (0, 2), lambda: Work(world))
    world.watched.open_calls.pop(1)
    world.other._stop()
    world.run_until(40)
    assert "rank 2, which has ended" in world.errors[0]


@pytest.mark.parametrize("completes_at", [4.0, 5.5, 6.5])
def test_a_call_that_completes_is_no_stall(
    completes_at: float, tmp_path: Path, warnings: Any
) -> None:
    """During the first look nothing is printed; after it there is one warning."""
    world = World(tmp_path, [])
    world.open_call(completes_at)
    call = world.watched.open_calls[1]
    call.waited = True
    world.run_until(30)
    assert len(warnings()) == (completes_at > 6) and not world.errors
    assert not world.watched.open_calls and world.watched.watch.state is WatchState.WORKING


def test_a_rank_that_was_stopped_itself_blames_nobody(tmp_path: Path, warnings: Any) -> None:
    """For an hour rank 0 writes no heartbeat; then its call completes."""
    world = World(tmp_path, [(1.0, 3600.0)])
    world.open_call(completes_at=3601.0)
    world.watched.open_calls[1].waited = True
    world.run_until(1)
    for _ in range(7200):
        world.sleep(HEARTBEAT_S)
    world.run_until(3610)
    assert warnings() == [] and world.errors == []


def test_states_by_the_table() -> None:
    watch = Watch()
    events = (WatchEvent.CALL_OPEN, WatchEvent.HALF_TIMEOUT, WatchEvent.HALF_TIMEOUT)
    assert [watch.apply(event) for event in events] == [True, True, False], "one warning a stall"
    assert watch.state is WatchState.STALLED
    assert watch.apply(WatchEvent.TIMEOUT) and watch.apply(WatchEvent.TIMEOUT)
    assert watch.apply(WatchEvent.PROGRESS) and watch.state is WatchState.WORKING
    for state in (WatchState.WAITING, WatchState.STALLED, WatchState.LOST):
        assert TRANSITIONS[state, WatchEvent.PROGRESS] is WatchState.WORKING
