"""What the errors of the package say: every call that makes one, as texts with ``{names}`` for what a run puts in.

Texts are put together in many ways: in a variable, by a condition, by who calls. So each function is gone through path
by path (:mod:`scripts.docs.errors.paths`), and what its callers give is put in here.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice, product
from pathlib import Path

from scripts.docs.errors.paths import BASE, MOST, PARAMETER, Reading
from scripts.docs.errors.source import Kind, Module, Place, Said, functions, module_of, says_something, words

ROUNDS = 3  # how far up a text is followed to who calls
_SLOT = re.compile(r"\{[^{}]*\}")
# Left by a variable that is empty on some path: another path has the text.
_GAP = re.compile(r"^\s*[,;:]|^ |\s[,;:]|^$|\S  \S|\s$")


class Package:
    """All errors of a package, and all that they say."""

    def __init__(self, root: Path) -> None:
        self.modules = {(module := module_of(root, path)).name: module for path in sorted(root.rglob("*.py"))}
        self.kinds: dict[str, Kind] = {}
        for _ in range(ROUNDS):  # a class may come before its base
            for module in self.modules.values():
                self._find_kinds(module)
        # No error, but told as one where --strict allows none.
        self.kinds["Warnings"] = Kind("Warnings", BASE, f"{root.name}.errors", 6, "", ("what",))
        self._places = [
            Place.of(module, owner, function)
            for module in self.modules.values() for owner, function in functions(module.tree)
        ]  # fmt: skip
        self._by_name: dict[str, list[Place]] = {}
        for place in self._places:
            name = place.owner if place.function.name == "__init__" else place.function.name
            self._by_name.setdefault(self.known_as(place.module, name), []).append(place)
        self._returned: dict[str, list[str]] = {}
        self._callers: dict[str, list[dict[str, list[str]]]] = {}
        self._followed: set[str] = set()
        said: list[Said] = []
        for _ in range(ROUNDS):
            self._callers = {}
            said = [one for place in self._places for one in self._read(place)]
            texts = [text for one in said for text in one.texts]
            texts += [
                t
                for calls in self._callers.values()
                for call in calls
                for told in call.values()
                for t in told
            ]
            self._followed = {found[1] for text in texts for found in PARAMETER.finditer(text)}
        self.said = sorted(_without_gaps(full for one in said for full in self._filled(one)), key=_order)

    def _find_kinds(self, module: Module) -> None:
        for node in module.tree.body:
            if (
                not isinstance(node, ast.ClassDef)
                or not node.bases
                or not isinstance(node.bases[0], ast.Name)
            ):
                continue
            base = node.bases[0].id
            if node.name != BASE and base not in self.kinds:
                continue
            above = self.kinds.get(base, Kind(BASE, "", "", 3, "", ("what",)))
            code, takes = above.exit_code, above.takes
            for inner in node.body:
                if isinstance(inner, ast.Assign) and ast.unparse(inner.targets[0]) == "exit_code":
                    code = ast.literal_eval(inner.value)
                if (
                    isinstance(inner, ast.AnnAssign)
                    and ast.unparse(inner.target) == "exit_code"
                    and inner.value
                ):
                    code = ast.literal_eval(inner.value)
                if isinstance(inner, ast.FunctionDef) and inner.name == "__init__":
                    takes = tuple(argument.arg for argument in inner.args.args[1:])
            meaning = (ast.get_docstring(node) or "").partition("\n\n")[0]
            self.kinds[node.name] = Kind(node.name, base, module.name, code, meaning, takes)

    def _read(self, place: Place) -> Iterator[Said]:
        reading = Reading(self, place)
        if reading.makes_errors:
            reading.run(place.function.body, [{}])
        yield from reading.said
        for name, arguments in reading.calls:
            self._callers.setdefault(name, []).append(arguments)

    def known_as(self, module: Module, name: str) -> str:
        """What a function is called among all of the package: a private one belongs to its module."""
        return f"{module.name}.{name}" if name.startswith("_") else name

    def follows(self, name: str) -> bool:
        """Whether an error's text comes from whoever calls the function ``name``."""
        return name in self._followed

    def named(self, name: str) -> list[Place]:
        """The functions of that name, and the classes that are made by it."""
        return self._by_name.get(name, [])

    def returns(self, name: str) -> list[str]:
        """The texts that the function of that name gives, where there is one, and it gives texts."""
        if name not in self._returned:
            self._returned[name] = []  # of one that calls itself
            places = self._by_name.get(name, [])
            if len(places) == 1 and ast.unparse(places[0].function.returns or ast.Constant(None)) == "str":
                reading = Reading(self, places[0], for_result=True)
                reading.run(places[0].function.body, [{}])
                told = {PARAMETER.sub(lambda m: f"{{{words(m[2])}}}", text) for text in reading.returned}
                self._returned[name] = sorted(text for text in told if " " in text and says_something(text))
        return self._returned[name]

    def constant(self, module: Module, name: str) -> tuple[Module, ast.expr] | None:
        """The value that a name has in a module, or has where it is imported from."""
        if name in module.constants:
            return module, module.constants[name]
        source = self.modules.get(module.imported.get(name, ("", ""))[0])
        return self.constant(source, module.imported[name][1]) if source is not None else None

    def _filled(self, one: Said) -> set[Said]:
        """With the phrases that callers give in place of parameters; of a parameter without, its name."""
        found = PARAMETER.search("".join(one.texts))
        if found is None:
            return {one}
        function, full = found[1], set[Said]()
        names = {m[2] for m in PARAMETER.finditer("".join(one.texts)) if m[1] == function}
        for call in [*self._callers.get(function, [])[:MOST], {}]:
            phrases = [self._phrases(call.get(name, ())) or [f"{{{words(name)}}}"] for name in sorted(names)]
            for told in islice(product(*phrases), MOST):
                given = dict(zip(sorted(names), told, strict=True))
                what, where, fix = (_put_in(text, function, given) for text in one.texts)
                full |= self._filled(replace(one, what=what, where=where, fix=fix))
        # What no caller says in words is only of interest where none does.
        worded = {f for f in full if not f.is_passed_on} or full
        return {f for f in worded if not any(_is_vaguer(f, other) for other in worded)}

    def _phrases(self, texts: Iterable[str], depth: int = 0) -> list[str]:
        """Those of some texts that are more than a word, which would be an example, with what callers put into them."""
        full: dict[str, None] = {}
        for text in texts:
            found = PARAMETER.search(text)
            if found is None:
                inner = [text]
            else:
                calls = self._callers.get(found[1], []) if depth < ROUNDS else []
                told = self._phrases([t for call in calls for t in call.get(found[2], ())], depth + 1)
                inner = [
                    one for phrase in told or [f"{{{words(found[2])}}}"]
                    for one in self._phrases([text.replace(found[0], phrase)], depth)
                ]  # fmt: skip
            full |= dict.fromkeys(t for t in inner if " " in _SLOT.sub("", t).strip(" ':"))
        return list(full)[:MOST]


def _put_in(text: str, function: str, given: Mapping[str, str]) -> str:
    return PARAMETER.sub(lambda m: given[m[2]] if m[1] == function else m[0], text)


def _is_vaguer(one: Said, other: Said) -> bool:
    """Whether ``one`` says no more than ``other``, with a name in braces in place of words."""
    if (one.what, one.fix) == (other.what, other.fix):
        return False
    parts = zip(one.texts, other.texts, strict=True)
    return all(mine == theirs or _SLOT.fullmatch(mine) is not None for mine, theirs in parts)


def _without_gaps(said: Iterable[Said]) -> set[Said]:
    """All but the texts that lack a word, where their call has others."""
    found = set(said)
    whole = {(one.module, one.line) for one in found if not _has_gap(one)}
    return {one for one in found if not _has_gap(one) or (one.module, one.line) not in whole}


def _has_gap(one: Said) -> bool:
    return bool(_GAP.search(one.what) or (one.fix and _GAP.search(one.fix)))


def _order(one: Said) -> tuple[str, str, int, str, str, str]:
    return one.kind, one.module, one.line, one.what, one.fix, one.where
