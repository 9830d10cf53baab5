"""Shared weights stay shared."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from diymodel.verify.embeddings import tables_of
from diymodel.verify.failure import CheckFailure, NotApplicable, said
from diymodel.verify.registry import check
from diymodel.verify.trial import Trial


@check(
    "state.tied_weights_stay_tied",
    title="weights that are shared stay shared through load, copy and a change of dtype",
    step="5.3",
    causes=("tie-lost",),
)
def tied_weights_stay_tied(trial: Trial) -> None:
    config = trial.model(tie_word_embeddings=True).config
    module = trial.fresh(config).module
    groups = shared(module)
    if not groups:
        built = trial.subject.build(config)
        if parted := shared(built):
            raise CheckFailure(
                f"{' and '.join(parted[0])} lie in the same memory and must be one parameter (a tie), saw two, which "
                "another dtype or device, or a copy, parts: nn.Parameter(…) around a weight makes a new one"
            )
        if copies := _copies(built, config.vocab_size):
            raise CheckFailure(f"{copies} start equal and must be one parameter (a tie), saw two that part in training")
        raise NotApplicable("no parameter is shared where tie_word_embeddings is True")
    names = " and ".join(groups[0])

    def loaded() -> nn.Module:
        other = trial.fresh(config).module
        other.load_state_dict({name: value.clone() for name, value in module.state_dict().items()})  # as from a file
        return other

    def copied() -> nn.Module:
        try:
            return copy.deepcopy(module)
        except Exception as error:  # a stranger's module may hold what torch copies not
            raise NotApplicable(f"the module cannot be copied: {said(error)}") from error

    def trained() -> nn.Module:
        other = copied()
        other.train()  # which may return nothing
        return other

    moves: dict[str, Callable[[], nn.Module]] = {
        "load_state_dict": loaded,
        "copy.deepcopy": copied,
        "float()": lambda: copied().float(),
        "train()": trained,
    }
    for move, moved in moves.items():
        if shared(moved()) != groups:
            raise CheckFailure(f"{names} are one parameter and must be one after {move}, saw two")


def shared(module: nn.Module) -> list[list[str]]:
    """Names of parameters that lie in the same memory, grouped."""
    groups: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter.numel():
            groups.setdefault(parameter.data_ptr(), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _copies(module: nn.Module, vocab_size: int) -> str | None:
    """A random embedding and another table of the vocabulary that are equal as constructed."""
    tables = [(n, p) for n, p in module.named_parameters() if p.dim() == 2 and p.shape[0] == vocab_size]
    embeddings = {id(table.weight) for table in tables_of(module)} or {id(p) for _, p in tables}
    for i, (name, table) in enumerate(tables):
        for other_name, other in tables[:i]:
            if embeddings.isdisjoint({id(table), id(other)}):  # experts may begin as copies of one
                continue
            if torch.equal(table, other) and not bool((table == table[0, 0]).all()):
                return f"{other_name} and {name}"
    return None
