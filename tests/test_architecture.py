"""The house rules as a test: who may import whom, and who may import which library."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "qkpatch"

# From the ground up: a module may import only from floors below its own, or beside it in its own room.
FLOORS = [
    ["redaction"],
    ["errors", "interrupts"],
    ["spectral", "checkpoint", "selection", "strict", "rows", "crew", "canonical", "wrapping"],
    ["recipe", "refusals", "fp8", "difference", "writing"],
    ["recipe_file", "heads", "request", "describe", "diff", "diff_text", "front_matter", "results"],
    ["catalogue", "tower", "budget", "device"],
    ["locate", "targets", "choice"],
    ["model"],
    ["settings", "weights"],
    ["plan", "diagnosis"],
    ["manifest_check"],
    ["manifest", "spectra"],
    ["sources", "sums", "card", "withheld", "comparing"],
    ["takeover", "agreement"],
    ["copier", "verify", "publication"],
    ["replacing", "editing"],
    ["patch"],
    ["console", "options"],
    ["tables"],
    ["boundary"],
    ["commands"],
    ["cli"],
    ["__main__"],
]
ROOMS = ("spectral", "checkpoint", "diagnosis", "commands")

# Each of these is used in one place only.
ONLY_IN = {
    "typer": {
        "cli", "options", "boundary",
        "commands.card", "commands.diff", "commands.edit", "commands.inspect", "commands.verify", "commands.recipes",
    },
    "rich": {"console", "tables"},
    "yaml": {"strict"},
    "huggingface_hub": {
        "checkpoint.hub", "checkpoint.hub_cache", "checkpoint.hub_errors", "checkpoint.hub_token",
        "checkpoint.transfer", "checkpoint.publish",
    },
    "safetensors": {"comparing"},
    "torch": {
        "weights", "spectra", "editing", "device", "spectral.product", "spectral.edit", "spectral.rounding",
        "spectral.fp8", "spectral.change",
    },
    "click": set(),  # Typer vendors its own
}  # fmt: skip
# Pure maths: nothing of files, text formats or output.
FORBIDDEN_IN_SPECTRAL = {"pathlib", "os", "io", "json", "yaml", "logging", "rich", "typer", "safetensors"}


def modules() -> dict[str, Path]:
    names = {
        p.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): p for p in PACKAGE.rglob("*.py")
    }
    return {name.removesuffix(".__init__"): path for name, path in names.items() if name != "__init__"}


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
            if node.module == "qkpatch":
                found.update(f"qkpatch.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


def floor(module: str) -> int:
    room = module.split(".")[0]
    return next(number for number, names in enumerate(FLOORS) if room in names)


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_run_downwards(module: str) -> None:
    for imported in imports(modules()[module]):
        if not imported.startswith("qkpatch.") or imported in ("qkpatch.__version__",):
            continue
        target = imported.removeprefix("qkpatch.")
        if target in modules():
            same_room = module.split(".")[0] == target.split(".")[0] and module.split(".")[0] in ROOMS
            assert same_room or floor(target) < floor(module), f"{module} imports {target}"


@pytest.mark.parametrize("module", sorted(modules()))
def test_each_library_is_used_in_its_one_place(module: str) -> None:
    used = {name.split(".")[0] for name in imports(modules()[module])}
    for library, places in ONLY_IN.items():
        assert library not in used or module in places, f"{module} imports {library}"


@pytest.mark.parametrize("module", sorted(m for m in modules() if m.startswith("spectral")))
def test_the_maths_knows_no_files(module: str) -> None:
    assert not imports(modules()[module]) & FORBIDDEN_IN_SPECTRAL


@pytest.mark.parametrize("module", sorted(m for m in modules() if m.startswith("checkpoint")))
def test_the_files_know_no_maths(module: str) -> None:
    assert not {name.split(".")[0] for name in imports(modules()[module])} & {"torch", "numpy", "math"}


def test_every_module_has_a_floor() -> None:
    listed = {name for names in FLOORS for name in names}
    assert listed == {name.split(".")[0] for name in modules()}


@pytest.mark.parametrize("module", sorted(modules()))
def test_a_module_can_be_read_in_one_sitting(module: str) -> None:
    lines = modules()[module].read_text().splitlines()
    assert len(lines) <= 350, f"{module} has {len(lines)} lines"


@pytest.mark.parametrize(
    "code",
    [
        "import qkpatch.cli",
        "import qkpatch.plan, qkpatch.manifest, qkpatch.console, qkpatch.diagnosis.explain",
        "from qkpatch.catalogue import shipped_recipes; shipped_recipes()",
    ],
)
def test_help_plans_and_recipes_need_no_torch(code: str) -> None:
    check = f"{code}; import sys; assert not {{'torch', 'numpy', 'huggingface_hub'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_the_forbidden_would_be_noticed(tmp_path: Path) -> None:
    sample = tmp_path / "sample.py"
    sample.write_text("def f():\n    import json\n    from qkpatch import cli\n")
    assert imports(sample) == {"json", "qkpatch", "qkpatch.cli"}
