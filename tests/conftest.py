"""Fixtures of several test files."""

from itertools import islice
from pathlib import Path

import pytest

from moe_dist.data.sources import open_text


@pytest.fixture(scope="session")
def small_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of 1,500 verses, read in a moment."""
    path = tmp_path_factory.mktemp("text") / "verses.txt"
    path.write_text("\n".join(islice(open_text("embedded", streamed=True)["train"], 1500)))
    return path
