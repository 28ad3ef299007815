"""The imports of a start: only used libraries, and the port before torch. No test reads a clock."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from paths import ROOT

from moe_dist.distributed import rendezvous_port
from moe_dist.distributed.spawn import run_distributed

RUN = """
import atexit, runpy, sys
command, *sys.argv[1:] = sys.argv[1:]
atexit.register(lambda: print("IMPORTED", *{name.partition(".")[0] for name in sys.modules}))
if command.endswith(".py"):
    sys.argv[0] = command
    runpy.run_path(command, run_name="__main__")
else:
    runpy.run_module(command, run_name="__main__", alter_sys=True)
"""


def imported(*command: str) -> tuple[int, str, set[str]]:
    """Returns the exit status, the output and the packages that a command has imported."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    out, _, names = done.stdout.rpartition("IMPORTED ")
    assert names, done.stderr
    return done.returncode, out + done.stderr, set(names.split())


@pytest.mark.parametrize(
    ("command", "status", "says"),
    [
        ("train.py --list", 0, "lstm_moe_demo"),
        ("train.py --help", 0, "--resume"),
        ("train.py lstm_moe_demo --optim.lr=1", 2, "did you mean --set optim.lr=1?"),
        ("moe_dist.checkpoint --help", 0, "inspect"),
        ("moe_dist.report --help", 0, "--html"),
    ],
)
def test_commands_without_torch_do_not_import_it(command: str, status: int, says: str) -> None:
    code, out, names = imported(*command.split())
    assert code == status and says in out, out
    heavy = {
        "torch",
        "deepspeed",
        "numba",
        "matplotlib",
        "wandb",
        "datasets",
        "PIL",
        "tokenizers",
        "scipy",
        "sympy",
    }
    assert not names & (heavy | (set() if "report" in command else {"numpy"}))


STEPS = """
import sys
from itertools import islice
import train
from moe_dist.config.overrides import override
from moe_dist.config.papers import get
from moe_dist.engine.ds_config import read_ds_config
from moe_dist.data.text import corpus

whole = corpus._read_bundled
corpus._read_bundled = lambda split: islice(whole(split), 500)  # read in a moment
config = override(get("lstm_moe_demo"), ["data.vocabulary_size=300"])
mesh = train.meshes.init_distributed(1)
training = train.set_up(config, read_ds_config(config), mesh)
for _ in train.train_step(training, 1):
    pass
assert training.engine.optimizer.updates == 1
train.meshes.shutdown()
print("IMPORTED", *sys.modules)
"""


def test_training_step_imports_no_unused_library() -> None:
    """Neither torch's compiler nor libraries for checkpoints, plots, logs or other data."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", STEPS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    names = set(done.stdout.rpartition("IMPORTED ")[2].split())
    assert {"torch", "deepspeed", "numba"} <= names
    unused = {
        "torch._dynamo",
        "torch._inductor",
        "torch.distributed.checkpoint",
        "torch.distributed.tensor",
        "sympy",
        "matplotlib",
        "wandb",
        "datasets",
        "torchvision",
        "pandas",
    }
    assert not names & unused


def imported_before() -> list[str]:
    return list(sys.modules)


def test_forked_ranks_have_their_imports() -> None:
    """A forkserver ignores a module that it cannot import, and every rank then takes five
    seconds longer."""
    (names,) = run_distributed(imported_before, 1)
    assert {
        "deepspeed",
        "torch.distributed.checkpoint",
        "moe_dist.optim.compiled_loops",
        "tests.helpers.preloaded",
    } <= set(names)


def test_dataset_name_without_network_fails_fast_with_one_line(tmp_path: Path) -> None:
    """The Hub refuses every request; without `_check_hub` the library retries for half a minute."""
    code = "from moe_dist.data.text.corpus import open_text\ntry: open_text('owner/name', True)\n"
    code += "except ValueError as error: print(error)"
    for setting in ({"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}):
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path)} | setting,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert time.monotonic() - start < 15
        assert (
            done.stdout.startswith("data.text='owner/name' does not load: ")
            and done.stdout.count("\n") == 1
        )
        assert "cannot be reached" in done.stdout and "give the folder" in done.stdout
        assert done.stderr == ""


def test_bundled_text_does_not_import_datasets() -> None:
    code = "import sys; from moe_dist.data.text.corpus import *; check_text('bundled'); open_text('bundled', False)"
    code += "; assert not {'datasets', 'pyarrow'} & set(sys.modules)"
    subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
        timeout=60,
    )


HELD = """
import os, socket, sys
from moe_dist.distributed import rendezvous_port
os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": sys.argv[1]}
rendezvous_port.reserve()
assert not any(name.split(".")[0] == "torch" for name in sys.modules)
for family, host in (socket.AF_INET, "127.0.0.1"), (socket.AF_INET, ""), (socket.AF_INET6, "::1"):
    try:
        socket.create_server((host, int(sys.argv[1])), family=family).close()
    except OSError:
        continue
    sys.exit(f"another got it on {host}")

from moe_dist.distributed import mesh
mesh.init_process_group()
assert rendezvous_port.release_fd() is None  # it is the store's now
mesh.shutdown()
"""


@pytest.mark.timeout(60)
def test_port_is_reserved_before_torch_is_imported() -> None:
    subprocess.run(
        [sys.executable, "-c", HELD, str(rendezvous_port.find_free_port())],
        cwd=ROOT,
        check=True,
        timeout=50,
    )
