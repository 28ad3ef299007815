"""Rules of the code's structure: imports lead down, and each risk is in one place."""

import ast
import contextlib
import importlib
import re
import shutil
from pathlib import Path

import pytest
from paths import ROOT

PACKAGE = ROOT / "moe_dist"

# the floors of the package: an import leads to a lower floor, or stays inside its own package
FLOORS = (
    ("config", "nn"),
    ("monitoring",),
    ("distributed", "data", "report"),
    ("moe", "optim"),
    ("models", "engine"),
    ("tasks", "checkpoint"),
    ("training",),
    ("planner", "verify", "inference"),
)
FLOOR = {package: floor for floor, packages in enumerate(FLOORS) for package in packages}
MOST_ENTRIES = 20  # of moe_dist/


def files() -> list[Path]:
    return [
        path
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "__init__.py" or path.parent != PACKAGE
    ]


def part(path: Path) -> str:
    """Returns the first name below the package: `moe` of moe_dist/moe/dispatch/all_to_all.py."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path: Path) -> set[str]:
    """Returns the full names of everything that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def import_graph(package: Path) -> dict[str, set[str]]:
    """Returns for each module of the package the modules that it imports, by dotted name
    without the package's own."""
    modules = {
        ".".join(path.relative_to(package).with_suffix("").parts): path
        for path in package.rglob("*.py")
    }
    modules = {name.removesuffix("__init__").rstrip("."): path for name, path in modules.items()}
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for name, path in modules.items():
        for full in imported(path):
            if full.split(".")[0] == package.name:
                target = full.removeprefix(package.name).lstrip(".")
                while target not in modules:  # a name inside a module
                    target = target.rpartition(".")[0]
                graph[name].add(target)
    return graph


def upward(graph: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Returns the imports that lead to a package of the same or of a higher floor."""
    return [
        (name, target)
        for name, targets in graph.items()
        for target in sorted(targets)
        if name and target and name.split(".")[0] != target.split(".")[0]
        if FLOOR[name.split(".")[0]] <= FLOOR[target.split(".")[0]]
    ]


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Returns the modules of one import cycle, in order; empty if there is none."""
    done: set[str] = set()

    def search(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name not in done:
            for target in sorted(graph[name]):
                if found := search(target, [*way, name]):
                    return found
            done.add(name)
        return []

    return next((found for name in graph if (found := search(name, []))), [])


def test_imports_lead_down() -> None:
    graph = import_graph(PACKAGE)
    assert upward(graph) == []
    assert {name.split(".")[0] for name in graph if name} == FLOOR.keys()
    assert len(FLOORS) <= 8


def test_imports_have_no_cycle() -> None:
    assert circle(import_graph(PACKAGE)) == []


def test_the_package_has_few_entries() -> None:
    assert len([path for path in PACKAGE.iterdir() if path.name != "__pycache__"]) <= MOST_ENTRIES


@pytest.mark.parametrize("inside_function", [False, True])
def test_reversed_import_is_found(inside_function: bool, tmp_path: Path) -> None:
    """One module imports another that already imports it."""
    package = tmp_path / "moe_dist"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", "*.xz"))
    lower = package / "moe" / "routing.py"
    line = "from moe_dist.engine.parallelize import parallelize"
    lower.write_text(
        lower.read_text() + (f"\n\ndef late():\n    {line}\n" if inside_function else f"\n{line}\n")
    )
    graph = import_graph(package)
    assert upward(graph) == [("moe.routing", "engine.parallelize")]
    assert {"moe.routing", "engine.parallelize"} <= set(circle(graph))


def crosses(path: Path) -> bool:
    """Returns True for a gate that imports a dispatcher, and for a dispatcher that imports a gate."""
    others = {"gating": "moe_dist.moe.dispatch", "dispatch": "moe_dist.moe.gating"}
    other = others.get(path.parent.name)
    return other is not None and any(name.startswith(other) for name in imported(path))


def test_gating_and_dispatch_meet_only_in_routing(tmp_path: Path) -> None:
    assert [path for path in files() if crosses(path)] == []
    gate = tmp_path / "gating" / "gate.py"
    gate.parent.mkdir()
    gate.write_text("from moe_dist.moe.dispatch.local import LocalDispatcher\n")
    assert crosses(gate)


def test_config_imports_no_torch() -> None:
    for path in [PACKAGE / "training" / "args.py", *(PACKAGE / "config").rglob("*.py")]:
        assert not any(name.split(".")[0] == "torch" for name in imported(path)), path


def test_deepspeed_is_imported_once() -> None:
    uses = [
        path for path in files() for name in imported(path) if name.split(".")[0] == "deepspeed"
    ]
    assert uses == [PACKAGE / "engine" / "deepspeed.py"]


def imports_triton_at_top(source: str) -> bool:
    """Returns True if code imports Triton, or the file of its kernels, outside of functions."""
    top = [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)]
    return any(re.search(r"\btriton\b|triton_kernels", ast.unparse(node)) for node in top)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import triton", True),
        ("from triton import language", True),
        ("from moe_dist.moe.kernels import triton_kernels", True),
        ("def f():\n    import triton", False),
        ("from moe_dist.moe.kernels import triton_ffn", False),
    ],
)
def test_search_for_triton_imports(source: str, expected: bool) -> None:
    assert imports_triton_at_top(source) == expected


