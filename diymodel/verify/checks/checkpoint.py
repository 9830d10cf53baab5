"""Checkpoints as the subject itself saves and loads them: complete, closed to code, and whole or refused."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from diymodel.config import DIYConfig
from diymodel.verify.adapters import LM
from diymodel.verify.failure import CheckFailure, NotApplicable, said
from diymodel.verify.registry import check
from diymodel.verify.trial import Trial
from diymodel.verify.wrapping import Compiled, Parallel, compiled


@check(
    "checkpoint.round_trip",
    title="a checkpoint gives back the same model with all its settings",
    step="4.3",
    needs=("checkpoint",),
    causes=("config-field-not-saved", "state-outside-checkpoint", "buffers-uninitialised", "tie-lost"),
)
def round_trip(trial: Trial) -> None:
    lm = trial.model()
    ids = trial.tokens(lm)
    with _saved(trial, lm.cast(torch.float32)) as path:  # float32, which every format keeps as it is
        loaded = _loaded(trial, path, lm, "a checkpoint must load")
    lm.cast(trial.dtype)
    expected = lm.logits(ids)
    trial.varies(trial.build(lm.config, trial.values["weights"] + 1, trial.values["sharpness"]).logits(ids), expected)
    trial.identical(loaded.logits(ids), expected, "a module from a checkpoint must give the same logits bit for bit")
    before, after = _numbers(lm.module), _numbers(loaded.module)
    for name, value in before.items():
        if after.get(name) != value and _is_read(trial, lm, name):
            raise CheckFailure(
                f"the config of a module from a checkpoint must have {name}={value!r}, saw {after.get(name)!r}"
            )


@check(
    "checkpoint.wrapped",
    title="a checkpoint of a compiled or data-parallel module loads",
    step="4.2",
    needs=("checkpoint",),
    causes=("wrapper-prefix-keys", "lenient-load"),
)
def wrapped(trial: Trial) -> None:
    lm = trial.model()
    ids = trial.tokens(lm)
    wrapper = trial.draw("wrapper", st.sampled_from(("torch.compile", "DataParallel")))
    if wrapper == "DataParallel":
        _comes_back(trial, lm, ids, Parallel, wrapper)
        return
    try:
        _comes_back(trial, lm, ids, Compiled, wrapper)
    except CheckFailure:  # the subject may know torch's own class only
        _comes_back(trial, lm, ids, compiled, wrapper)


def _comes_back(trial: Trial, lm: LM, ids: Tensor, wrap: Callable[[nn.Module], Any], wrapper: str) -> None:
    what = f"a checkpoint of a module in {wrapper} must load"
    with contextlib.ExitStack() as stack:
        try:
            path = stack.enter_context(_saved(trial, wrap(lm.cast(torch.float32))))
        except Exception as error:  # to refuse is safe
            raise NotApplicable(f"a module in {wrapper} is not saved: {said(error)}") from error
        loaded = _loaded(trial, path, lm, what)
    lm.cast(trial.dtype)
    trial.identical(loaded.logits(ids), lm.logits(ids), f"{what} and give the same logits bit for bit")


@check(
    "checkpoint.refuses_code",
    title="a checkpoint that contains code is refused, and the code does not run",
    step="4.2",
    needs=("checkpoint",),
    causes=("unsafe-unpickling",),
)
def refuses_code(trial: Trial) -> None:
    lm = trial.model()
    alone = trial.draw("alone", st.booleans())
    zipped = trial.draw("zipped", st.booleans())
    with _saved(trial, lm.module) as path, tempfile.TemporaryDirectory() as place:
        trace = Path(place, "trace")
        code = _Code(trace)
        content = code if alone else {"config": lm.config.to_dict(), "state_dict": lm.module.state_dict(), "x": code}
        for file in _files(path):
            torch.save(content, file, _use_new_zipfile_serialization=zipped)
        loaded = _load(trial, path)
        if trace.exists():
            raise CheckFailure("code in a checkpoint must not run when it is loaded, saw it run")
    if isinstance(loaded, nn.Module):
        raise CheckFailure("a checkpoint that contains code must be refused, saw a module built from it")


class _Code:
    """Unpickled, it makes a directory, as it could do anything else."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@check(
    "checkpoint.damaged",
    title="a checkpoint that was cut short, or that lacks a weight, is refused",
    step="4.2",
    needs=("checkpoint",),
    causes=("lenient-load",),
)
def damaged(trial: Trial) -> None:
    lm = trial.model()
    ids = trial.tokens(lm)
    damage = trial.draw("damage", st.sampled_from(("cut short", "a weight missing")))
    with _saved(trial, lm.cast(torch.float32)) as path:
        what = _cut_short(trial, path) if damage == "cut short" else _without_a_weight(trial, path, lm)
        loaded = _load(trial, path)
    if isinstance(loaded, str):
        return
    lm.cast(trial.dtype)
    seen, expected = _called_as(lm, loaded, trial).logits(ids), lm.logits(ids)
    if not torch.equal(seen, expected):  # else what is missing was of no importance: a last line break, or a tied head
        raise CheckFailure(f"a checkpoint {what} must be refused, saw a module with other logits")


