"""Pages that are written from the source: every error with its cure, the Python api; and that nothing is left out."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import REPO

import qkpatch
from qkpatch import errors
from qkpatch.errors import QKPatchError
from qkpatch.planning.request import Request, parse_request, parse_size
from qkpatch.sweeps.grid import read_grid

if str(REPO) not in sys.path:
    sys.path.insert(0, str(REPO))

from scripts.docs import documented
from scripts.docs.errors.package import Package
from scripts.docs.errors.source import says_something

ERRORS, API = (REPO / "docs" / name for name in ("errors.md", "api.md"))


@cache
def package() -> Package:
    return Package(REPO / "qkpatch")


def is_made(call: ast.Call, classes: set[str]) -> bool:
    return (call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")) in classes


@pytest.mark.long
def test_every_call_that_makes_an_error_was_read() -> None:
    classes = {
        name
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, QKPatchError)
    }
    trees = {module.name: module.tree for module in package().modules.values()}
    for tree in trees.values():
        classes |= {
            n.name
            for n in tree.body
            if isinstance(n, ast.ClassDef) and {ast.unparse(b) for b in n.bases} & classes
        }
    made = {
        (name, call.lineno)
        for name, tree in trees.items()
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and is_made(call, classes | {"BadParameter", "warned"})
    }
    assert len(list((REPO / "qkpatch").rglob("*.py"))) == len(trees)
    assert len(made) > 250
    # What makes its text of other things words it where it is defined, which is read.
    own = {name for name, kind in package().kinds.items() if "what" not in kind.takes}
    assert own == {"UnexpectedError", "WarnedError"}
    unread = made - {(one.module, one.line) for one in package().said}
    assert not {(name, call.lineno) for name, tree in trees.items() for call in ast.walk(tree)
                if isinstance(call, ast.Call) and is_made(call, classes - own)} & unread  # fmt: skip


@pytest.mark.long
def test_every_warning_is_made_where_the_page_finds_it() -> None:
    """Whatever is put into a list of warnings, or given by a function that is called after them."""
    for module in package().modules.values():
        nodes = [*ast.walk(module.tree)]
        short = {"say"} if any(ast.unparse(node) == "say = warnings.append" for node in nodes) else set()
        for node in nodes:
            put: list[ast.expr] = []
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {"warnings.append", *short}:
                put = node.args
            elif isinstance(node, ast.AugAssign | ast.Assign) and isinstance(node.value, ast.List):
                targets = [node.target] if isinstance(node, ast.AugAssign) else node.targets
                put = node.value.elts if any(ast.unparse(one) == "warnings" for one in targets) else []
            elif isinstance(node, ast.FunctionDef) and node.name.endswith("_warnings"):
                assert node.returns is not None
                assert "str" not in ast.unparse(node.returns), node.name
            for one in put:
                is_text = isinstance(one, ast.Constant | ast.JoinedStr | ast.BinOp)
                assert not is_text, f"{module.name}:{node.lineno}: say it with `warned`"  # type: ignore[attr-defined]


def warned_by(**said: Any) -> tuple[str, ...]:
    return qkpatch.plan(REPO / "demo" / "toy-0", **said).warnings


@pytest.mark.parametrize(
    "warnings",
    [
        lambda: warned_by(alpha=1),
        lambda: warned_by(channel="antisymmetric", modes=3),
        lambda: warned_by(exclude=["nothing-is-called-so"]),
    ],
)
def test_a_warning_that_is_met_is_found(warnings: Callable[[], tuple[str, ...]]) -> None:
    said = [one.what for one in package().said if one.kind == "Warnings" and says_something(one.what)]
    assert len(said) > 40
    met = warnings()
    assert met
    for warning in met:
        assert any(re.fullmatch(shape(what), flat(warning)) for what in said), warning


def flat(text: str) -> str:
    return " ".join(text.split())


def test_every_message_and_every_cure_is_on_the_page() -> None:
    page = flat(ERRORS.read_text("utf-8"))
    plain = page.replace("`", "")
    for one in package().said:
        if not one.is_passed_on:
            assert f"`{flat(one.what)}`" in page or f"`` {flat(one.what)} ``" in page, one
            cure = flat(one.fix).replace("`", "")
            assert cure in plain or not re.sub(r"\{[^{}]*\}", "", cure).strip(" ';:,"), one


def shape(template: str) -> str:
    """A pattern of what a template with {names} may become."""
    return ".*".join(map(re.escape, re.split(r"\{[^{}]*\}", flat(template))))


def broken(folder: Path) -> Path:
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    return folder


PROVOKED: dict[str, Callable[[Path], Any]] = {
    "a layer that is not there": lambda _: qkpatch.plan(REPO / "demo" / "toy-0", layers="99"),
    "a path that is not there": lambda _: qkpatch.plan("./nowhere/at/all"),
    "an unknown recipe": lambda _: qkpatch.plan(REPO / "demo" / "toy-0", recipe="lava"),
    "no weights": lambda folder: qkpatch.plan(folder),
    "a file that breaks off": lambda folder: qkpatch.plan(broken(folder)),
    "no manifest": lambda folder: qkpatch.verify(folder, REPO / "demo" / "toy-0"),
    "a number that is none": lambda _: Request.of(modes=0),
    "a share beyond 1": lambda _: Request.of(alpha=2.0),
    "a size that is none": lambda _: parse_size("5 gallons"),
    "no axis": lambda _: read_grid({"matched": True}),
    "YAML that is none": lambda _: parse_request(b"layers: [", "edit.yaml"),
    "OUT in SOURCE": lambda _: qkpatch.plan(REPO / "demo" / "toy-0", out=REPO / "demo" / "toy-0" / "out"),
}


@pytest.mark.parametrize("name", PROVOKED)
def test_an_error_that_is_met_is_found(name: str, tmp_path: Path) -> None:
    with pytest.raises(QKPatchError) as met:
        PROVOKED[name](tmp_path)
    error = met.value
    # Of a YAML file each fault is told, after its path.
    what = error.what.splitlines()[-1].partition("$: ")[2] or flat(error.what)
    found = [
        one
        for one in package().said
        if says_something(one.what)
        and re.fullmatch(shape(one.what), what)
        and issubclass(getattr(errors, one.kind, QKPatchError), type(error))
    ]  # fmt: skip
    assert found, f"{error!r} is not on the page"
    assert error.fix is None or any(re.fullmatch(shape(one.fix), flat(error.fix)) for one in found), error.fix


def test_what_no_error_says_is_not_found() -> None:
    said = [one.what for one in package().said if says_something(one.what)]
    assert not [what for what in said if re.fullmatch(shape(what), "the moon is made of cheese")]


def test_every_call_is_described_with_all_that_it_takes_and_gives() -> None:
    sections = dict(
        re.findall(r"^### (\w+)\n(.*?)(?=^##)", API.read_text("utf-8") + "\n## ", re.MULTILINE | re.DOTALL)
    )
    names = [name for name in dir(qkpatch) if not name.startswith("_") and callable(getattr(qkpatch, name))]
    assert set(qkpatch.api.__all__) <= set(names)
    for name in qkpatch.api.__all__:
        for parameter in inspect.signature(getattr(qkpatch, name)).parameters:
            assert re.search(rf"\b{parameter}\b", sections[name]), f"{name}: {parameter}"
    from qkpatch.compare.verify import Verification
    from qkpatch.planning.manifest import Manifest
    from qkpatch.planning.plan import EditPlan

    for kind in (EditPlan, Manifest, Request, Verification):
        for field in dataclasses.fields(kind):
            assert f"`{field.name}: " in sections[kind.__name__], f"{kind.__name__}: {field.name}"


def test_what_is_not_documented_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert documented.undocumented(REPO) == []
    asks = documented.parse_recipe
    monkeypatch.setattr(
        documented,
        "parse_recipe",
        lambda *given: (documented.Fields({}, "").take("novel", str, default=""), asks(*given)),
    )
    assert documented.undocumented(REPO) == ["novel: not in configs/README.md"]
