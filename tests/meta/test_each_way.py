"""A check that tries several ways fails where one of them alone is wrong."""

from __future__ import annotations

import pytest

from diymodel.verify.runner import verify_one
from diymodel.verify.settings import Settings
from diymodel.zoo.base import BASES
from tests.meta.verdicts import CHECKS, EXAMPLES

WAYS = [  # a check, a base, what is changed in its source, and what the failure must name
    (
        "checkpoint.wrapped",
        "pretrained",
        {
            "    model = getattr(": '    prefix = "module." * hasattr(model, "module")\n    model = getattr(',
            "model.state_dict()}, path)": "{prefix + key: value for key, value in model.state_dict().items()}}, path)",
        },
        "in DataParallel must load",
    ),
    (
        "state.strict_load",
        "headwise",
        {
            "    @torch.no_grad()\n    def generate": "    def load_state_dict(self, state_dict):\n"
            "        own = self.state_dict()\n"
            "        first = {k: v for k, v in own.items() if k.startswith('blocks.0.') and v.dim() > 1}\n"
            "        return super().load_state_dict({**first, **state_dict})\n\n"
            "    @torch.no_grad()\n    def generate",
        },
        "must refuse a state dict without ",
    ),
    (
        "loss.labels_unchanged",
        "learned",
        {
            "scored, targets = output": "labels[~real] = -100 if attention_mask is not None else 0\n"
            "            scored, targets = output",
        },
        "labels must stay ",
    ),
    (
        "padding.left_with_cache",
        "learned",
        {
            "if position_ids is None:": "if position_ids is None and start:\n"
            "            position_ids = torch.arange(start, start + T).expand(B, T)\n"
            "        elif position_ids is None:",
        },
        "padded on the left",
    ),
    (
        "padding.positions_are_used",
        "learned",
        {"if position_ids is None:": "if position_ids is None or past_key_values is not None:"},
        "on a cache too, ",
    ),
    (
        "sensitivity.shift_invariance",
        "switch",
        {"return torch.cat((-x2, x1), dim=-1)": "return torch.cat((x2, x1), dim=-1)"},
        "moving every position by ",
    ),
]


@pytest.mark.parametrize(("check_id", "base", "changes", "named"), WAYS, ids=[way[0] for way in WAYS])
def test_one_way_alone_is_wrong(check_id: str, base: str, changes: dict[str, str], named: str) -> None:
    source = BASES[base].source
    for old, new in changes.items():
        assert source.count(old) == 1
        source = source.replace(old, new)
    failure = verify_one(BASES[base].subject(source), CHECKS[check_id], Settings(EXAMPLES, shrink=False)).failure
    assert failure is not None
    assert named in failure.message


def test_who_asks_for_the_classes_of_torchs_own_wrappers_is_shown_them() -> None:
    base = BASES["pretrained"]
    old = '    model = getattr(model, "_orig_mod", getattr(model, "module", model))'
    assert base.source.count(old) == 1
    new = """    from torch._dynamo import OptimizedModule
    if isinstance(model, OptimizedModule):
        model = model._orig_mod
    if isinstance(model, nn.DataParallel):
        model = model.module"""
    result = verify_one(base.subject(base.source.replace(old, new)), CHECKS["checkpoint.wrapped"], Settings(EXAMPLES))
    assert (result.status, result.examples) == ("passed", EXAMPLES), result.failure
