"""The list of injected faults, and the step from which a run resumes after each."""

import dataclasses

import pytest
from runs import tiny

from experiments import faults
from moe_dist.config.validate import check_config


@pytest.mark.parametrize(
    "sets",
    [
        "fault_injection.fault=murder",
        "fault_injection.phase=lunch",
        "fault_injection.routing=all",
        "fault_injection.rank=-1",
        "fault_injection.step=0",
        "mesh.timeout_s=0",
        "optim.max_consecutive_skipped_steps=0",
    ],
)
def test_invalid_fault_settings_are_named(sets: str) -> None:
    with pytest.raises(ValueError, match=sets.partition("=")[0]):
        check_config(tiny(sets))


def test_fault_list_covers_every_kind() -> None:
    drawn = faults.draw(30)
    assert {fault.fault for fault in drawn} == set(faults.FAULTS) and {
        fault.rank for fault in drawn
    } == {0, 1}
    assert {fault.phase for fault in drawn} == set(faults.PHASES)
    assert all(1 <= fault.step <= faults.STEPS for fault in drawn) and drawn == faults.draw(30)
    assert all(fault.step == faults.STEPS for fault in drawn if fault.phase in faults.AT_THE_END)
    # the newest whole checkpoint before step 11, of those at 5, 10, ...; one that dies in a save
    # has not got it
    assert (
        faults.Fault("kill", 0, 11, "step").whole == 10 == faults.Fault("kill", 0, 15, "save").whole
    )


@pytest.mark.parametrize(
    ("fault", "after", "holds"),
    [
        (("kill", 0, 11, "step"), 10, True),
        (("kill", 0, 11, "step"), 5, False),
        (("kill", 0, 9, "step"), None, False),
        (("kill", 0, 11, "step", 0.5), 15, True),
        (("terminate", 1, 7, "forward"), 7, True),
        (("terminate", 1, 7, "forward"), 5, False),
        (("terminate", 1, 20, "evaluation"), None, True),
        (("kill", 0, 20, "report"), 20, True),
        (("kill", 0, 20, "wandb"), 15, False),
        (("pause", 0, 9, "save"), 5, False),
        (("pause", 0, 9, "save"), None, True),
        (("stop", 1, 9, "backward"), 5, True),
        (("kill", 0, 3, "start"), None, True),
    ],
)
def test_resume_step_after_each_fault(fault: tuple, after: int | None, holds: bool) -> None:
    outcome = faults.Outcome(faults.Fault(*fault), 0, after, 0.0, [], 1.0)
    assert outcome.holds == holds
    assert (
        not dataclasses.replace(outcome, status=1).holds
        and not dataclasses.replace(outcome, off=1e-4).holds
    )
