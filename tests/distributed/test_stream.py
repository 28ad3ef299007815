"""Streamed text: the same on every layout and after resume; a file that breaks ends every rank."""

import gzip
import json
import os
import random
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from processes import end, set_, start
from runs import TINY, Run, tiny

from moe_dist.distributed import mesh as meshes
from moe_dist.distributed import rendezvous_port
from moe_dist.distributed.collectives import run_on_main
from moe_dist.distributed.spawn import run_distributed

WORDS = tuple("abcdefgh")


@pytest.mark.timeout(240)
@pytest.mark.parametrize("where", ["both", "rank 1"])
def test_broken_file_ends_every_rank_with_one_line(where: str, tmp_path: Path) -> None:
    """The file is cut short while two ranks train on it, for both or for one rank with its own
    disk."""
    rng = random.Random(0)
    rows = [json.dumps({"text": " ".join(rng.choices(WORDS, k=9))}) for _ in range(3000)]
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder in folders:
        folder.mkdir()
        (folder / "x.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    run = tmp_path / "run"
    sets = [
        *TINY,
        "data.vocabulary_size=10",
        "steps=1000000",
        "eval_every=1000000",
        "save_every=1000000",
    ]
    args = [
        "lstm_moe_demo",
        "--folder",
        str(run),
        *set_(*sets, "data.text=x.jsonl.gz", "data.streamed=true"),
    ]
    world = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(rendezvous_port.find_free_port()),
    }
    ranks = [
        start(*args, cwd=folder, RANK=str(rank), LOCAL_RANK=str(rank), **world)
        for rank, folder in enumerate(folders)
    ]
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    for folder in folders[where == "rank 1" :]:
        os.truncate(folder / "x.jsonl.gz", (folder / "x.jsonl.gz").stat().st_size // 2)
    ended = [end(process) for process in ranks]
    says = (
        ["x.jsonl.gz, after row ", "x.jsonl.gz, after row "]
        if where == "both"
        else ["rank 1 ended first", "x.jsonl"]
    )
    for (status, stderr), text in zip(ended, says, strict=True):
        errors = [line for line in stderr.splitlines() if line.startswith("error")]
        assert status in (1, 2) and len(errors) == 1 and text in errors[0], stderr


def text(num_lines: int) -> list[str]:
    rng = random.Random(num_lines)
    return [" ".join(rng.choices(WORDS, k=rng.choice([1, 1, 2, 3, 9]))) for _ in range(num_lines)]


def streamed(path: str, *more: str) -> Any:
    return tiny(f"data.text={path}", "data.streamed=true", "data.vocabulary_size=100", *more)


LAYOUTS = {
    1: "batch.grad_accum_steps=1",
    2: "batch.grad_accum_steps=2",
    4: "batch.grad_accum_steps=1",
}


@pytest.mark.timeout(300)
def test_streamed_run_is_the_same_on_every_layout_and_resumes(
    small_text: Path, tmp_path: Path
) -> None:
    """18 lines of about 28 tokens on 8 lanes of 6 timesteps: 16 steps are more than a pass."""
    path = tmp_path / "twenty.txt"
    path.write_text("\n".join(small_text.read_text().splitlines()[:20]))
    told = {
        w: run_distributed(train_streamed, w, str(path), tmp_path / "run", w, timeout=120)
        for w in (2, 1, 4)
    }
    losses, resumed, places = told[2][0]
    assert resumed == losses[8:], "bit for bit on the same layout"
    assert max(line for line, _ in places) > 18 and len(set(losses)) == 16
    for ranks in told.values():
        for each, each_resumed, each_places in ranks:
            assert each == pytest.approx(losses, rel=1e-5)
            assert each_resumed == pytest.approx(losses[8:], rel=1e-5)
            assert each_places == places


def train_streamed(
    path: str, folder: Path, world: int
) -> tuple[list[float], list[float], list[list[int]]]:
    """Returns losses of 16 steps, and of the last 8 from the checkpoint of two ranks, with the
    lanes' positions. Every rank gets the error of a text that is too short, which only the
    main rank finds."""
    meshes.init_process_group()
    with pytest.raises(ValueError, match=r"18 lines for batch.global_batch_size=64 lanes"):
        Run(streamed(path, "batch.global_batch_size=64"))
    with pytest.raises(
        ValueError, match=r"a step reads batch.global_batch_size=8 x batch.seq_len=600 words"
    ):
        Run(streamed(path, "data.streamed=false", "batch.seq_len=600"))
    config = streamed(path, LAYOUTS[world], f"mesh.ep={world}")
    whole = Run(config).steps(0, 8)
    if world == 2:
        whole.save(folder, 8)
    whole.steps(8, 16)
    again = Run(config)
    again.load(folder)
    again.steps(8, 16)
    places = again.task.save_state()["stream"]
    assert places.equal(whole.task.save_state()["stream"])
    meshes.shutdown()
    return whole.losses, again.losses, places.tolist()


@pytest.mark.timeout(120)
def test_run_on_main_shares_its_result_and_its_error(tmp_path: Path) -> None:
    told = run_distributed(from_main_thrice, 3, tmp_path, timeout=100)
    assert told == [("made by 0", "data.text='x': made by 0", "in time")] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["0"]


def from_main_thrice(folder: Path) -> tuple[str, str, str]:
    """Returns a value, an error, and a value that takes longer than the timeout of the mesh."""
    meshes.init_process_group(timeout=timedelta(seconds=10))
    mesh = meshes.build_mesh(1)

    def make() -> str:
        (folder / str(mesh.dp.index)).touch()
        return f"made by {mesh.dp.index}"

    def fail() -> str:
        raise ValueError(f"data.text='x': {make()}")

    def slow() -> str:
        time.sleep(12)
        return "in time"

    with pytest.raises(ValueError) as error:
        run_on_main(fail)
    result = run_on_main(make), str(error.value), run_on_main(slow)
    meshes.shutdown()
    return result
