"""The command line: which commands there are. Each is a module of its own; no torch until one needs it."""

from __future__ import annotations

import atexit
import gc
import sys
import traceback
from contextlib import suppress
from typing import Annotated, NoReturn

import typer

import qkpatch
from qkpatch.cli.command_line import Commands, OneCommand
from qkpatch.cli.commands.apply import apply, finish
from qkpatch.cli.commands.card import card
from qkpatch.cli.commands.diff import diff
from qkpatch.cli.commands.doctor import doctor
from qkpatch.cli.commands.evaluate import evaluate, tune
from qkpatch.cli.commands.inspect import inspect
from qkpatch.cli.commands.lora import lora
from qkpatch.cli.commands.plan import plan
from qkpatch.cli.commands.recipes import recipes
from qkpatch.cli.commands.sweep import collect, sweep
from qkpatch.cli.commands.verify import revert, verify
from qkpatch.cli.console import note, prepare_streams, silence_stdout
from qkpatch.errors import FileSystemError, QKPatchError, UnexpectedError

app = typer.Typer(
    name="qkpatch",
    cls=Commands,
    help="Edit the query-key product of a vision-language checkpoint, straight in its safetensors files.\n\n"
    "Begin with: qkpatch inspect SOURCE; qkpatch apply SOURCE -o OUT; qkpatch verify OUT --source SOURCE.\n\n"
    "Exit codes: 0 ok, 1 mismatch or difference, 2 usage, 3 unsupported or ambiguous checkpoint, 4 I/O, "
    "5 a fault of qkpatch's own, 6 warnings where --strict allows none.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", "-V", help="Print the version and exit.")] = False,
) -> None:
    """Print the version where it is asked for; commands do everything else."""
    if version:
        print(f"qkpatch {qkpatch.__version__}", flush=True)
        raise typer.Exit()


for _command in (
    apply, finish, revert, plan, inspect, lora, sweep, collect, verify, diff, recipes, card, evaluate, tune, doctor,
):  # fmt: skip
    app.command(cls=OneCommand)(_command)


def main() -> NoReturn:
    """Entry point of the ``qkpatch`` command: what no command expects ends here, with its traceback and a code."""
    prepare_streams()
    # Hundreds of thousands of objects come with torch and stay; looking through them takes a twelfth of a short run.
    gc.set_threshold(50_000, 20, 100)
    atexit.register(gc.freeze)  # nor is any of them looked at when the process ends
    try:
        app(prog_name="qkpatch")  # as completion knows it, also of `python -m qkpatch`
    except OSError:  # of what the library prints itself, such as --help, to a device that is full
        silence_stdout()
        sys.exit(FileSystemError.exit_code)
    except Exception as error:
        with suppress(OSError):
            traceback.print_exc()
        if isinstance(error, QKPatchError):  # of --debug
            sys.exit(error.exit_code)
        note(
            f"This is a fault of qkpatch {qkpatch.__version__} itself, and says nothing of the checkpoint. Please "
            "report it, with what is printed above and the command, in the issues of qkpatch's repository; where "
            "somebody may have made the input so, as SECURITY.md says."
        )
        sys.exit(UnexpectedError.exit_code)
    sys.exit(0)
