"""What autograd's graph of the logits tells of the way that parameters enter them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

# Kinds of nodes.
_RESHAPES = {
    "ExpandBackward",
    "PermuteBackward",
    "ReshapeAliasBackward",
    "SqueezeBackward",
    "ToCopyBackward",
    "TransposeBackward",
    "UnsafeViewBackward",
    "UnsqueezeBackward",
    "ViewBackward",
}
_ADDITIONS = {"AddBackward", "SubBackward"}
_ADDITIONS_OF_THE_FIRST = {"AddmmBackward", "BaddbmmBackward"}  # to a product of the others
_PRODUCT = re.compile("mm|Mv|Dot|Attention")


def only_added(logits: Tensor, parameters: Mapping[str, nn.Parameter]) -> set[str]:
    """The parameters that are only ever added, whole, to features; what is added to scores is meant to change them."""
    users = _users(logits)
    leaves = {id(node.variable): node for node in users if node is not None and hasattr(node, "variable")}
    return {name for name, p in parameters.items() if id(p) in leaves and _is_added(leaves[id(p)], users)}


def _users(objective: Tensor) -> dict[Any, list[tuple[Any, int]]]:
    """The nodes of a graph, each with those that take its result, and as which of their operands."""
    users: dict[Any, list[tuple[Any, int]]] = {objective.grad_fn: []}
    waiting: list[Any] = [objective.grad_fn]
    while waiting:
        user = waiting.pop()
        for operand, (node, _) in enumerate(user.next_functions):
            if node is None:
                continue
            if node not in users:
                waiting.append(node)
            users.setdefault(node, []).append((user, operand))
    return users


def _is_added(node: Any, users: dict[Any, list[tuple[Any, int]]]) -> bool:
    def adds(user: Any, operand: int) -> bool:
        kind = user.name().rstrip("0123456789")
        if kind in _RESHAPES:
            return _is_added(user, users)
        is_sum = kind in _ADDITIONS or (kind in _ADDITIONS_OF_THE_FIRST and operand == 0)
        return is_sum and not _is_softmaxed(user, users)

    return all(adds(user, operand) for user, operand in users[node])


def _is_softmaxed(node: Any, users: dict[Any, list[tuple[Any, int]]]) -> bool:
    """Whether a softmax takes what a node gives, with no product of matrices between."""
    seen, waiting = {node}, [node]
    while waiting:
        for user, _ in users[waiting.pop()]:
            if "Softmax" in user.name():
                return True
            if user not in seen and not _PRODUCT.search(user.name()):
                seen.add(user)
                waiting.append(user)
    return False
