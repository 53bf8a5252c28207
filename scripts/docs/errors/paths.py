"""One function, gone through path by path: what the errors that it makes say on each."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, product
from typing import TYPE_CHECKING

from scripts.docs.errors.source import SHOWING, Kind, Place, Said, called, functions, names_in, slot, words

if TYPE_CHECKING:
    from scripts.docs.errors.package import Package

State = Mapping[str, str]  # what a variable says, on one path

MOST = 64  # paths, and texts of one expression, that are told apart
BASE = "QKPatchError"
# Calls that lead to an error of a class: Typer's own, what collects the faults of a document for one, and warnings.
LEAD_TO = {"BadParameter": "UsageError", "fault": "RecipeError", "tell": "RecipeError", "warned": "Warnings"}
# A parameter of a function, in a text: what it says is up to who calls.
PARAMETER = re.compile("\x01([^\x02]+)\x02([^\x03]+)\x03")
_SLOT = re.compile(r"\{[^{}]*\}")
_GENERAL = {"what", "where", "fix", "why", "cure", "text"}  # names that say nothing


class Reading:
    """One function, gone through path by path."""

    def __init__(self, package: Package, place: Place, *, for_result: bool = False) -> None:
        self._package, self._module, self._owner, function = (
            package,
            place.module,
            place.owner,
            place.function,
        )
        is_maker = function.name == "__init__" and place.owner not in package.kinds
        self._name = package.known_as(place.module, place.owner if is_maker else function.name)
        self._for_result = for_result
        self.returned: list[str] = []
        of_function = function.args
        self._parameters = {
            a.arg for a in (*of_function.posonlyargs, *of_function.args, *of_function.kwonlyargs)
        }
        self._parameters -= {"self", "cls"}
        self._loops: list[list[State]] = []
        self._tables = {
            target.id: node.value
            for node in ast.walk(function) if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
            for target in node.targets if isinstance(target, ast.Name)
        }  # fmt: skip
        self.said: list[Said] = []
        self.calls: list[tuple[str, dict[str, list[str]]]] = []
        calls = [call for call in place.calls if self._is_read(call)]
        self.makes_errors = bool(calls)
        results = place.results if for_result else ()
        self._wanted = {name for node in (*calls, *results) for name in names_in(node)}
        size = 0  # what errors are made of is made of other variables
        while size != (size := len(self._wanted)):
            self._wanted.update(
                name for names, parts in place.assigned if names & self._wanted for name in parts
            )

    def _is_read(self, call: ast.Call) -> bool:
        return self._kind(call) is not None or self._package.follows(self._called(call))

    def _called(self, call: ast.Call) -> str:
        return self._package.known_as(self._module, called(call.func))

    def _kind(self, call: ast.Call) -> Kind | None:
        name = called(call.func)
        if name == "__init__" and self._owner != BASE:  # of the class above
            return self._package.kinds.get(self._owner)
        kind = self._package.kinds.get(LEAD_TO.get(name, name))
        return kind if kind is not None and "what" in kind.takes and name not in self._parameters else None

    def run(self, body: Sequence[ast.stmt], states: list[State]) -> list[State]:
        """Go through statements; the states in which the next one is reached."""
        for statement in body:
            if not states:
                break
            states = self._step(statement, states)
        return states

    def _step(self, node: ast.stmt, states: list[State]) -> list[State]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            return states
        for expression in _own_expressions(node):
            for call in ast.walk(expression):
                if isinstance(call, ast.Call) and self._is_read(call):
                    self._record(call, states)
        if isinstance(node, ast.Return | ast.Raise):
            if self._for_result and isinstance(node, ast.Return) and node.value is not None:
                self.returned += [text for state in states for text in self._texts(node.value, state)]
            return []
        if isinstance(node, ast.Break | ast.Continue):
            self._loops[-1] += states
            return []
        if isinstance(node, ast.Assign):
            for target in node.targets:
                states = self._bound(target, node.value, states)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            states = self._bound(node.target, node.value, states)
        elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            both = ast.BinOp(ast.Name(node.target.id, ast.Load()), node.op, node.value)
            states = self._bound(node.target, both, states)
        elif isinstance(node, ast.If):
            states = self.run(node.body, states) + self.run(node.orelse, states)
        elif isinstance(node, ast.For | ast.While | ast.AsyncFor):
            self._loops.append([])
            inside = self._of_loop(node, states) if isinstance(node, ast.For) else states
            states = states + self.run(node.body, inside) + self._loops.pop()
            states = states + self.run(node.orelse, states) if node.orelse else states
        elif isinstance(node, ast.With | ast.AsyncWith):
            states = self.run(node.body, states)
        elif isinstance(node, ast.Try):
            done = self.run(node.body, states)
            failed = _distinct([*states, *done])
            caught = [state for handler in node.handlers for state in self.run(handler.body, failed)]
            states = self.run(node.orelse, done) + caught
            states = self.run(node.finalbody, states or failed) if node.finalbody else states
        elif isinstance(node, ast.Match):
            states = states + [state for case in node.cases for state in self.run(case.body, states)]
        return _distinct(states)

    def _bound(self, target: ast.expr, value: ast.expr, states: list[State]) -> list[State]:
        if isinstance(value, ast.IfExp) and isinstance(target, ast.Tuple):
            return self._bound(target, value.body, states) + self._bound(target, value.orelse, states)
        if (
            isinstance(target, ast.Tuple)
            and isinstance(value, ast.Tuple)
            and len(target.elts) == len(value.elts)
        ):
            for inner, part in zip(target.elts, value.elts, strict=True):
                states = self._bound(inner, part, states)
            return states
        for name in names_in(target):
            if name not in self._wanted:
                continue
            if isinstance(target, ast.Name):
                states = [{**s, name: text} for s in states for text in self._texts(value, s, name)]
            else:  # taken apart: what it holds is known when it runs
                states = [{**s, name: f"{{{words(name)}}}"} for s in states]
        return _distinct(states)

    def _of_loop(self, node: ast.For, states: list[State]) -> list[State]:
        """A loop over a table that has a name, here or in the module: its variables hold what stands there."""
        rows = self._table(node.iter)
        if rows is None:
            names = names_in(node.target) & self._wanted
            return _distinct([{**s, **{name: f"{{{words(name)}}}" for name in names}} for s in states])
        return _distinct([s for row in rows for s in self._bound(node.target, row, states)])

    def _table(self, node: ast.expr) -> list[ast.expr] | None:
        name = (
            node.func.value if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else node
        )
        if not isinstance(name, ast.Name):
            return None
        found = self._package.constant(self._module, name.id)
        table = self._tables.get(name.id, None if found is None else found[1])
        if isinstance(table, ast.Dict) and called(getattr(node, "func", node)) == "items":
            pairs = zip(table.keys, table.values, strict=True)
            return [ast.Tuple([key, value], ast.Load()) for key, value in pairs if key is not None]
        return list(table.elts) if isinstance(table, ast.Tuple | ast.List) else None

    def _record(self, call: ast.Call, states: list[State]) -> None:
        kind = self._kind(call)
        if kind is None:
            self._record_caller(call, states)
            return
        is_above = called(call.func) == "__init__" or called(call.func) in LEAD_TO
        takes = ("what", "where") if is_above else kind.takes
        given = dict(zip(takes, call.args, strict=False)) | {k.arg or "": k.value for k in call.keywords}
        parts = [given.get(key, ast.Constant(None)) for key in ("what", "where", "fix")]
        for state in states:
            for what, where, fix in islice(product(*(self._texts(part, state) for part in parts)), MOST):
                one = Said(kind.name, what, where, fix, self._module.name, call.lineno)
                if one not in self.said:
                    self.said.append(one)

    def _record_caller(self, call: ast.Call, states: list[State]) -> None:
        name = self._called(call)
        given: dict[str, list[str]] = {}
        for place in self._package.named(name):
            said = place.defaults | dict(zip(place.takes, call.args, strict=False))
            for key, value in (said | {k.arg: k.value for k in call.keywords if k.arg}).items():
                given.setdefault(key, []).extend(
                    sorted({t for state in states for t in self._texts(value, state)})
                )
        self.calls.append((name, given))

    def _texts(self, node: ast.expr, state: State, name: str = "") -> list[str]:
        """What an expression may say; ``name`` is what it is called, where nothing is known of it."""
        return list(dict.fromkeys(islice(self._said_by(node, state, name), MOST)))

    def _said_by(self, node: ast.expr, state: State, name: str) -> Iterator[str]:
        if isinstance(node, ast.Constant):
            is_text = isinstance(node.value, str) or not name
            yield "" if node.value is None else str(node.value) if is_text else f"{{{words(name)}}}"
        elif isinstance(node, ast.JoinedStr):
            yield from map("".join, product(*(self._texts(part, state) for part in node.values)))
        elif isinstance(node, ast.FormattedValue):
            is_quoted = node.conversion == ord(
                "r"
            )  # a text is; a list or a number, known when it runs, is not
            for text in self._texts(node.value, state):
                yield f"'{text}'" if is_quoted and "{" not in text and "\x01" not in text else text
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) and not self._is_sum(node):
            yield from map("".join, product(self._texts(node.left, state), self._texts(node.right, state)))
        elif isinstance(node, ast.IfExp):
            yield from self._texts(node.body, state, name)
            yield from self._texts(node.orelse, state, name)
        elif isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or):
            told = [t for value in node.values for t in self._texts(value, state, name) if t]
            # Of two that are both known only when it runs, the first tells what it is.
            yield from [t for i, t in enumerate(told) if i == 0 or _SLOT.sub("", t)]
        elif isinstance(node, ast.List | ast.Tuple) and node.elts:
            yield from map(" ".join, product(*(self._texts(part, state) for part in node.elts)))
        elif isinstance(node, ast.Name):
            yield from self._of_name(node.id, state)
        elif (texts := self._of_table(node)) is not None:
            yield from texts
        elif isinstance(node, ast.Call) and (told := self._of_call(node)):
            yield from told
        else:
            known = words(name) if name and name not in _GENERAL else slot(node)
            yield f"{{{known or '...'}}}"

    def _of_name(self, name: str, state: State) -> Iterator[str]:
        if name in state:
            yield state[name]
        elif name in self._parameters:
            yield f"\x01{self._name}\x02{name}\x03"
        else:
            found = self._package.constant(self._module, name)
            is_text = found is not None and isinstance(found[1], ast.Constant | ast.JoinedStr | ast.BinOp)
            if found is not None and is_text:
                there = Reading(self._package, Place.of(found[0], "", _NO_FUNCTION))
                yield from (
                    t if re.search(r"[A-Za-z\d]", t) else f"{{{words(name)}}}"
                    for t in there._texts(found[1], {})
                )
            else:
                yield f"{{{words(name)}}}"

    def _of_call(self, node: ast.Call) -> list[str]:
        return [] if called(node.func) in SHOWING else self._package.returns(self._called(node))

    def _of_table(self, node: ast.expr) -> list[str] | None:
        """What a table with a name holds, where it is looked up: under a key that is written out, or under any."""
        if isinstance(node, ast.Subscript):
            name = node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
            name = node.func.value
        else:
            return None
        found = self._package.constant(self._module, name.id) if isinstance(name, ast.Name) else None
        if found is None or not isinstance(found[1], ast.Dict):
            return None
        key = ast.unparse(node.slice) if isinstance(node, ast.Subscript) else ""
        rows = list(zip(found[1].keys, found[1].values, strict=True))
        named = [value for of, value in rows if of is not None and ast.unparse(of) == key]
        return [text for value in named or [value for _, value in rows] for text in self._texts(value, {})]

    def _is_sum(self, node: ast.BinOp) -> bool:
        """Whether it adds numbers."""
        for side in (node.left, node.right):
            found = self._package.constant(self._module, side.id) if isinstance(side, ast.Name) else None
            value = side if found is None else found[1]
            is_count = isinstance(value, ast.Call) and called(value.func) in ("len", "int", "sum")
            if is_count or (isinstance(value, ast.Constant) and not isinstance(value.value, str)):
                return True
        return False


def _own_expressions(node: ast.stmt) -> Iterator[ast.expr]:
    """What a statement evaluates itself, without the statements in it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr):
            yield child
        elif isinstance(child, ast.withitem):
            yield child.context_expr


def _distinct(states: Sequence[State]) -> list[State]:
    return list({tuple(sorted(state.items())): state for state in states}.values())[:MOST]


_NO_FUNCTION = next(function for _, function in functions(ast.parse("def nothing(): ...")))
