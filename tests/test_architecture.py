"""The house rules as a test: which rooms there are, who may import whom, and who may import which library."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import portable
import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "qkpatch"

# The arrows between rooms. Whoever needs a new one says why in docs/architecture.md, whose diagram is this table.
ARROWS = {
    "__main__": {"cli"},
    "cli": {
        "api", "cluster", "sweeps", "adapters", "compare", "evaluation", "diagnosis", "reports", "publishing",
        "patching", "planning", "model", "recipes", "output", "hub", "checkpoint", "spectral", "common", "errors",
    },
    "api": {
        "uploads", "cluster", "sweeps", "adapters", "compare", "evaluation", "publishing", "patches", "patching",
        "planning", "model", "output", "checkpoint", "common", "errors",
    },
    "cluster": {
        "uploads", "compare", "patching", "planning", "model", "output", "stores", "checkpoint", "common", "errors",
    },
    "uploads": {
        "compare", "patching", "planning", "model", "output", "stores", "checkpoint", "common", "errors",
    },
    "sweeps": {
        "adapters", "compare", "evaluation", "patches", "reports", "publishing", "patching", "planning", "model",
        "recipes", "output", "checkpoint", "spectral", "common", "errors",
    },
    "adapters": {
        "compare", "publishing", "patching", "planning", "model", "recipes", "output", "checkpoint", "spectral",
        "common", "errors",
    },
    "compare": {
        "publishing", "patching", "planning", "model", "recipes", "output", "stores", "checkpoint", "common", "errors",
    },
    "evaluation": {"patching", "planning", "model", "spectral", "checkpoint", "common", "errors"},
    "diagnosis": {"model", "recipes", "checkpoint", "common", "errors"},
    "reports": {"errors"},
    "publishing": {"planning", "recipes", "hub", "checkpoint", "common", "errors"},
    "patches": {"patching", "planning", "output", "checkpoint", "common", "errors"},
    "patching": {"planning", "model", "recipes", "output", "checkpoint", "spectral", "common", "errors"},
    "planning": {"model", "recipes", "output", "checkpoint", "spectral", "common", "errors"},
    "model": {"recipes", "hub", "stores", "checkpoint", "common", "errors"},
    "recipes": {"checkpoint", "common", "errors"},
    "hub": {"stores", "checkpoint", "common", "errors"},
    "stores": {"checkpoint", "common", "errors"},
    "output": {"checkpoint", "common", "errors"},
    "checkpoint": {"common", "errors"},
    "spectral": {"errors"},
    "common": {"errors"},
    "errors": set(),
}  # fmt: skip

# Each of these is used in one place only.
ONLY_IN = {
    "typer": {"cli"},
    "rich": {"cli"},
    "yaml": {"common"},
    "huggingface_hub": {"hub", "checkpoint.cache"},
    "fsspec": {"stores"},
    "safetensors": {"compare.byte_by_byte"},
    "ray": {"cluster.on_ray"},
    "torch": {"spectral", "patching", "compare.values", "adapters.factors", "evaluation.subject"},
    "numpy": {"evaluation"},
    "matplotlib": {"reports.plot"},
    "ctypes": {"common.system"},
    "fcntl": {"common.system"},
    "click": set(),  # Typer vendors its own
}
TORCH_FREE = {"patching.apply", "patching.copier", "patching.inspection", "patching.checked_sources",
              "patching.threads"}  # fmt: skip
# Pure maths: nothing of files, text formats or output.
FORBIDDEN_IN_SPECTRAL = {"pathlib", "os", "io", "json", "yaml", "logging", "rich", "typer", "safetensors"}
MOST_LINES, MOST_MODULES = 350, 12  # of a module, and in a room


@cache
def modules() -> dict[str, Path]:
    names = {
        p.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): p for p in PACKAGE.rglob("*.py")
    }
    return {name.removesuffix(".__init__"): path for name, path in names.items() if name != "__init__"}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def imports(path: Path) -> set[str]:
    """Every module imported anywhere in a file; names under ``if TYPE_CHECKING`` do not run and do not count."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            found.add(node.module or "")
            if node.module is not None and node.module.startswith("qkpatch"):
                found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree(path))
    return found


def of_linux(path: Path) -> set[str]:
    """What only Linux has, as far as a file names it: attributes of ``os``, and paths below which the kernel tells."""
    found: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            found |= {node.attr} & portable.OF_LINUX
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            found |= {alias.name for alias in node.names} & portable.OF_LINUX
        elif isinstance(node, ast.Attribute) and node.attr == "SIGHUP":
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= set(re.findall(r"^/(?:proc|sys|dev/fd)\b", node.value))
    return found


def room(module: str) -> str:
    return module.split(".")[0]


