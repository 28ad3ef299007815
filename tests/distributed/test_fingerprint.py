"""Every rank checks on resume that the data is the same."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from runs import tiny

from moe_dist.distributed import mesh as meshes
from moe_dist.distributed.batch_layout import make_batch_layout
from moe_dist.distributed.spawn import run_distributed
from moe_dist.engine.ds_config import read_ds_config
from moe_dist.tasks.registry import task_of
from moe_dist.training import setup as training_setup


@pytest.mark.timeout(240)
def test_run_resumes_only_with_its_own_data(small_text: Path, tmp_path: Path) -> None:
    """Both ranks refuse, or both accept the new fingerprint."""
    for told in run_distributed(go_on, 2, str(small_text), tmp_path, timeout=220):
        assert told == {
            "moved": "same",
            "of another layout": "same",
            "no fingerprint": "same",
            "longer, allowed": "new",
            "a folder": "it was given as 'files'",
            "longer": "the file is longer",
        }


def go_on(text: str, folder: Path) -> dict[str, str]:
    mesh = meshes.init_distributed(1)
    moved, longer = folder / f"moved{mesh.dp.index}.txt", folder / f"longer{mesh.dp.index}.txt"
    shutil.copy(text, moved)
    longer.write_text(Path(text).read_text() + "\nlet there be light")

    config = tiny(f"data.text={text}")
    old = task_of(config)(config, make_batch_layout(config, 2), mesh, None).checkpoint_metadata()

    def known_by(
        place: object,
        known: dict[str, Any] | None = None,
        resumed: bool = True,
        allow: bool = False,
    ) -> Any:
        config = tiny(f"data.text={place}")
        task = task_of(config)(config, make_batch_layout(config, 2), mesh, old)
        return training_setup._fingerprint(task, config, mesh, known, resumed, allow)

    same = known_by(text, resumed=False)
    first = old | {"data": same}
    told = {
        "moved": "same" if known_by(moved, first) == same else "",
        "of another layout": "same" if known_by(longer, first, resumed=False) == same else "",
        "no fingerprint": "same" if known_by(moved, old) == same else "",
        "longer, allowed": "new" if known_by(longer, first, allow=True) != same else "",
    }
    alone = folder / f"alone{mesh.dp.index}"
    alone.mkdir()
    shutil.copy(text, alone)
    for name, place in (("a folder", alone), ("longer", longer)):
        config = tiny(f"data.text={place}")
        try:
            training_setup.set_up(config, read_ds_config(config), mesh, first, resumed=True)
        except ValueError as error:  # before an engine is made
            told[name] = (
                str(error).partition(" trained on: ")[2].partition(",")[0].partition(" (")[0]
            )
    meshes.shutdown()
    return told
