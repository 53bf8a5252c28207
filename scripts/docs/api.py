"""The page of the Python api, from signatures, docstrings and fields in the source: nothing is imported for it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.docs.errors.source import Module, module_of
from scripts.markdown import WIDTH, joined, listed, table

HEAD = """\
`import qkpatch` is the library under the command line; [the guide](guide.md#from-python) shows it at work. Nothing is
printed, torch is imported by calls that compute, and calls may be made from several threads at once. What is on this
page is public; all else may change in any version. Written by `make docs` from signatures and docstrings.
"""

Definition = ast.ClassDef | ast.FunctionDef
ERRORS = "qkpatch.errors"


@dataclass(frozen=True)
class Described:
    """A function or a class, and where it is defined."""

    module: Module
    node: Definition

    @property
    def import_path(self) -> str:
        """How it is imported."""
        return f"{self.module.name}.{self.node.name}"


class Library:
    """The package's definitions, by module."""

    def __init__(self, root: Path) -> None:
        self.modules = {m.name: m for path in sorted(root.rglob("*.py")) for m in [module_of(root, path)]}

    def find(self, module: Module, name: str) -> Described | None:
        """What a name stands for in a module, be it defined there or imported."""
        for node in module.tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
                return Described(module, node)
        source = self.modules.get(module.imported.get(name, ("", ""))[0])
        return None if source is None else self.find(source, module.imported[name][1])

    def calls(self) -> list[Described]:
        """The functions of ``qkpatch.__all__``, which are those of the api."""
        api = self.modules["qkpatch.api"]
        names = ast.literal_eval(api.constants["__all__"])
        found = [self.find(api, name) for name in names]
        return [one for one in found if one is not None]

    def types(self, calls: Sequence[Described]) -> tuple[list[Described], list[Described], list[Described]]:
        """The classes that calls take, those that they give, and those of the fields of these."""
        given = [one for call in calls for one in self._named(call.module, _function(call).returns)]
        taken = [
            one for call in calls for argument in _arguments(_function(call))
            for one in self._named(call.module, argument.annotation)
        ]  # fmt: skip
        taken = [one for one in dict.fromkeys(taken) if one not in given]
        given = list(dict.fromkeys(given))
        inner = [t for one in given for hint in _hints(one) for t in self._named(one.module, hint)]
        return taken, given, [one for one in dict.fromkeys(inner) if one not in (*taken, *given)]

    def _named(self, module: Module, hint: ast.expr | None) -> Iterator[Described]:
        if isinstance(hint, ast.Constant) and isinstance(hint.value, str):
            hint = ast.parse(hint.value, mode="eval").body
        for node in ast.walk(hint) if hint is not None else ():
            found = self.find(module, node.id) if isinstance(node, ast.Name) else None
            if found is not None and isinstance(found.node, ast.ClassDef):
                yield found


def page(repo: Path) -> str:
    """A section per call, then per type that they take and give, then the errors."""
    library = Library(repo / "qkpatch")
    calls = library.calls()
    taken, given, inner = library.types(calls)
    blocks = ["# Python api", HEAD, "## Calls"]
    blocks += [block for call in sorted(calls, key=_by_name) for block in _call(call)]
    for head, types in (("What calls take", taken), ("What calls give", given)):
        blocks += [f"## {head}", *(block for one in sorted(types, key=_by_name) for block in _type(one))]
    blocks += ["## Parts of what they give", "Their fields; methods of these are not public."]
    blocks += [block for one in sorted(inner, key=_by_name) for block in _type(one, is_part=True)]
    return joined([*blocks, *_errors(library.modules[ERRORS])])


def _errors(module: Module) -> Iterator[str]:
    """The class that all failures are of, and a table of its kinds."""
    base, *kinds = [n for n in module.tree.body if isinstance(n, ast.ClassDef)]
    yield "## Errors"
    yield f"Every failure that can be explained is one of these, in `{ERRORS}`; [what each says](errors.md)."
    yield from _type(Described(module, base))
    facts: dict[str, dict[str, str]] = {}
    for kind in (base, *kinds):
        above = ast.unparse(kind.bases[0])
        own = {ast.unparse(n.targets[0]): n.value for n in kind.body if isinstance(n, ast.Assign)} | {
            ast.unparse(n.target): n.value for n in kind.body if isinstance(n, ast.AnnAssign)
        }
        said = {key: str(ast.literal_eval(value)) for key, value in own.items() if value is not None}
        facts[kind.name] = facts.get(above, {}) | said | {"above": above}
    yield table(
        ("class", "is a", "`exit_code`", "`kind`"),
        (
            (f"`{k.name}`", f"`{(f := facts[k.name])['above']}`", f["exit_code"], f"`{f['kind']}`")
            for k in kinds
        ),
    )


def _by_name(one: Described) -> str:
    return one.node.name.lower()


def _function(one: Described) -> ast.FunctionDef:
    assert isinstance(one.node, ast.FunctionDef)
    return one.node


def _arguments(function: ast.FunctionDef) -> list[ast.arg]:
    return [*function.args.args, *function.args.kwonlyargs]


def _call(call: Described) -> Iterator[str]:
    yield f"### {call.node.name}"
    yield f"```text\n{_signature(_function(call), 'qkpatch.')}\n```"
    yield from _documented(call.node)


def _signature(function: ast.FunctionDef, prefix: str = "") -> str:
    """``name(arguments) -> result``, on one line where it fits."""
    result = "" if function.returns is None else f" -> {_shown(function.returns)}"
    arguments = list(_shown_arguments(function.args))
    line = f"{prefix}{function.name}({', '.join(arguments)}){result}"
    if len(line) <= WIDTH - 10:
        return line
    return "\n".join(
        [f"{prefix}{function.name}(", *(f"    {argument}," for argument in arguments), f"){result}"]
    )


def _shown_arguments(arguments: ast.arguments) -> Iterator[str]:
    by_place = [a for a in arguments.args if a.arg not in ("self", "cls")]
    missing = [None] * (len(by_place) - len(arguments.defaults))
    for argument, default in zip(by_place, [*missing, *arguments.defaults], strict=False):
        yield _argument(argument, default)
    if arguments.vararg is not None:
        yield f"*{_argument(arguments.vararg, None)}"
    elif arguments.kwonlyargs:
        yield "*"
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield _argument(argument, default)
    if arguments.kwarg is not None:
        yield f"**{_argument(arguments.kwarg, None)}"


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    hint = "" if argument.annotation is None else f": {_shown(argument.annotation)}"
    return f"{argument.arg}{hint}" + ("" if default is None else f" = {_shown(default)}")


def _shown(node: ast.expr) -> str:
    """As it is written, less the quotes of a name that is imported late."""
    text = ast.unparse(node)
    return (
        text[1:-1] if isinstance(node, ast.Constant) and text.startswith(("'", '"')) and "." in text else text
    )


def _documented(node: Definition) -> Iterator[str]:
    """A docstring as Markdown: paragraphs, and its sections as lists."""
    text = ast.get_docstring(node) or ""
    heads = re.split(r"^(Args|Returns|Raises|Yields):\n", text, flags=re.MULTILINE)
    yield from _paragraphs(heads[0])
    for head, body in zip(heads[1::2], heads[2::2], strict=True):
        body = re.sub(r"^ {4}", "", body, flags=re.MULTILINE).strip("\n")
        if head in ("Args", "Raises"):
            items = re.split(r"^(?=\S)", body, flags=re.MULTILINE)
            said = [item.partition(":") for item in items if item.strip()]
            word = {"Args": "Takes", "Raises": "Raises"}[head]
            yield f"**{word}**"
            yield listed(f"`{name.strip()}`: {_plain(' '.join(what.split()))}" for name, _, what in said)
        else:
            yield f"**{head}** {_plain(' '.join(body.split()))}"


def _paragraphs(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        if paragraph.strip():
            yield _plain(" ".join(paragraph.split()))


def _plain(text: str) -> str:
    """Markdown for what docstrings mark up for Sphinx."""
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text)
    return text.replace("``", "`")


def _type(one: Described, *, is_part: bool = False) -> Iterator[str]:
    node = one.node
    assert isinstance(node, ast.ClassDef)
    yield f"### {node.name}"
    yield f"`{one.import_path}`"
    yield from _documented(node)
    members = [*_fields(node, one.module), *_methods(node, only_values=is_part)]
    if members:
        yield listed(members)


def _hints(one: Described) -> Iterator[ast.expr]:
    """The types of a class's public fields and properties."""
    for node in one.node.body:
        if isinstance(node, ast.AnnAssign) and not _is_private(ast.unparse(node.target)):
            yield node.annotation
        elif isinstance(node, ast.FunctionDef) and _is_property(node) and node.returns is not None:
            yield node.returns


def _fields(node: ast.ClassDef, module: Module) -> Iterator[str]:
    for inner in node.body:
        if isinstance(inner, ast.AnnAssign) and not _is_private(name := ast.unparse(inner.target)):
            value = _default(inner.value)
            default = "" if value is None else f" = {_shown(value)}"
            said = _said_of_option(inner.value) or module.comments.get(inner.end_lineno or 0, "")
            yield f"`{name}: {_shown(inner.annotation)}{default}`" + (f": {_plain(said)}" if said else "")
        elif isinstance(inner, ast.Assign) and not _is_private(name := ast.unparse(inner.targets[0])):
            yield f"`{name} = {_shown(inner.value)}`"


def _default(value: ast.expr | None) -> ast.expr | None:
    """What a field is where nothing is said; of an option, its first argument."""
    if isinstance(value, ast.Call):
        value = value.args[0] if value.args and ast.unparse(value.func) == "option" else None
    return None if isinstance(value, ast.Constant) and value.value is ... else value


def _said_of_option(value: ast.expr | None) -> str:
    """The help of a field that is an option of a command as well."""
    if not isinstance(value, ast.Call):
        return ""
    texts = [a.value for a in value.args[1:] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    return "".join(texts)


def _methods(node: ast.ClassDef, *, only_values: bool) -> Iterator[str]:
    for inner in node.body:
        if isinstance(inner, ast.FunctionDef) and not _is_private(inner.name):
            if only_values and not _is_property(inner):
                continue
            said = (ast.get_docstring(inner) or "").partition("\n\n")[0]
            form = (
                f"{inner.name}: {_shown(inner.returns)}"
                if _is_property(inner) and inner.returns
                else _signature(inner)
            )
            yield f"`{' '.join(form.split())}`: {_plain(' '.join(said.split()))}"


def _is_property(node: ast.FunctionDef) -> bool:
    return any(ast.unparse(d).endswith("property") for d in node.decorator_list)


def _is_private(name: str) -> bool:
    return name.startswith("_")
