"""Bugs of the module's own loss."""

from __future__ import annotations

from diymodel.zoo.bug import Bug

BUGS = [
    Bug(
        "labels-not-shifted",
        "hub",
        "logits[:, :-1].flatten(0, 1), labels[:, 1:]",
        "logits.flatten(0, 1), labels",
        kills=("loss.value",),
        where="Hub",
    ),
    Bug(
        "labels-flattened-before-shift",
        "hub",
        "logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()",
        "logits.flatten(0, 1)[:-1], labels.flatten()[1:]",
        kills=("loss.value",),
        where="Hub",
    ),
    Bug(
        "ignore-index-not-honoured",
        "nanogpt",
        "targets.flatten(), ignore_index=-1,",
        "targets.flatten().clamp(min=0),",
        kills=("loss.value",),
        where="NanoGPT",
    ),
    Bug(
        "loss-wrong-denominator",
        "nanogpt",
        "(targets != -1).sum().clamp(min=1)",
        "targets.numel()",
        kills=("loss.value",),
        where="NanoGPT",
    ),
    Bug(
        "gradient-detached",
        "hub",
        "logits[:, :-1].flatten(0, 1)",
        "self.lm_head(self.norm(x.detach()))[:, :-1].flatten(0, 1)",
        kills=("loss.gradient",),
        where="Hub",
    ),
    Bug("all-ignored-loss-nan", "nanogpt", ".clamp(min=1)", "", kills=("loss.all_ignored",), where="NanoGPT"),
]
