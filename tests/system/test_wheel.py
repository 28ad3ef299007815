"""An installed wheel, run from an empty folder: it has all files that the package reads."""

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from paths import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds the wheel of a copy of the tracked files, so that build folders stay out of the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout
    source = folder / "source"
    source.mkdir()
    subprocess.run(
        ["tar", "-C", ROOT, "--null", "-T", "-", "-cf", folder / "source.tar"],
        input=tracked,
        check=True,
    )
    subprocess.run(["tar", "-C", source, "-xf", folder / "source.tar"], check=True)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*build, "-w", folder, source], check=True, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment with the wheel, which sees the packages of this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    packages = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    zipfile.ZipFile(wheel).extractall(packages)
    # a line of a .pth file adds a folder, but not the .pth files in it: no editable moe_dist
    (Path(packages) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


def test_wheel_has_every_data_file(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"moe_dist/engine/ds_configs/{path.name}" for path in ROOT.glob("ds_configs/*.json")
    }
    results = ROOT / "experiments" / "results"
    expected |= {f"moe_dist/training/kept_results/{path.name}" for path in results.glob("*.json")}
    expected |= {
        f"moe_dist/data/bundled/{path.name}" for path in ROOT.glob("moe_dist/data/bundled/*.xz")
    }
    assert len(expected) > 10 and expected | {"moe_dist/py.typed"} <= names
    assert not any(name.startswith(("tests/", "docs/", "experiments/")) for name in names)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["-c", "import moe_dist; print(moe_dist.__version__, moe_dist.__file__)"], "0.1.0 "),
        (
            ["-m", "moe_dist.planner", "lstm_moe_demo", "--gpus-per-node", "2", "--gpu", "h100"],
            "zero_stage",
        ),
    ],
)
def test_wheel_runs_from_an_empty_folder(
    python: Path, tmp_path: Path, arguments: list[str], expected: str
) -> None:
    done = subprocess.run(
        [python, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
    assert str(ROOT) not in done.stdout
