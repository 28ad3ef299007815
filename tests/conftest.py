"""Fixtures that several test files use."""

import multiprocessing
import shutil
from itertools import islice
from pathlib import Path

import pytest
from processes import end, set_, start
from runs import TINY

from moe_dist.data.text.corpus import open_text

# ranks are forked from a process that has imported what they need: five seconds less for each of
# some hundreds
multiprocessing.set_forkserver_preload(["tests.helpers.preloaded"])


@pytest.fixture(scope="session")
def small_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes a text file of 1,500 verses, which is read in a moment."""
    path = tmp_path_factory.mktemp("text") / "verses.txt"
    path.write_text("\n".join(islice(open_text("bundled", streamed=True)["train"], 1500)))
    return path


@pytest.fixture(scope="session")
def good(small_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trains a run of two steps."""
    run = tmp_path_factory.mktemp("runs") / "good"
    sets = set_(*TINY, "steps=2", "save_every=1", f"data.text={small_text}")
    status, stderr = end(start("lstm_moe_demo", "--folder", str(run), *sets))
    assert status == 0, stderr
    return run


@pytest.fixture
def run(good: Path, tmp_path: Path) -> Path:
    """Copies that run, so that a test may damage it."""
    return shutil.copytree(good, tmp_path / "run")
