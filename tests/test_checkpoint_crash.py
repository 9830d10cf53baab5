"""Checkpoints under kill -9, a full disk and several writers: what is at the path is always one whole model.

The children are forked, so that each of them starts in milliseconds with torch and the models in place.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diymodel import (
    DIYConfig,
    DIYForCausalLM,
    load_checkpoint,
    load_pretrained,
    save_checkpoint,
    save_pretrained,
)

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
_fork = multiprocessing.get_context("fork") if hasattr(os, "fork") else None

CONFIG = DIYConfig(vocab_size=64, num_layers=2, hidden_size=64, num_heads=4, max_seq_len=16)
Save = Callable[[Path, DIYForCausalLM], object]
Load = Callable[[Path], DIYForCausalLM]
FORMS: list[Any] = [
    pytest.param(save_checkpoint, load_checkpoint, id="file"),
    pytest.param(lambda path, model: save_pretrained(model, path), load_pretrained, id="directory"),
]


@pytest.fixture(scope="module")
def models() -> tuple[DIYForCausalLM, DIYForCausalLM]:
    pytest.importorskip("safetensors.torch")
    torch.manual_seed(0)
    return DIYForCausalLM(CONFIG), DIYForCausalLM(CONFIG)


def _which(model: DIYForCausalLM, models: tuple[DIYForCausalLM, ...]) -> int:
    """The index of the model that this one is, in every weight."""
    state = model.state_dict()
    for index, candidate in enumerate(models):
        if all(torch.equal(state[name], weight) for name, weight in candidate.state_dict().items()):
            return index
    raise AssertionError("the loaded model is none of those that were saved: weights are mixed")


def _run_and_kill(job: Callable[[], object], moments: list[float], after: Callable[[], object]) -> None:
    """For every moment: fork a child that repeats ``job``, kill it so many seconds after its start, call ``after``."""
    for moment in moments:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.write(writing, b"!")
                while True:
                    job()
            finally:
                os._exit(1)
        os.read(reading, 1)
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the child ended by an error of its own"
        os.close(reading)
        os.close(writing)
        after()


def _moments(count: int, seed: int, job: Callable[[], object]) -> list[float]:
    """Seeded moments from 0 to 30 ms, or on a slow disk to three times what ``job`` takes there."""
    start = time.perf_counter()
    job()
    longest = min(max(0.03, 3 * (time.perf_counter() - start)), 0.3)
    generator = random.Random(seed)
    return [generator.uniform(0, longest) for _ in range(count)]


def _die_before_operation(fatal: int) -> None:
    """Kill this process as it begins its file operation number ``fatal``: an opening, a mkdir, a rename, a removal."""
    left = itertools.count(fatal, -1)

    def strike(event: str, _: object) -> None:
        if event in ("open", "os.mkdir", "os.rename", "os.remove") and next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(strike)


def _kill_before_every_step(job: Callable[[], object], after: Callable[[], object]) -> None:
    """Fork children that do ``job`` once, each killed one file operation later, until one gets through."""
    for fatal in itertools.count():
        child = os.fork()
        if child == 0:
            try:
                _die_before_operation(fatal)
                job()
            except BaseException:
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        after()
        if not os.WIFSIGNALED(status):
            assert status == 0, "the child ended by an error of its own"
            return


@pytest.mark.parametrize(("save", "load"), FORMS)
def test_kill_before_any_step_of_saving_leaves_one_of_the_two_models(
    tmp_path: Path, models: tuple[DIYForCausalLM, ...], save: Save, load: Load
) -> None:
    path = tmp_path / "model"
    seen: list[int] = []

    def save_both() -> None:
        for model in models:
            save(path, model)

    save_both()
    _kill_before_every_step(save_both, lambda: seen.append(_which(load(path), models)))
    assert set(seen) == {0, 1}, "no kill came between the two saves: nothing was tested"
    leftovers = set(tmp_path.rglob(".diymodel-*"))
    assert leftovers, "no kill came in the middle of a save: nothing was tested"
    save(path, models[1])  # with other writers' remains around
    assert _which(load(path), models) == 1
    assert set(tmp_path.rglob(".diymodel-*")) == leftovers


@pytest.mark.parametrize(("save", "load"), FORMS)
def test_kill_at_any_moment_of_saving_leaves_one_of_the_two_models(
    tmp_path: Path, models: tuple[DIYForCausalLM, ...], save: Save, load: Load
) -> None:
    """Between the steps as well: in the middle of a write. Where a moment falls is the machine's affair."""
    path = tmp_path / "model"

    def save_both() -> None:
        for model in models:
            save(path, model)

    _run_and_kill(save_both, _moments(30, 1, save_both), lambda: _which(load(path), models))


