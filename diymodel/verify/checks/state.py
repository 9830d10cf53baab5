"""What the module computes is in its state dict, all of it, and nothing fits where it does not belong."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from diymodel.verify.adapters import LM
from diymodel.verify.failure import CheckFailure, NotApplicable, SubjectError
from diymodel.verify.registry import check
from diymodel.verify.trial import Trial


@check(
    "state.round_trip",
    title="a state dict, saved and loaded into a new module, gives the same logits bit for bit",
    step="4.2",
    causes=("state-outside-checkpoint", "parameters-unregistered", "buffers-uninitialised", "tie-lost"),
)
def round_trip(trial: Trial) -> None:
    lm = trial.model()
    ids = trial.tokens(lm)
    file = io.BytesIO()
    torch.save(lm.module.state_dict(), file)
    file.seek(0)
    expected = lm.logits(ids)
    trial.varies(trial.build(lm.config, trial.values["weights"] + 1, trial.values["sharpness"]).logits(ids), expected)
    other = trial.fresh(lm.config)  # not called yet: a call may set up buffers
    try:
        other.module.load_state_dict(torch.load(file, weights_only=True, map_location=trial.device))
    except RuntimeError as error:
        raise CheckFailure(f"a state dict must load into a new module of the same config, saw {error}") from error
    trial.identical(
        other.logits(ids),
        lm.logits(ids),
        "after loading the state dict, a new module must give the same logits bit for bit",
    )


@check(
    "state.strict_load",
    title="a state dict of another configuration, or without one of the weights, is refused",
    step="4.2",
    causes=("lenient-load",),
)
def strict_load(trial: Trial) -> None:
    lm = trial.model()
    config, told = lm.config, 0
    larger = {
        "num_layers": config.num_layers + 1,
        "vocab_size": config.vocab_size + 1,
        "intermediate_size": config.mlp_size + 1,
        "hidden_size": config.hidden_size + 2 * config.num_heads,
    }
    for field, value in larger.items():
        other = trial.fresh(replace(config, **{field: value})).module  # type: ignore[arg-type]
        here, there = lm.module.state_dict(), other.state_dict()
        if _shapes(here) == _shapes(there):
            continue
        told += 1
        now = getattr(config, field)
        what = "load_state_dict must refuse a state dict with"
        trial.refuses(partial(other.load_state_dict, here), f"{what} {field}={now}, not {value}")
        trial.refuses(partial(lm.module.load_state_dict, there), f"{what} {field}={value}, not {now}")
    told += _without_a_weight(trial, lm)
    if not told:
        raise NotApplicable(
            "no field of the configuration that was tried changes the shapes in the state dict, and it holds no matrix"
        )


def _without_a_weight(trial: Trial, lm: LM) -> bool:
    """Hold ``load_state_dict`` to refusing a matrix that is missing, unless it finds it elsewhere, as a tied head."""
    state = dict(lm.module.state_dict())
    names = [name for name, parameter in lm.module.named_parameters() if parameter.dim() > 1 and name in state]
    if not names:
        return False
    del state[missing := names[trial.draw("missing", st.integers(0, 999)) % len(names)]]
    ids, other = trial.tokens(lm), trial.fresh(lm.config)
    try:
        other.module.load_state_dict(state)
    except SubjectError:
        raise
    except Exception:  # any error a stranger chooses is a refusal
        return True
    if not torch.equal(other.logits(ids), lm.logits(ids)):
        raise CheckFailure(f"load_state_dict must refuse a state dict without {missing}, saw no error")
    return True


def _shapes(state: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items() if isinstance(value, torch.Tensor)}


@check(
    "state.depth_adds_parameters",
    title="every layer has parameters of its own",
    step="4.1",
    causes=("block-shared", "parameters-unregistered"),
)
def depth_adds_parameters(trial: Trial) -> None:
    lm = trial.model()
    config = lm.config
    ids = trial.tokens(lm)
    deeper = trial.fresh(replace(config, num_layers=config.num_layers + 1))
    shallow, deep = (sum(p.numel() for p in part.module.parameters()) for part in (lm, deeper))
    if deep > shallow:
        return
    if _shapes(lm.module.state_dict()) == _shapes(deeper.module.state_dict()):
        deeper.module.load_state_dict(lm.module.state_dict())
        if torch.equal(deeper.logits(ids), lm.logits(ids)):
            raise NotApplicable("num_layers changes neither the parameters nor the logits")
        if block := _called_for_each(lm, deeper, ids):
            raise NotApplicable(f"by its design {block} is every layer: it stands in the module once")
    raise CheckFailure(
        f"{config.num_layers + 1} layers must have more parameters than {config.num_layers}, saw {deep} and {shallow}"
    )


def _called_for_each(shallow: LM, deep: LM, ids: Tensor) -> str | None:
    """A part with parameters that a deeper module has in one place as well, and calls more often."""
    called: list[Counter[str]] = []
    for lm in (shallow, deep):
        calls: Counter[str] = Counter()
        for name, part in lm.module.named_modules(remove_duplicate=False):
            if name and any(True for _ in part.parameters()):
                part.register_forward_pre_hook(lambda *_, name=name, calls=calls: calls.update([name]))
        lm.logits(ids)
        called.append(calls)
    few, many = called
    return next((name for name in few if many[name] > few[name]), None) if few.keys() == many.keys() else None


@check(
    "state.every_parameter_registered",
    title="no layer or parameter is hidden in a plain list or dict",
    step="4.1",
    causes=("parameters-unregistered",),
)
def every_parameter_registered(trial: Trial) -> None:
    module = trial.fresh(trial.model().config).module
    known = {id(part) for part in (*module.modules(), *module.parameters())}
    for name, part in module.named_modules():
        for attribute, value in vars(part).items():
            if attribute in ("_parameters", "_modules", "_buffers"):
                continue
            for hidden in _parts(value):
                if id(hidden) not in known:
                    where = f"{name}.{attribute}, a {type(value).__name__}".lstrip(".")
                    raise CheckFailure(
                        f"every layer and parameter must be in parameters(), saw a "
                        f"{type(hidden).__name__} in {where}: use nn.ModuleList or nn.ModuleDict"
                    )


def _parts(value: Any) -> Iterable[Any]:
    """Modules with parameters, and parameters, in nested lists, tuples and dicts."""
    if isinstance(value, nn.Parameter) or (isinstance(value, nn.Module) and any(True for _ in value.parameters())):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [part for item in items for part in _parts(item)]


@check(
    "state.deepcopy",
    title="a deep copy gives the same logits and has weights of its own",
    step="4.2",
    causes=("copy-uses-original", "state-outside-checkpoint", "parameters-unregistered"),
)
def deepcopy(trial: Trial) -> None:
    lm = trial.model()
    ids = trial.tokens(lm)
    before = lm.logits(ids).detach().clone()
    try:
        twin = lm.twin()
    except NotApplicable as error:
        what = f"after a call copy.deepcopy must copy the module, saw that {error}"
        raise CheckFailure(what, causes=()) from error
    trial.identical(twin.logits(ids), lm.logits(ids), "a deep copy must give the same logits bit for bit")
    other = trial.build(lm.config, trial.values["weights"] + 1, 1)
    weights = other.module.state_dict()
    nn.Module.load_state_dict(twin.module, weights, strict=False)  # a call may have set up buffers that are no weights
    if not torch.equal(lm.logits(ids), before):
        raise CheckFailure("changing a deep copy's weights must leave the original's logits alone, saw other logits")
    trial.identical(
        twin.logits(ids),
        other.logits(ids),
        "a deep copy with other weights must give the logits of a module with those weights",
    )