def test_triton_is_imported_lazily_by_its_kernels() -> None:
    """Only triton_kernels.py imports Triton at its top, and no other module imports that file
    at its top, so that nothing fails without Triton."""
    uses = [path for path in files() if imports_triton_at_top(path.read_text())]
    assert uses == [PACKAGE / "moe" / "kernels" / "triton_kernels.py"]


def test_torchvision_is_imported_once() -> None:
    uses = re.compile(r"(import|from) torchvision\b|import_module\(.torchvision")
    assert [path for path in files() if uses.search(path.read_text())] == [
        PACKAGE / "data" / "images" / "torchvision_import.py"
    ]


def test_only_distributed_imports_torch_distributed() -> None:
    """Models, gating and all others do not; checkpoint uses torch.distributed.checkpoint and
    torch.distributed.tensor."""
    for path in files():
        if part(path) != "distributed":
            uses = {n for n in imported(path) if n.startswith("torch.distributed")}
            allowed = ("torch.distributed.checkpoint", "torch.distributed.tensor")
            assert (
                part(path) == "checkpoint" and all(n.startswith(allowed) for n in uses)
            ) or not uses, path


def test_only_collectives_call_all_to_all() -> None:
    for path in files():
        assert (
            path.name in ("collectives.py", "chunked_all_to_all.py")
            or "dist.all_to_all" not in path.read_text()
        ), path