def test_kill_while_a_directory_is_made_leaves_it_whole_or_absent(
    tmp_path: Path, models: tuple[DIYForCausalLM, ...]
) -> None:
    numbers = iter(range(10**6))
    found: list[Path] = []

    def save_new() -> None:
        save_pretrained(models[0], tmp_path / f"run-{next(numbers)}")

    def check() -> None:
        for path in tmp_path.glob("run-*"):
            assert _which(load_pretrained(path), models) == 0
            found.append(path)
            for file in path.iterdir():
                file.unlink()
            path.rmdir()

    _kill_before_every_step(save_new, check)
    assert found
    _run_and_kill(save_new, _moments(15, 2, save_new), check)


def test_kill_harness_notices_a_writer_in_place(tmp_path: Path, models: tuple[DIYForCausalLM, ...]) -> None:
    """The kills above can fail: torch.save straight to the path loses files."""
    path = tmp_path / "model"
    content = {"config": CONFIG.to_dict(), "state_dict": models[0].state_dict()}
    lost = []

    def check() -> None:
        try:
            load_checkpoint(path)
        except (ValueError, FileNotFoundError):
            lost.append(path)

    def save_in_place() -> None:
        torch.save(content, path)

    _run_and_kill(save_in_place, _moments(25, 3, save_in_place), check)
    assert lost


def _in_child(job: Callable[[], object]) -> str:
    """What ``job`` raised in a forked child: type and message, or an empty string."""
    assert _fork
    receiving, sending = _fork.Pipe(duplex=False)

    def run() -> None:
        try:
            job()
            sending.send("")
        except Exception as error:
            sending.send(f"{type(error).__name__}: {error}")

    child = _fork.Process(target=run)
    child.start()
    message: str = receiving.recv()
    child.join()
    return message


@pytest.mark.parametrize("existed", [True, False])
@pytest.mark.parametrize(("save", "load"), FORMS)
def test_full_disk_keeps_the_old_model_and_says_so(
    tmp_path: Path, models: tuple[DIYForCausalLM, ...], save: Save, load: Load, existed: bool
) -> None:
    path = tmp_path / "model"
    if existed:
        save(path, models[0])
    before = set(tmp_path.rglob("*"))

    def save_on_full_disk() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that the write fails instead of ending the process
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        save(path, models[1])

    message = _in_child(save_on_full_disk)
    assert message.startswith("OSError: [Errno 27] could not write"), message
    assert str(path) in message
    assert "File too large" in message
    assert ("what was there is unchanged" if existed else "nothing was there") in message
    assert set(tmp_path.rglob("*")) == before
    if existed:
        assert _which(load(path), models) == 0


@pytest.mark.parametrize(("save", "load"), FORMS)
def test_concurrent_writers_never_mix(
    tmp_path: Path, models: tuple[DIYForCausalLM, ...], save: Save, load: Load
) -> None:
    assert _fork
    path = tmp_path / "model"

    def save_often(model: DIYForCausalLM) -> None:
        for _ in range(40):
            save(path, model)

    writers = [_fork.Process(target=save_often, args=(model,)) for model in models]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            _which(load(path), models)
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    _which(load(path), models)
    assert not list(tmp_path.rglob(".diymodel-*"))
