"""``OneCommand``, ``Commands``: Typer's, where what is wrong with the command line itself is told as all errors are."""

from __future__ import annotations

import inspect
import shlex
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any, get_args

import typer

from qkpatch.cli.console import print_error, show_error, silence_stdout
from qkpatch.common.text import meant
from qkpatch.errors import QKPatchError, UsageError

# What Typer's own options are for.
_HELP = {
    "--help": "Print this and exit.",
    "--install-completion": "Have this shell complete commands and options.",
    "--show-completion": "Print what --install-completion would install.",
}


class _Told:
    """What a command and the group of all have in common."""

    def get_params(self, ctx: Any) -> list[Any]:
        """As Typer calls it."""
        above: Any = super()
        found: list[Any] = above.get_params(ctx)
        for one in found:
            one.help = _HELP.get(max(one.opts, key=len), one.help)
            if one.param_type_name == "argument":
                one.display_type_rich = lambda ctx: None  # a Path, a str: its name says more
            elif one.is_flag:
                one.metavar = ""
        return found

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """As Typer calls it."""
        above: Any = super()
        return [piece.strip("{}") for piece in above.collect_usage_pieces(ctx)]

    def make_context(self, info_name: Any, args: list[str], parent: Any = None, **how: Any) -> Any:
        """As Typer calls it."""
        above: Any = super()
        with _told(args):
            return above.make_context(info_name, args, parent, **how)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As Typer calls it."""
        above: Any = super()
        return _parsed(self, ctx, args, above.parse_args)


class OneCommand(_Told, typer.core.TyperCommand):
    """A command."""


class Commands(_Told, typer.core.TyperGroup):
    """All of them."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """As Typer calls it."""
        with _told(args):
            name = args[0]
            if name not in self.commands and not ctx.resilient_parsing:
                fix = f"{meant([name], self.commands)}`qkpatch --help` lists them"
                raise UsageError(f"no such command: {name}", fix=fix)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """As Typer calls it."""
        with _readers():
            return super().invoke(ctx)


@contextmanager
def _readers() -> Iterator[None]:
    """Where who reads what Typer prints, such as ``--help``, has left."""
    try:
        yield
    except BrokenPipeError:
        silence_stdout()
        raise typer.Exit(128 + signal.SIGPIPE) from None


@contextmanager
def _told(args: Sequence[str]) -> Iterator[None]:
    as_json = "--json" in args  # now: who parses takes words out
    with _readers():
        try:
            yield
        except QKPatchError as error:
            if as_json:
                print_error(error)
            show_error(error)
            raise typer.Exit(error.exit_code) from None


def _parsed(
    command: Any, ctx: Any, args: list[str], parse: Callable[[Any, list[str]], list[str]]
) -> list[str]:
    """What ``parse`` makes of ``args``, of which none may be passed over, or mean another thing than it looks like.

    Raises:
        UsageError: an option that is unknown, missing, given twice or with a wrong value; a word too many.
    """
    if ctx.resilient_parsing or (not args and command.no_args_is_help):  # for completion; for help
        return parse(ctx, args)
    options = [one for one in command.get_params(ctx) if one.param_type_name == "option"]
    lists = f"`{ctx.command_path} --help` lists them"
    _check_dashes(options, args)
    try:
        said, rest, order = command.make_parser(ctx).parse_args([*args])
    except Exception as error:  # Typer exports no name of what it raises
        name = getattr(error, "option_name", None)
        if name is None:
            raise
        known = {text: one for one in options for text in (*one.opts, *one.secondary_opts)}
        if name in known:
            what = "takes no value" if known[name].is_flag else "needs a value"
            raise UsageError(f"{name} {what}", where=ctx.command_path) from error
        fix = f"{meant([name], known)}{lists}"
        raise UsageError(f"no such option: {name}", where=ctx.command_path, fix=fix) from error
    if rest and not ctx.allow_extra_args:
        fix = "quote what has spaces; what begins with a dash goes behind --"
        raise UsageError(f"more than it takes: {shlex.join(rest)}", where=ctx.command_path, fix=fix)
    for one in options:
        # A flag says the same again, unless another word of it says the opposite.
        is_open = not one.is_flag or one.secondary_opts
        if order.count(one) > 1 and is_open and not one.multiple:
            what = f"{_name(one)} is given {order.count(one)} times, and takes one value"
            raise UsageError(
                what, where=ctx.command_path, fix="say it once; of a list, 10-18,20, in one word"
            )
    try:
        return parse(ctx, args)
    except typer.BadParameter as error:
        asked: Any = error.param
        name = _name(asked)
        if not error.message:
            raise UsageError(f"{name} is missing", where=ctx.command_path, fix=lists) from error
        parameter = inspect.signature(command.callback).parameters.get(asked.name)
        takes = "" if parameter is None else _takes(parameter.annotation)
        given = said.get(asked.name)
        what = f"{given!r:.80} is not {takes}" if takes else error.message
        raise UsageError(what, where=name) from error


def _check_dashes(options: Sequence[Any], args: Sequence[str]) -> None:
    """Refuse ``-output x``, which would be ``-o utput``, and ``-o=x``, which would be ``-o '=x'``."""
    valued = {text for one in options if not one.is_flag for text in one.opts}
    names = [text for one in options for text in (*one.opts, *one.secondary_opts) if text.startswith("--")]
    before = ""
    for word in args:
        if word == "--":
            return
        name, equals, value = word[1:].partition("=")
        if word.startswith("-") and not word.startswith("--") and before not in valued:
            near = [one for one in names if one[2:].startswith(name) or name.startswith(one[2:])]
            if near and len(name) > 1:
                fix = f"did you mean {' or '.join(near)}?"
                raise UsageError(f"{word} has one dash, and names of options have two", fix=fix)
            if equals and word[:2] in valued:
                raise UsageError(
                    f"{word} would be taken for the value {word[2:]}", fix=f"write -{name} {value}"
                )
        before = word


def _name(parameter: Any) -> str:
    """What people call an option or an argument."""
    longest: str = max(parameter.opts, key=len)
    return longest if longest.startswith("-") else str(parameter.metavar or longest.upper())


def _takes(annotation: Any) -> str:
    """What the values of a kind are, in words; empty where any text is one."""
    kinds = [kind for part in (annotation, *get_args(annotation)) for kind in (part, *get_args(part))]
    for kind in (kind for kind in kinds if isinstance(kind, type)):
        if issubclass(kind, Enum):
            return f"one of {', '.join(str(one.value) for one in kind)}"
        if kind in (int, float):
            return "a whole number" if kind is int else "a number"
    return ""
