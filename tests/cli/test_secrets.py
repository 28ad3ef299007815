"""No key of the environment or of the command line appears in a run folder or in the output."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from made_up_keys import MADE_UP
from paths import ROOT
from processes import set_, start
from runs import TINY

from moe_dist.config.redact import has_secret

KEYS = {
    "HF_TOKEN": "hf_" + "aB3" * 11,
    "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG",
    "DATABASE_PASSWORD": "correct-horse",
}


@pytest.mark.timeout(120)
def test_run_keeps_and_prints_no_key_of_the_environment(small_text: Path, tmp_path: Path) -> None:
    """Checks a run with wandb, its report, its flight record, and the traceback of a run that
    a bug ended."""
    folder = tmp_path / "run"
    sets = set_(
        *TINY,
        "steps=2",
        "save_every=1",
        "write_report=true",
        "wandb.mode=offline",
        f"data.text={small_text}",
    )
    process = start("lstm_moe_demo", "--folder", str(folder), *sets, "--profile", **KEYS)
    said = "".join(process.communicate(timeout=100))
    assert process.returncode == 0, said
    kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    names = {path.relative_to(folder).parts[0] for path in kept}
    assert {"calls", "config.json", "metrics.jsonl", "report.html", "wandb", "checkpoints"} <= names
    for key in KEYS.values():
        assert key not in said and not [path for path, text in kept.items() if key.encode() in text]


def test_launch_scripts_and_redact_share_one_list() -> None:
    """The shell calls a program that imports only the standard library; its words may contain
    any bytes."""
    command = [
        sys.executable,
        "-I",
        "-X",
        "importtime",
        ROOT / "moe_dist" / "config" / "redact.py",
        *MADE_UP,
        "plain",
        b"\xff",
        "",
    ]
    done = subprocess.run(command, capture_output=True, check=True)
    assert done.stdout.split(b"\0") == [
        *(each.encode() for each in MADE_UP.values()),
        b"plain",
        b"\xff",
        b"",
        b"",
    ]
    assert not re.search(rb"\b(torch|numpy|moe_dist)\b", done.stderr)


def test_redacting_a_long_text_is_fast() -> None:
    start = time.process_time()
    texts = (
        "a.",
        "a",
        "aA1/",
        "://a:",
        "eyJ",
        "password",
        "a=",
        "?key",
        "://@:",
        "token=",
        "pass=a/",
        "auth: ",
        "secret:",
    )
    for text in (*texts, "basic aA1", "sk-a-", "/a=", "key-1", "://a: "):
        assert has_secret(text * 3000) in (True, False)
    assert time.process_time() - start < 3
