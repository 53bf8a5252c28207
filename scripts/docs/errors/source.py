"""The package's source as it is read for its errors: modules, functions, classes, and names for what is in them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef

# These give back what they are given, as text.
SHOWING = {"str", "repr", "ascii", "sorted", "list", "tuple", "set", "some", "cut", "format_ranges", "exact", "map",
           "quote", "_show", "_shown"}  # fmt: skip
_COMMENT = re.compile(r"\S  # (?!type:|noqa|fmt:|pragma)(.*)$")
_SLOT = re.compile(r"\{[^{}]*\}")


@dataclass(frozen=True)
class Kind:
    """A class of errors."""

    name: str
    base: str
    module: str
    exit_code: int
    meaning: str
    takes: tuple[str, ...]  # what is given without its name


@dataclass(frozen=True)
class Said:
    """One thing that an error may say, and the call that says it."""

    kind: str
    what: str
    where: str
    fix: str
    module: str
    line: int

    @property
    def texts(self) -> tuple[str, str, str]:
        """What, where and how to fix it."""
        return self.what, self.where, self.fix

    @property
    def is_passed_on(self) -> bool:
        """Whether it only repeats what another error says, of another place, with its cure."""
        return not says_something(self.what) and not says_something(self.fix)


def says_something(text: str) -> bool:
    """Whether there is more in a text than names in braces."""
    return bool(_SLOT.sub("", text).strip(" \n':;,()"))


@dataclass(eq=False)
class Module:
    """A file of the package, with the texts that have a name in it."""

    name: str
    tree: ast.Module
    constants: dict[str, ast.expr] = field(default_factory=dict)
    imported: dict[str, tuple[str, str]] = field(default_factory=dict)
    comments: dict[int, str] = field(default_factory=dict)  # by the line that they end


@dataclass(frozen=True)
class Place:
    """A function, the class that it is a method of, and what is in it."""

    module: Module
    owner: str
    function: Function
    calls: Sequence[ast.Call]
    results: Sequence[ast.Return]
    assigned: Sequence[tuple[set[str], set[str]]]  # names, and those that they are made of

    @classmethod
    def of(cls, module: Module, owner: str, function: Function) -> Place:
        """Gone through once."""
        nodes = list(ast.walk(function))
        assigned = []
        for node in nodes:
            if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign) and node.value is not None:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                assigned.append(
                    ({name for target in targets for name in names_in(target)}, names_in(node.value))
                )
        calls = [node for node in nodes if isinstance(node, ast.Call)]
        return cls(module, owner, function, calls, [n for n in nodes if isinstance(n, ast.Return)], assigned)

    @property
    def takes(self) -> tuple[str, ...]:
        """Its parameters, in their order."""
        return tuple(a.arg for a in self.function.args.args if a.arg not in ("self", "cls"))

    @property
    def defaults(self) -> dict[str, ast.expr]:
        """What its parameters are where nothing is given."""
        of = self.function.args
        last = dict(zip([a.arg for a in of.args][::-1], of.defaults[::-1], strict=False))
        by_name = zip(of.kwonlyargs, of.kw_defaults, strict=True)
        return last | {a.arg: value for a, value in by_name if value is not None}


def module_of(root: Path, path: Path) -> Module:
    """A file of the package that lies in ``root``."""
    name = (
        path.relative_to(root.parent).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
    )
    text = path.read_text("utf-8")
    made = Module(name, ast.parse(text))
    for number, line in enumerate(text.splitlines(), 1):
        if (found := _COMMENT.search(line)) is not None:
            made.comments[number] = found[1]
    for node in ast.walk(made.tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                made.imported[alias.asname or alias.name] = node.module or "", alias.name
    for node in made.tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                made.constants[ast.unparse(target)] = node.value
    return made


def functions(tree: ast.AST, owner: str = "") -> Iterator[tuple[str, Function]]:
    """Every function, with the class that it is a method of."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.stmt):
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield owner, node
        yield from functions(node, node.name if isinstance(node, ast.ClassDef) else owner)


def names_in(node: ast.AST) -> set[str]:
    """The variables in an expression."""
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}


def words(name: str) -> str:
    """A name as words."""
    return name.strip("_").replace("_", " ").lower()


def slot(node: ast.AST) -> str:
    """A name for what is only known when the program runs."""
    if isinstance(node, ast.Name):
        return words(node.id)
    if isinstance(node, ast.Attribute):
        if node.attr in ("what", "strerror"):
            return "error" if node.attr == "what" else "reason"
        is_vague = node.attr in ("name", "value", "path", "prefix", "shape", "dtype", "shard")
        owner = slot(node.value) if is_vague and called(node.value) not in ("self", "") else ""
        return f"{owner} {words(node.attr)}".strip()
    if isinstance(node, ast.Subscript | ast.Starred | ast.Await):
        return slot(node.value)
    if isinstance(node, ast.GeneratorExp | ast.ListComp | ast.SetComp):
        return slot(node.generators[0].iter)
    if isinstance(node, ast.Call):
        name = called(node.func)
        keys = [str(a.value) for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        if name in ("get", "getattr") and keys:
            return words(keys[0])
        if name == "len" and node.args:
            return f"number of {slot(node.args[0])}"
        if name in SHOWING | {"join", "sum", "max", "min"} and node.args:
            return slot(node.args[-1 if name == "map" else 0])
        if isinstance(node.func, ast.Attribute) and name in (
            "strip",
            "splitlines",
            "partition",
            "rpartition",
            "items",
        ):
            return slot(node.func.value)
        return words(name)
    inner = (
        child for child in ast.walk(node) if isinstance(child, ast.Name | ast.Attribute) and child is not node
    )
    first = next(inner, None)
    return slot(first) if first is not None else ""


def called(node: ast.AST) -> str:
    """The last part of a name."""
    return node.id if isinstance(node, ast.Name) else getattr(node, "attr", "")
