"""Where qkpatch's errors and signals end: each becomes a message and an exit code."""

from __future__ import annotations

import functools
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

import typer

from qkpatch.checkpoint.files import machine_errors
from qkpatch.cli.groups import spread
from qkpatch.common.interrupts import Terminated, end_at_once, unwinding_on_kill, unwrapped
from qkpatch.errors import QKPatchError, UnexpectedError, UsageError
from qkpatch.planning.request import Request

_FORMS = {"as_json": "--json", "as_csv": "--csv", "markdown": "--markdown"}  # of a result, one at a time
Command = TypeVar("Command", bound=Callable[..., None])


class _Noted(logging.Handler):
    """What the library logs, as a remark."""

    def emit(self, record: logging.LogRecord) -> None:
        """As logging calls it."""
        from qkpatch.cli.console import note

        note(record.getMessage())


_log, _noted = logging.getLogger("qkpatch"), _Noted()


def command(function: Command) -> Command:
    """Spread its groups of flags, and turn what qkpatch or the machine refuses into a message and an exit code.

    Anything else keeps its traceback: see :func:`qkpatch.cli.main`.
    """
    signature, gathered = spread(function)

    @functools.wraps(function)
    def wrapper(**kwargs: Any) -> None:
        from qkpatch.cli.console import note, print_error, show_error, silence_stdout
        from qkpatch.common.system import share_free_memory

        if kwargs.get("quiet") or kwargs.get("as_json") or not sys.stderr.isatty():
            # huggingface_hub reads it when it is first imported, which is later.
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        # NumPy, which comes with torch: its threads spin for a tenth of a second, and nothing is computed with it.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        share_free_memory()
        _log.addHandler(_noted)  # once, however many commands a process calls
        _log.setLevel(logging.ERROR if kwargs.get("quiet") else logging.INFO)
        # What is said is said inside: a signal that comes meanwhile must not cut that short either.
        with unwinding_on_kill():
            try:
                with machine_errors(), unwrapped():
                    if len(forms := [flag for key, flag in _FORMS.items() if kwargs.get(key)]) > 1:
                        raise UsageError(f"one of {' and '.join(forms)}", fix="drop the other")
                    function(**gathered({**kwargs}))
            except (KeyboardInterrupt, Terminated) as end:
                number = end.number if isinstance(end, Terminated) else signal.SIGINT
                what = "Interrupted" if number == signal.SIGINT else "Terminated"
                kept = getattr(end, "kept", None)
                left = f"{kept}. Go on with: {_going_on()}" if kept else "nothing half done is left behind."
                note(f"{what}; {left}")
                end_at_once(128 + number)
                raise typer.Exit(128 + number) from None
            except BrokenPipeError:
                silence_stdout()
                raise typer.Exit(128 + signal.SIGPIPE) from None
            except typer.Exit:
                raise
            except Exception as error:
                known = error if isinstance(error, QKPatchError) else UnexpectedError(error)
                if kwargs.get("config") is not None and not kwargs.get("debug"):
                    known = _beside_file(known, f"--config {kwargs['config']}")
                if kwargs.get("as_json"):
                    print_error(known)
                if isinstance(known, UnexpectedError) or kwargs.get("debug"):
                    raise
                show_error(known)
                if hasattr(known, "kept"):
                    note(f"Go on with: {_going_on()}")
                raise typer.Exit(known.exit_code) from None

    wrapper.__signature__ = signature  # type: ignore[attr-defined]
    wrapper.__annotations__ = {name: flag.annotation for name, flag in signature.parameters.items()}
    return wrapper  # type: ignore[return-value]


def _beside_file(error: QKPatchError, file: str) -> QKPatchError:
    """The error, with the file that may have said what is wrong of an edit, whole or in part."""
    flag = (error.where or "").partition(" ")[0].partition("[")[0].lstrip("-").replace("-", "_")
    if not isinstance(error, UsageError) or flag not in {field.name for field in fields(Request)}:
        return error
    return UsageError(error.what.split("\n"), where=f"{error.where}, with {file}", fix=error.fix)


def _going_on() -> str:
    """This very command, taking over what it left; only ``apply`` has to be told."""
    command, *rest = sys.argv[1:] or ["apply"]
    is_told = "--resume" in rest or command in ("evaluate", "tune")
    return shlex.join(["qkpatch", command, *(() if is_told else ("--resume",)), *rest])
