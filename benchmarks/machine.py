"""What a benchmark tells of how and where it ran."""

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

INSTRUCTIONS = (
    "avx2",
    "avx512_bf16",
    "amx_bf16",
)  # without the last two, bf16 is multiplied as float32
ROOT = Path(__file__).resolve().parent.parent


def _commit() -> str | None:
    """Of the checkout; "-dirty" where its Python files differ from it."""
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
        changed = subprocess.run(
            [*git, "diff", "--quiet", "HEAD", "--", "*.py"], capture_output=True
        )
        return head.stdout.strip() + "-dirty" * (changed.returncode != 0)
    except (OSError, subprocess.CalledProcessError):
        return None


COMMIT = _commit()  # that was imported, whatever is there when it ends


def machine(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, Any]:
    """For JSON: the command (two_nodes.sh puts its own before it), the commit, the architecture,
    the CPU's name and
    which of INSTRUCTIONS it has; None for what is not told here."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    pairs = (line.partition(":") for line in reversed(lines))  # of the first core
    of_core = {key.strip(): value.strip() for key, _, value in pairs}
    flags = of_core.get("flags")
    has = None if flags is None else [name for name in INSTRUCTIONS if name in flags.split()]
    command = os.environ.get("TWO_NODES", "") + shlex.join(
        [f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]
    )
    of_cpu = {"machine": platform.machine(), "cpu": of_core.get("model name"), "instructions": has}
    return {"command": command, "commit": COMMIT} | of_cpu


def in_words(told: dict[str, Any]) -> str:
    has = (
        ""
        if told["instructions"] is None
        else f" ({' '.join(told['instructions']) or 'no ' + INSTRUCTIONS[0]})"
    )
    return f"{told['cpu'] or told['machine']}{has}"