def rooms_used(module: str) -> set[str]:
    """The rooms that a module imports from, its own aside."""
    names = {
        name.removeprefix("qkpatch.") for name in imports(modules()[module]) if name.startswith("qkpatch.")
    }
    return {room(name) for name in names if room(name) in ARROWS} - {room(module)}


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_follow_the_arrows(module: str) -> None:
    assert rooms_used(module) <= ARROWS[room(module)], module


def test_there_is_no_arrow_that_nothing_uses() -> None:
    used: dict[str, set[str]] = {name: set() for name in ARROWS}
    for module in modules():
        used[room(module)] |= rooms_used(module)
    assert used == ARROWS


def test_arrows_only_run_down() -> None:
    order = list(ARROWS)
    for upper, lowers in ARROWS.items():
        assert all(order.index(lower) > order.index(upper) for lower in lowers), upper


def test_every_module_has_a_room() -> None:
    assert {path.name for path in PACKAGE.glob("*.py")} == {
        "__init__.py",
        "__main__.py",
        "api.py",
        "errors.py",
    }
    assert set(ARROWS) == {room(module) for module in modules()}


@pytest.mark.parametrize(
    "name", sorted(path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("__init__.py"))
)
def test_a_room_can_be_looked_over(name: str) -> None:
    folder = PACKAGE / name
    assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= MOST_MODULES
    docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
    assert docstring, f"{name} does not say what it is"


def test_the_map_names_every_room() -> None:
    text = (PACKAGE / "__init__.py").read_text()
    assert re.findall(r"^\* ``(\w+)``", text, re.M) == [name for name in ARROWS if name != "__main__"]


def test_the_diagram_is_this_table() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    drawn: dict[str, set[str]] = {name: set() for name in ARROWS}
    for upper, lower in re.findall(r"^\s+(\w+) --> (\w+)$", text, re.M):
        drawn[upper].add(lower)
    # What everything uses would hide the rest.
    hidden = {"common", "errors", "checkpoint"}
    assert drawn == {name: (set() if name in hidden else to - hidden) for name, to in ARROWS.items()}


def test_the_page_names_modules_that_are_there() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = {name.replace("/", ".") for name in re.findall(r"`((?:[a-z_0-9]+/)+[a-z_0-9]+)`", text)}
    assert len(named) > 50
    assert named <= {*modules()}


@pytest.mark.parametrize("module", sorted(modules()))
def test_each_library_is_used_in_its_one_place(module: str) -> None:
    used = {name.split(".")[0] for name in imports(modules()[module])}
    for library, places in ONLY_IN.items():
        is_its_place = room(module) in places or module in places
        assert library not in used or is_its_place, f"{module} imports {library}"
    if module in TORCH_FREE:
        assert "torch" not in used


@pytest.mark.parametrize("module", sorted(modules()))
def test_what_only_linux_has_is_named_in_one_module(module: str) -> None:
    found = of_linux(modules()[module])
    assert found == (portable.OF_LINUX | {"/proc", "/dev/fd"} if module == "common.system" else set())


@pytest.mark.parametrize("module", sorted(m for m in modules() if m.startswith("spectral")))
def test_the_maths_knows_no_files(module: str) -> None:
    assert not imports(modules()[module]) & FORBIDDEN_IN_SPECTRAL


@pytest.mark.parametrize(
    "module", sorted(m for m in modules() if m.startswith(("checkpoint", "output", "hub", "stores")))
)
def test_the_files_know_no_maths(module: str) -> None:
    assert not {name.split(".")[0] for name in imports(modules()[module])} & {"torch", "numpy", "math"}


@pytest.mark.parametrize("module", sorted(modules()))
def test_a_module_can_be_read_in_one_sitting(module: str) -> None:
    lines = modules()[module].read_text().splitlines()
    assert len(lines) <= MOST_LINES, f"{module} has {len(lines)} lines"


@pytest.mark.parametrize(
    "code",
    [
        "import qkpatch, qkpatch.api; qkpatch.plan",
        "import qkpatch.cli",
        "import qkpatch.planning.plan, qkpatch.planning.manifest, qkpatch.cli.console, qkpatch.diagnosis.explain",
        "from qkpatch.recipes.catalogue import shipped_recipes; shipped_recipes()",
    ],
)
def test_help_plans_and_recipes_need_no_torch(code: str) -> None:
    unwanted = {"torch", "numpy", "huggingface_hub", "matplotlib", "fsspec"}
    check = f"{code}; import sys; assert not {unwanted} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_the_forbidden_would_be_noticed(tmp_path: Path) -> None:
    sample = tmp_path / "sample.py"
    sample.write_text("def f():\n    import json\n    from qkpatch import cli\n")
    assert imports(sample) == {"json", "qkpatch", "qkpatch.cli"}
