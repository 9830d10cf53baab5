"""A forked process that does some work on a stranger's module, and can be ended whatever it is doing."""

from __future__ import annotations

import ctypes
import faulthandler
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Self

import torch

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)


def can_fork() -> bool:
    """Whether a child can take over here: only by fork, since a stranger's factory cannot be pickled."""
    return hasattr(os, "fork") and not torch.cuda.is_initialized()  # type: ignore[no-untyped-call]


class Child:
    """A child that calls ``work`` with its end of a connection; it is ended at the end of the block.

    Attributes:
        connection: the other end. Reading from it is an EOFError where the child is gone.
        pid: its process.
    """

    def __init__(self, work: Callable[[Connection], object]) -> None:
        context = multiprocessing.get_context("fork")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, work, os.getpid()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of fork beside threads; torch's are idle
            self._process.start()
        self.pid = self._process.pid
        theirs.close()  # so that the child's end is the only one

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Kill it; a second time does nothing."""
        self._process.kill()
        self._process.join()
        self.connection.close()

    def why_gone(self) -> str:
        """Why a child that is gone is gone, in words."""
        self._process.join()
        exitcode = self._process.exitcode
        if exitcode is not None and exitcode < 0:
            return f"the process died of {signal.Signals(-exitcode).name}: the subject crashed in native code"
        return f"the process ended with exit code {exitcode}: the subject left Python"


def _work(connection: Connection, work: Callable[[Connection], object], parent: int) -> None:
    if sys.platform == "linux":  # elsewhere, one that hangs in native code outlives a parent that is killed
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        if os.getppid() != parent:
            return
    for stop in (signal.SIGINT, signal.SIGTERM):  # the parent's, which ends this process
        signal.signal(stop, signal.SIG_IGN)
    faulthandler.disable()  # a crash is the report's to tell
    stderr = os.dup(2)
    with Path(os.devnull).open("wb") as nowhere:  # a line that the module prints is printed thousands of times
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    try:
        work(connection)
    except BaseException:  # the harness's own
        os.dup2(stderr, 2)
        raise
