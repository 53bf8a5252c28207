"""Ctrl-C, ``kill`` and a closed terminal: all unwind the stack, none is lost, and none cuts the unwinding short."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from qkpatch.common import system


class Terminated(BaseException):
    """SIGTERM or SIGHUP arrived; unwinds like Ctrl-C, so that staging is removed."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@dataclass
class _Arrivals:
    """Which signal arrived, and whether it may be raised.

    Masks would not do: the kernel gives a signal that one thread blocks to another, such as the one that draws
    progress, and Python raises it in the main thread all the same.
    """

    is_on: bool = False
    aside: set[Future[object]] = field(default_factory=set)  # what is done by threads that cannot be stopped
    held: int = 0
    first: int | None = None
    is_raised: bool = False

    def arrive(self, number: int, frame: FrameType | None = None) -> None:
        if self.first is None:
            self.first = number
        self.tell()

    def tell(self) -> None:
        """Raise what arrived, once: later ones must not stop the cleaning up that the first one began."""
        if self.held or self.first is None or self.is_raised:
            return
        self.is_raised = True
        raise KeyboardInterrupt if self.first == signal.SIGINT else Terminated(self.first)


_arrivals = _Arrivals()


@contextmanager
def unwinding_on_kill() -> Iterator[None]:
    """Raise ``KeyboardInterrupt`` on SIGINT and :class:`Terminated` on SIGTERM and SIGHUP inside the block, once."""
    global _arrivals
    _arrivals = _Arrivals(is_on=True)
    # What is ignored stays ignored: nohup counts on it.
    signals = [n for n in system.ending_signals() if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _arrivals.arrive) for number in signals}
    try:
        yield
    finally:
        # The command is over, and nobody is there to hear of what comes meanwhile. SIGINT last: Python's own raises.
        _arrivals.is_on, _arrivals.is_raised = False, True
        for number, handler in reversed(before.items()):
            signal.signal(number, handler)


@contextmanager
def unwrapped() -> Iterator[None]:
    """Raise what arrived while a class was made as itself: before Python 3.12 it is the cause of a ``RuntimeError``."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__cause__, KeyboardInterrupt | Terminated):
            raise error.__cause__ from None
        raise


def is_own_process() -> bool:
    """Whether :func:`unwinding_on_kill` is at work: signals are qkpatch's to hear, not a host's."""
    return _arrivals.is_on


def hears_signals() -> bool:
    """Whether this thread is the one that hears signals, in a process of qkpatch's own."""
    return is_own_process() and threading.current_thread() is threading.main_thread()


@contextmanager
def signals_held() -> Iterator[None]:
    """Deliver Ctrl-C and the like after the block, for what must not stop half way.

    Only where :func:`unwinding_on_kill` is at work, which is in a process of qkpatch's own: elsewhere signals are the
    host's, and several threads may be here at once.
    """
    if not hears_signals():
        yield
        return
    _arrivals.held += 1
    try:
        yield
    finally:
        _arrivals.held -= 1
        _arrivals.tell()


@contextmanager
def signals_let_through() -> Iterator[None]:
    """The part of a block that holds signals which may stop at any moment."""
    if not hears_signals():
        yield
        return
    held, _arrivals.held = _arrivals.held, 0
    try:
        _arrivals.tell()
        yield
    finally:
        _arrivals.held = held


def aside(work: Callable[..., object], *arguments: Any) -> None:
    """Do what hears no signal in a thread, while this one does, or asks whether it is to stop."""
    if not _arrivals.is_on:
        work(*arguments)
        return
    with signals_masked():
        doing = ThreadPoolExecutor(1).submit(work, *arguments)
    _arrivals.aside.add(doing)
    while wait([doing], 0.1).not_done:
        check_stop()
    _arrivals.aside.discard(doing)
    doing.result()


def import_torch() -> None:
    """Import torch, which swallows what is raised in the midst of that."""
    if "torch" not in sys.modules:
        aside(_load_torch)


def _load_torch() -> None:
    """Its largest library first, by a call during which other threads run: in an import none hears a signal."""
    spec = importlib.util.find_spec("torch")
    for folder in (spec and spec.submodule_search_locations) or ():
        system.load_library(f"{folder}/lib/libtorch_cpu")
    importlib.import_module("torch")


def end_at_once(code: int) -> None:
    """End the process here, where something is still done :func:`aside`: Python itself could not end before that."""
    if not all(doing.done() for doing in _arrivals.aside):
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(code)


_task = threading.local()


@contextmanager
def stoppable(check: Callable[[], None]) -> Iterator[None]:
    """A task of this thread, which ``check`` ends by raising."""
    _task.check = check
    try:
        yield
    finally:
        del _task.check


def check_stop() -> None:
    """To be called now and then by whatever takes long; raises where this thread's task, or all of them, are to end."""
    check = getattr(_task, "check", None)
    if check is not None:
        check()
    elif _arrivals.is_raised and _arrivals.is_on and not hears_signals():
        # One of a library's threads, which the main one waits for.
        raise Terminated(_arrivals.first or signal.SIGINT)


def pause(seconds: float, is_over: Callable[[], bool]) -> None:
    """Wait so long, or until nobody waits any more; raises as :func:`check_stop`."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0 and not is_over():
        check_stop()
        time.sleep(min(left, 0.1))


@contextmanager
def signals_masked() -> Iterator[None]:
    """Threads that are started here never take a signal: all are for the main thread, which they wake."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, system.ending_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
