"""Threads that work through tasks side by side; the first failure, or an interrupt, stops all of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from threading import Barrier, Event
from types import TracebackType
from typing import TypeVar

from qkpatch.common.interrupts import signals_held, signals_masked, stoppable
from qkpatch.errors import UsageError

A = TypeVar("A")
R = TypeVar("R")


class Stopped(BaseException):
    """The crew is stopping; raised inside tasks that are still running. What stopped it is raised by the crew."""


class Crew:
    """``threads`` threads that compute, and a few ``alongside`` that copy files and wait for them. Torch-free."""

    def __init__(self, threads: int, alongside: int = 0) -> None:
        self.threads = threads
        self._stop = Event()
        self._failure: BaseException | None = None
        self._computing = ThreadPoolExecutor(threads, "qkpatch")
        self._beside = ThreadPoolExecutor(alongside, "qkpatch-beside") if alongside else self._computing
        self._all = [self._computing] * threads + [self._beside] * alongside

    def __enter__(self) -> Crew:
        # All threads start here, where no signal can come between a thread's start and its being known. They inherit
        # the mask: signals are for the main thread, which knows when they must wait.
        with signals_held(), signals_masked():
            together = Barrier(len(self._all))
            try:
                wait([pool.submit(together.wait) for pool in self._all])
            except BaseException as error:
                together.abort()
                self._end()
                if not isinstance(error, RuntimeError):
                    raise  # Ctrl-C in a host process
                what = f"{together.parties} threads cannot be started: {error}"
                fix = "use fewer, or raise the limits of processes and memory (ulimit)"
                raise UsageError(what, where="--threads", fix=fix) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        with signals_held():  # files are closed next: nobody may still be writing to them
            self._end()
        if isinstance(error, Stopped) and self._failure is not None:
            raise self._failure

    def _end(self) -> None:
        for pool in self._all:
            pool.shutdown(wait=True, cancel_futures=True)

    def check(self) -> None:
        """To be called now and then by a long task.

        Raises:
            Stopped: another task failed, or the user interrupted.
        """
        if self._stop.is_set():
            raise Stopped

    def start(self, task: Callable[[], R]) -> Future[R]:
        """Run one task alongside; ``result()`` raises what it raised."""
        return self._beside.submit(self._run, task)

    def map(self, task: Callable[[A], R], items: Iterable[A]) -> Iterator[R]:
        """``task`` of each item, in order; no more than ``threads`` at a time, and none far ahead of the reader."""
        running: deque[Future[R]] = deque()
        for item in items:
            running.append(self._computing.submit(self._run, partial(task, item)))
            if len(running) > self.threads:  # one more, for a thread that is done before the first
                yield running.popleft().result()
        while running:
            yield running.popleft().result()

    def _run(self, task: Callable[[], R]) -> R:
        self.check()
        try:
            with stoppable(self.check):
                return task()
        except BaseException as error:
            if not self._stop.is_set():  # of two that fail at once either may be told
                self._failure = error
                self._stop.set()
            raise
