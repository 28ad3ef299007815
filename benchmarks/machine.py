"""What a benchmark tells of how and where it ran."""

import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

INSTRUCTIONS = ("avx2", "avx512_bf16", "amx_bf16")  # without the last two, bf16 is multiplied as float32


def machine(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, Any]:
    """For JSON: the command, the commit, the architecture, the CPU's name and which of INSTRUCTIONS it has; None for
    what is not told here."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    pairs = (line.partition(":") for line in reversed(lines))  # of the first core
    of_core = {key.strip(): value.strip() for key, _, value in pairs}
    flags = of_core.get("flags")
    has = None if flags is None else [name for name in INSTRUCTIONS if name in flags.split()]
    script = Path(sys.argv[0])
    command = shlex.join([f"{script.parent.name}/{script.name}", *sys.argv[1:]])
    of_cpu = {"machine": platform.machine(), "cpu": of_core.get("model name"), "instructions": has}
    return {"command": command, "commit": _commit(script.parent)} | of_cpu


def _commit(folder: Path) -> str | None:
    """Of the checkout; "-dirty" where files differ from it."""
    try:
        git = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude=*"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def in_words(told: dict[str, Any]) -> str:
    has = "" if told["instructions"] is None else f" ({' '.join(told['instructions']) or 'no ' + INSTRUCTIONS[0]})"
    return f"{told['cpu'] or told['machine']}{has}"
