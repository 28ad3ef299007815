"""README.md and docs/: generated pages, links, names of commands and config fields, examples."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from paths import ROOT

from moe_dist.config import papers, validate
from moe_dist.config.overrides import dotted_keys

DOCS = ROOT / "docs"
# log.md and the paper map describe earlier states too, in their own words
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    ROOT / "ds_configs" / "README.md",
    *sorted(path for path in DOCS.rglob("*.md") if path.name != "log.md"),
]
MAX_README_LINES = 130
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
SECTIONS = "(?:mesh|batch|optim|data|model|wandb|fault_injection)"
INVENTED = "tests/unit/moe/gating/test_sigmoid_topk.py"  # of the example in add_a_gate.md
FENCE = re.compile(r"^( *)```.*?^\1```", re.MULTILINE | re.DOTALL)


def script(name: str) -> ModuleType:
    """Returns a script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def anchors(path: Path) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub builds them."""
    text = FENCE.sub("", path.read_text())
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def known_keys() -> set[str]:
    """Returns the config fields of all named configs."""
    keys: set[str] = set()
    for make in papers.CONFIGS.values():
        keys |= dotted_keys(make()).keys()
    return keys


def test_reference_pages_equal_the_code() -> None:
    """`.venv/bin/python docs/make_reference.py` writes them again."""
    for path, text in script("make_reference").pages().items():
        assert path.read_text() == text, f"{path.name}: run docs/make_reference.py"


def test_reference_has_every_field_and_range() -> None:
    text = (DOCS / "reference" / "config.md").read_text()
    for key in known_keys():
        assert f"| `{key}` |" in text
    last_parts = {key.rpartition(".")[2] for key in known_keys()}
    assert set(script("make_reference").UNITS) <= last_parts & validate.RANGES.keys()


def test_architecture_picture_equals_its_script() -> None:
    module = script("architecture")
    assert module.FILE.read_text() == module.draw()


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda path: str(path.relative_to(ROOT))
)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in LINK.findall(FENCE.sub("", page.read_text())):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_and_keys_exist(page: Path) -> None:
    text = page.read_text()
    keys = known_keys()
    for key in re.findall(r"--set '?([a-z_][\w.]*)=", text):
        assert key in keys, f"{page.name}: --set {key}"
    for key in re.findall(rf"`({SECTIONS}\.[a-z_0-9.]+)(?==|`)", text):
        is_module = (ROOT / "moe_dist" / key.replace(".", "/")).with_suffix(".py").exists()
        assert key in keys or key.endswith(".py") or is_module, f"{page.name}: {key}"
    for module in re.findall(r"python -m (moe_dist[\w.]*)", text):
        path = ROOT / module.rstrip(".").replace(".", "/")
        assert (path / "__main__.py").exists(), f"{page.name}: python -m {module}"
    for name in re.findall(r"\b(?:tests|benchmarks|experiments|launch|docker)/[\w/]+\.\w+\b", text):
        if name != INVENTED:
            assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_changelog_maps_old_fields_to_fields() -> None:
    """Each row of its table has fields that exist, and old ones that do not."""
    text = (ROOT / "CHANGELOG.md").read_text()
    table = text.partition("**Config fields**")[2].partition("**Values**")[0]
    rows = [line.split("|")[1:3] for line in table.splitlines() if line.startswith("| `")]
    assert len(rows) > 25
    keys = known_keys()
    for old, new in rows:
        for key in re.findall(r"`([\w.]+)`", new):
            assert key in keys, key
        for key in re.findall(r"`([\w.]+)`", old):
            assert key not in keys, key


def test_named_configs_of_commands_exist() -> None:
    for page in PAGES:
        for name in re.findall(r"(?:train\.py |CONFIG=)([a-z]\w*_\w+)", page.read_text()):
            assert name in papers.CONFIGS, f"{page.name}: {name}"


def test_messages_of_troubleshooting_exist() -> None:
    """Each part of a quoted message, between its dots, is somewhere in the code."""
    files = [ROOT / "train.py", *(ROOT / "moe_dist").rglob("*.py"), *(ROOT / "launch").glob("*.sh")]
    code = "\n".join(path.read_text() for path in files)
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # adjacent parts of one string
    page = (DOCS / "how_to" / "when_something_goes_wrong.md").read_text()
    messages = re.findall(r"^\| (?:[^`|]*)`([^`]* [^`]*)` \|", page, re.MULTILINE)
    assert len(messages) >= 9
    for message in messages:
        for part in re.split(r"\.\.\.|^error: |^warning: ", message):
            assert part.strip(" :;") in code, f"{message}: {part}"


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= MAX_README_LINES


def test_every_page_is_in_an_index() -> None:
    index = (DOCS / "README.md").read_text()
    for page in DOCS.rglob("*.md"):
        if page != DOCS / "README.md":
            assert f"({page.relative_to(DOCS)})" in index, page.name


def test_example_of_a_gate_runs() -> None:
    text = (DOCS / "how_to" / "add_a_gate.md").read_text()
    names: dict[str, Any] = {"__name__": "example"}
    for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        exec(compile(block, "add_a_gate.md", "exec"), names)
    assert names["y_TD"].shape == (24, 16)
    assert names["stats"].load_E.sum() == 48
    assert all(p.grad is not None and p.grad.any() for p in names["layer"].parameters())
