"""What a run shows, keeps and listens to: its progress lines, its metrics file, Ctrl-C."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from diymodel._files import replace_file

Log = Callable[[str], object]


class Progress:
    """The progress lines: mean loss and speed since the last one, and the time that is left."""

    def __init__(self, first_step: int, steps: int, log: Log) -> None:
        self._first_step = self._step = first_step
        self._steps = steps
        self._log = log
        self._started = self._reported = time.perf_counter()
        self._losses: list[float] = []
        self._num_tokens = 0
        self._learning_rate = 0.0

    def add(self, loss: float, num_tokens: int, learning_rate: float) -> None:
        self._step += 1
        self._losses.append(loss)
        self._num_tokens += num_tokens
        self._learning_rate = learning_rate

    def report(self) -> None:
        now = time.perf_counter()
        loss = sum(self._losses) / len(self._losses)
        speed = self._num_tokens / (now - self._reported)
        left = round((now - self._started) / (self._step - self._first_step) * (self._steps - self._step))
        self._log(
            f"step {self._step}/{self._steps}  loss {loss:.3f}  lr {self._learning_rate:.2e}  "
            f"{speed:,.0f} tokens/s  {left // 60}:{left % 60:02} left"
        )
        self._reported, self._losses, self._num_tokens = now, [], 0


class Metrics:
    """``metrics.jsonl``: one JSON object a line, each with its "step"; lines after ``first_step`` are dropped first."""

    def __init__(self, path: Path, first_step: int) -> None:
        self._path = path
        if path.exists():
            kept = [line + b"\n" for line in path.read_bytes().splitlines() if _is_up_to(line, first_step)]
            replace_file(path, lambda file: file.write(b"".join(kept)))

    def write(self, **values: float) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


def _is_up_to(line: bytes, step: int) -> bool:
    """Whether a line belongs to the steps up to this one; a line torn by a crash belongs to none."""
    try:
        return bool(json.loads(line)["step"] <= step)
    except (ValueError, KeyError, TypeError):
        return False


class CtrlC:
    """Within, the first Ctrl-C only sets ``pressed``; a second one raises ``KeyboardInterrupt`` as usual."""

    pressed = False

    def __enter__(self) -> Self:
        # Python allows handlers in the main thread only; a shell that runs us in the background may ignore SIGINT.
        self._previous = signal.getsignal(signal.SIGINT)
        self._set = threading.current_thread() is threading.main_thread() and self._previous != signal.SIG_IGN
        if self._set:
            signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._set:
            signal.signal(signal.SIGINT, self._previous)

    def _press(self, number: int, frame: FrameType | None) -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True
