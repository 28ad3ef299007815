"""No key of the environment, and none of the command line, gets into what a run keeps or says."""

from pathlib import Path

import pytest
from processes import set_, start
from runs import TINY, tiny

from moe_dist.config import check

KEYS = {
    "HF_TOKEN": "hf_" + "aB3" * 11, "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG", "DATABASE_PASSWORD": "correct-horse",
}  # fmt: skip


@pytest.mark.timeout(120)
def test_keys_of_the_environment_are_nowhere(small_text: Path, tmp_path: Path) -> None:
    """In a run with wandb, its report, its record of calls, and the traceback of one that a bug has ended."""
    folder = tmp_path / "run"
    sets = set_(*TINY, "steps=2", "save_every=1", "report=true", "wandb.mode=offline", f"data.text={small_text}")
    process = start("lstm_moe_demo", "--folder", str(folder), *sets, "--profile", **KEYS)
    said = "".join(process.communicate(timeout=100))
    assert process.returncode == 0, said
    kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    names = {path.relative_to(folder).parts[0] for path in kept}
    assert {"calls", "config.json", "metrics.jsonl", "report.html", "wandb", "checkpoints"} <= names
    for key in KEYS.values():
        assert key not in said and not [path for path, text in kept.items() if key.encode() in text]


@pytest.mark.parametrize(
    "text",
    [
        "https://me:pass@host/data",
        KEYS["HF_TOKEN"],
        "s3://key:secret@bucket/x",
        "ghp_0123456789abcdef",
        "sk-proj-0123456789abcdef",
        "AKIA0123456789ABCDEF",
        "https://me:pa/ss@host/data",
        "https://host/data?access_token=0123",
        "s3://bucket/x?a=1&X-Amz-Signature=0123",
    ],
)
def test_a_key_in_a_config_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(ValueError, match=r"^data.text holds what looks like a password or a key") as error:
        check(tiny(f"data.text={text}"))
    assert text not in str(error.value) and "HF_TOKEN" in str(error.value)
    for wrong in (f"wandb.api={text}", f"zero={text}", text):
        with pytest.raises(ValueError, match=r"^--set") as error:
            tiny(wrong)
        assert text not in str(error.value)
    for name in ("hub/snapshots/0123456789abcdef0123456789abcdef", "hf_datasets_of_everybody/*.txt", "hf_tokenizers"):
        check(tiny(f"data.text={name}"))  # names of folders are none