def branches(path: Path) -> list[str]:
    """Returns the source of every condition: if, while, conditional expression, assertion,
    match, comprehension."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    tests = [n.test for n in nodes if isinstance(n, ast.If | ast.While | ast.IfExp | ast.Assert)]
    tests += [n.subject for n in nodes if isinstance(n, ast.Match)]
    tests += [test for n in nodes if isinstance(n, ast.comprehension) for test in n.ifs]
    return [ast.unparse(test) for test in tests]


SIZE = r"(world|world_size|ep|edp|dp)\b(\.size)?"
COMPARE = r"\s*(==|!=|<=|>=|<|>)\s*"
ABOUT_SIZE = re.compile(rf"\b{SIZE}{COMPARE}|{COMPARE}(\w+\.)*{SIZE}|\.size\b(?!\()")


def test_nothing_branches_on_the_world_size() -> None:
    """A world of one runs the same lines as a world of many. Exceptions: collectives may skip
    a call, parallelize chooses the dispatcher, the mesh rejects impossible layouts, verify and
    the planner list layouts, fault injection picks a rank."""
    free = (
        "collectives.py",
        "parallelize.py",
        "mesh.py",
        "launch_env.py",
        "batch_layout.py",
        "certificate.py",
        "fault_injection.py",
        "cost_model.py",
        "planner/search.py",
        "verify/__main__.py",
    )
    for path in [*files(), ROOT / "train.py"]:
        if not str(path).endswith(free):
            assert not [b for b in branches(path) if ABOUT_SIZE.search(b)], path


def test_branch_finder_finds_a_branch(tmp_path: Path) -> None:
    path = tmp_path / "guilty.py"
    path.write_text(
        "if mesh.ep.size == 1:\n    pass\nx = 1 if 1 < config.world else 2\ny = [s for s in x if s "
        "<= step]\n"
    )
    assert branches(path) == ["mesh.ep.size == 1", "1 < config.world", "s <= step"]
    assert [bool(ABOUT_SIZE.search(b)) for b in branches(path)] == [True, True, False]


UNKEYED = re.compile(
    r"torch\.(rand|randn|randint|randperm|normal|bernoulli|multinomial|poisson|manual_seed)(_like)?\b|Dropout|F\.dropout"
    r"|functional\.\w*dropout|dropout_p|LSTM\([^)]*dropout|\brandom\.\w+\(|np\.random|import random\b"
    r"|\.(bernoulli|normal|exponential|random|xavier_\w+|kaiming_\w+|trunc_normal|orthogonal|geometric|cauchy)_\("
)


@pytest.mark.parametrize(
    "line",
    [
        "torch.randn_like(x)",
        "torch.nn.functional.dropout(x)",
        "nn.init.xavier_uniform_(w)",
        "nn.Dropout(0.1)",
        "random.shuffle(x)",
    ],
)
def test_randomness_search_finds_unkeyed_calls(line: str) -> None:
    assert UNKEYED.search(line)


def test_no_unkeyed_randomness() -> None:
    """nn/prng.py makes every random number; nn/init.py draws initial weights from its
    generators."""
    for path in [*files(), ROOT / "train.py"]:
        found = UNKEYED.search(path.read_text())
        assert found is None, f"{path.relative_to(ROOT)}: {found and found.group()}"
        if path.name not in ("init.py", "prng.py"):
            assert "uniform_(" not in path.read_text(), path


def test_every_named_equation_maps_to_code_and_a_test() -> None:
    """Every function and test named in docs/paper_map.md exists."""
    text = (ROOT / "docs" / "paper_map.md").read_text()
    targets = re.findall(r"`((?:moe_dist|tests)/[\w/]+\.py)::(\w+)(?:\.(\w+))?`", text)
    assert len(targets) > 20
    for file, name, method in targets:
        source = (ROOT / file).read_text()
        assert re.search(rf"^(def|class) {name}\b|^{name}\b.*=", source, re.M), f"{file}::{name}"
        assert not method or re.search(rf"^    def {method}\b", source, re.M), (
            f"{file}::{name}.{method}"
        )


def unresolved_imports(path: Path) -> list[str]:
    """Returns the names that a script imports from the package and that do not exist."""
    missing = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE.name:
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                if not hasattr(module, alias.name):
                    with contextlib.suppress(ModuleNotFoundError):
                        importlib.import_module(f"{node.module}.{alias.name}")
                        continue
                    missing.append(f"{path.relative_to(path.parents[1])}: {alias.name}")
    return missing


def test_scripts_outside_the_package_import_names_that_exist(tmp_path):
    scripts = [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("experiments/**/*.py")]
    assert len(scripts) > 10
    assert [name for script in scripts for name in unresolved_imports(script)] == []

    moved = tmp_path / "benchmarks" / "moved.py"
    moved.parent.mkdir()
    moved.write_text("from moe_dist.moe import layer\nfrom moe_dist.moe.layer import Layer, MoE\n")
    assert unresolved_imports(moved) == ["benchmarks/moved.py: Layer"]
