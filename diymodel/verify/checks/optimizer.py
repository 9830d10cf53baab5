"""An optimizer that the module makes itself, as nanoGPT's ``configure_optimizers`` does, updates all that learns."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from types import SimpleNamespace
from typing import Any

from diymodel.verify.failure import CheckFailure, NotApplicable, first_of, said
from diymodel.verify.learning import trainable
from diymodel.verify.registry import check
from diymodel.verify.trial import Trial

_METHODS = (
    *("configure_optimizers", "configure_optimizer", "setup_optimizers", "setup_optimizer"),
    *("get_optimizer", "create_optimizer", "build_optimizer", "make_optimizer"),
)
_ARGUMENTS = {
    **dict.fromkeys(("weight_decay", "wd"), 0.1),
    **dict.fromkeys(("learning_rate", "lr"), 1e-3),
    "betas": (0.9, 0.95),
    "eps": 1e-8,
    **dict.fromkeys(("device_type", "device"), "cpu"),
}
_TOGETHER = ("train_config", "config", "cfg", "args")  # minGPT's: an object that holds them


@check(
    "training.optimizer_is_complete",
    title="the optimizer that the module makes holds every parameter that learns",
    step="2.2",
    needs=("gradient",),
    causes=("optimizer-forgets-parameters",),
)
def optimizer_is_complete(trial: Trial) -> None:
    lm = trial.model()
    name = next((name for name in _METHODS if callable(getattr(lm.module, name, None))), None)
    if name is None:
        raise NotApplicable(f"the module has no {_METHODS[0]}")
    try:
        made = _call(getattr(lm.module, name))
    except Exception as error:  # a stranger's method may raise anything
        raise NotApplicable(f"{name} makes no optimizer of usual settings: {said(error)}") from error
    optimizers = list(_optimizers(made))
    if not optimizers:
        raise NotApplicable(f"{name} returned {type(made).__name__}, in which there is no optimizer")
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    forgotten = [
        learns
        for learns, parameter in trainable(lm).items()
        if id(parameter) not in held and not any(fnmatchcase(learns, glob) for glob in trial.subject.no_gradient)
    ]
    if forgotten:
        raise CheckFailure(
            f"{name} must hand every parameter that learns to the optimizer, saw none of {first_of(forgotten)}"
        )


def _call(method: Callable[..., Any]) -> Any:
    """With usual settings for what has no default."""
    known = {**_ARGUMENTS, **dict.fromkeys(_TOGETHER, SimpleNamespace(**_ARGUMENTS))}
    parameters = inspect.signature(method).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    return method(**{name: known[name] for name in needed if name in known})


def _optimizers(made: Any) -> Iterable[Any]:
    """Alone, or in containers with what else a training loop asks for; whatever has groups as torch's have is one."""
    if isinstance(getattr(made, "param_groups", None), list):
        yield made
    elif isinstance(made, Mapping):
        yield from _optimizers(list(made.values()))
    elif isinstance(made, (list, tuple)):
        for part in made:
            yield from _optimizers(part)
