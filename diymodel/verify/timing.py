"""A limit on how long one call may take, where Python can interrupt it: in the main thread, with POSIX signals."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

_IMPORT_SECONDS = 60.0  # that an import under way may take beyond a limit
_AGAIN = 0.05  # seconds until it is looked at again


class OutOfTime(BaseException):
    """The limit has passed. No Exception, so that no handler on the way takes it for an error of the call."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise :class:`OutOfTime` inside after so many seconds. It reaches Python code only, not a hanging kernel.

    An import that is under way is let finish: half of one, as of torch's compiler at its first use, breaks all later
    ones in this process.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    outside = sys._getframe(2)  # beyond contextlib's
    last = time.monotonic() + seconds + _IMPORT_SECONDS

    def stop(_signal: int, frame: FrameType | None) -> None:
        if _is_importing(frame, outside) and time.monotonic() < last:
            signal.setitimer(signal.ITIMER_REAL, _AGAIN)
            return
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _is_importing(frame: FrameType | None, outside: FrameType) -> bool:
    while frame is not None and frame is not outside:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