def _cut_short(trial: Trial, path: Path) -> str:
    kept = trial.draw("kept", st.integers(0, 999))
    file = max(_files(path), key=lambda file: file.stat().st_size)
    size = file.stat().st_size
    os.truncate(file, size * kept // 1000)
    return f"of {size} bytes that was cut to {size * kept // 1000}"


def _without_a_weight(trial: Trial, path: Path, lm: LM) -> str:
    names = {name for name, parameter in lm.module.named_parameters() if parameter.dim() > 1}
    index = trial.draw("missing", st.integers(0, 999))
    for file in _files(path):
        try:
            content = torch.load(file, weights_only=True)
        except Exception:  # it may be of any format
            continue
        weights = _mapping_of(names, content)
        if weights is not None:
            missing = sorted(names & weights.keys())[index % len(names & weights.keys())]
            del weights[missing]
            torch.save(content, file)
            return f"without {missing}"
    raise NotApplicable("torch.load reads no weights by their names in the checkpoint")


def _mapping_of(names: set[str], content: Any) -> dict[str, Any] | None:
    """The first mapping with any of the names as keys, at any depth."""
    if not isinstance(content, dict):
        return None
    if names & content.keys():
        return content
    return next((found for value in content.values() if (found := _mapping_of(names, value)) is not None), None)


@contextlib.contextmanager
def _saved(trial: Trial, module: nn.Module) -> Iterator[Path]:
    """What the subject's own ``save`` writes."""
    assert trial.subject.checkpoint is not None
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "checkpoint.pt")
        trial.subject.checkpoint.save(module, path)
        yield path


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]


def _load(trial: Trial, path: Path) -> nn.Module | str:
    """What the subject's own ``load`` builds, or says against it."""
    assert trial.subject.checkpoint is not None
    try:
        return trial.subject.checkpoint.load(path)
    except Exception as error:  # any error a stranger chooses is a refusal
        return said(error)


def _loaded(trial: Trial, path: Path, lm: LM, what: str) -> LM:
    loaded = _load(trial, path)
    if isinstance(loaded, str):
        raise CheckFailure(f"{what}, saw {loaded}")
    return _called_as(lm, loaded, trial)


def _called_as(lm: LM, module: nn.Module, trial: Trial) -> LM:
    """A module that was loaded, as ``lm`` is called."""
    other = LM(module, lm.config, lm.convention)
    other.cast(trial.dtype, trial.device).eval()
    return other


def _is_read(trial: Trial, lm: LM, name: str) -> bool:
    """Whether the subject reads this field of the configuration that it is built of, so that losing it matters."""
    if name not in lm.config.to_dict():  # it is the subject's own
        return True
    read = set()

    class Watched(DIYConfig):
        def __getattribute__(self, field: str) -> Any:
            read.add(field)
            return super().__getattribute__(field)

    config = Watched(**lm.config.to_dict())
    read.clear()  # of being validated
    trial.subject.made(config)
    return name in read


def _numbers(module: nn.Module) -> dict[str, float]:
    """What a module keeps as its ``config``, as far as it is numbers."""
    config = getattr(module, "config", {})
    values = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
    return {name: value for name, value in values.items() if isinstance(value, (int, float))}
