"""A run that resumes with more experts than its checkpoint has."""

from pathlib import Path

import pytest
import torch
from processes import check_plan, set_, train_forked
from runs import TINY, Run, tiny

from moe_dist.checkpoint import manifest
from moe_dist.checkpoint.loader import load
from moe_dist.checkpoint.single_process import inspect
from moe_dist.checkpoint.upcycle import Upcycling
from moe_dist.distributed import mesh as meshes
from moe_dist.distributed.collectives import all_gather
from moe_dist.distributed.spawn import run_distributed
from moe_dist.training.evaluate import evaluate

CASES = {
    "flat": [],
    "adam": ["optim.expert_optimizer=adam"],
    "groups": ["model.moe.num_groups=4"],  # of two experts
}
Told = tuple[float, dict[str, torch.Tensor]]


def start_and_save(text: str, folder: Path) -> dict[str, Told]:
    meshes.init_process_group()
    told = {}
    for case, sets in CASES.items():
        run = Run(tiny(f"data.text={text}", "optim.lr=1e-2", *sets)).steps(0, 4)
        run.save(folder / case, 4)
        told[case] = tell(run)
    meshes.shutdown()
    return told


def grow(
    text: str, folder: Path, ep: int, jobs: list[tuple[str, float]]
) -> dict[tuple[str, float], Told]:
    """Makes three experts of each, by case and noise, with a proportional k. With groups k
    also counts groups, which stay the same."""
    meshes.init_process_group()
    told = {}
    for case, noise in jobs:
        more = [] if case == "groups" else ["model.moe.k=6"]
        run = Run(
            tiny(
                f"data.text={text}",
                "model.moe.num_experts=24",
                f"mesh.ep={ep}",
                "zero_stage=1",
                *CASES[case],
                *more,
            )
        )
        checkpoint, _ = manifest.newest_complete(folder / case, run.mesh.checkpoint_group)
        load(checkpoint, run.engine, run.task, run.mesh, Upcycling(3, noise, seed=1))
        told[case, noise] = tell(run)
    meshes.shutdown()
    return told


def tell(run: Run) -> Told:
    """Returns perplexity, and weights and state of all experts."""
    state = {}
    for name, stack in (run.optimizer.experts | run.optimizer.group_gates).items():
        for ending, t in stack.tensors(4).items():
            if ending:
                whole = torch.empty(len(stack.p), *t.shape[1:])
                whole[stack.owned] = t
                state[name + ending] = all_gather(stack.broadcast_from_owners(whole), run.mesh.ep)
    return evaluate(run.engine, run.task, "valid", run.mesh)[
        "valid/perplexity"
    ], run.weights() | state


@pytest.fixture(scope="module")
def saved(
    small_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, dict[str, Told]]:
    folder = tmp_path_factory.mktemp("saved")
    return (
        str(small_text),
        folder,
        run_distributed(start_and_save, 1, str(small_text), folder, timeout=90)[0],
    )


@pytest.mark.timeout(150)
def test_exact_copies_with_proportional_k_compute_the_same(
    saved: tuple[str, Path, dict[str, Told]],
) -> None:
    """8 experts become 24, and k = 2 becomes 6."""
    text, folder, first = saved
    grown = run_distributed(grow, 2, text, folder, 2, [(case, 0.0) for case in CASES], timeout=90)[
        0
    ]
    for case, (before, old) in first.items():
        after, new = grown[case, 0.0]
        assert case == "groups" or after == pytest.approx(before, rel=1e-6)
        num_grown = 0
        for name, t in old.items():
            dims = [
                i for i, (a, b) in enumerate(zip(t.shape, new[name].shape, strict=True)) if a != b
            ]
            num_grown += len(dims)
            assert torch.equal(new[name], t.repeat_interleave(3, dims[0]) if dims else t), (
                case,
                name,
            )
        # two matrices with two states each; two gates, which in groups have two states each besides
        assert num_grown == {"flat": 2 * 3 + 2, "adam": 2 * 3 + 2, "groups": 2 * 3 + 2 * 3}[case]


@pytest.mark.timeout(150)
def test_copies_are_perturbed_equally_on_any_layout(
    saved: tuple[str, Path, dict[str, Told]],
) -> None:
    text, folder, first = saved
    jobs = [("flat", 0.1), ("groups", 0.1)]
    one, *others = [
        run_distributed(grow, world, text, folder, ep, jobs, timeout=90)[0]
        for world, ep in ((1, 1), (4, 1))  # owners' parts begin within the copies of an expert
    ]
    for job in jobs:
        for other in others:
            assert all(torch.equal(one[job][1][name], t) for name, t in other[job][1].items()), job
        name = {"flat": "middle.experts.w1_eDF", "groups": "middle.experts.experts.w1_eDF"}[job[0]]
        copies, originals = one[job][1][name].view(8, 3, 16, 24), first[job[0]][1][name]
        assert torch.equal(copies[:, 0], originals)
        change = (copies[:, 1:] / originals[:, None] - 1).abs()
        assert 0.09 < change.max() <= 0.1001 and not torch.equal(copies[:, 1], copies[:, 2])


@pytest.mark.timeout(150)
def test_grow_from_the_command_line(
    small_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    sets = set_(*TINY, "steps=2", "save_every=2", f"data.text={small_text}")
    assert train_forked("lstm_moe_demo", "--folder", str(old), *sets)[0] == 0
    before = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
    more = set_("steps=4", "model.moe.k=4")
    status, _, stderr = train_forked(
        "--resume", str(old), "--grow", "2", "--folder", str(new), *more
    )
    assert status == 0, stderr
    assert {path: path.read_bytes() for path in old.rglob("*") if path.is_file()} == before
    first, last = manifest.require_checkpoints(new)
    assert [inspect(path)["step"] for path in (first, last)] == [2, 4]
    assert inspect(last)["weights"]["middle.experts.w1_eDF"]["shape"] == (16, 16, 24)
    assert train_forked("--resume", str(new), *set_("steps=5"))[0] == 0
    for args, says in (
        (["--resume", str(old), "--grow", "1"], "--grow 1: 2 or more"),
        (["lstm_moe_demo", "--grow", "2"], "--grow 2: only with --resume RUN"),
        (
            ["--resume", str(old), "--grow", "2", "--grow-noise", "-1"],
            "--grow-noise -1.0: from 0 to 1",
        ),
        (["--resume", str(old), "--grow", "2", "--folder", str(new)], "holds a run already"),
    ):
        check_plan(args, says, capsys)
