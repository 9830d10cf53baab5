"""The loss of a module that takes no labels: lucidrains' ``return_loss`` asks for that of the ids."""

from __future__ import annotations

from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor

from diymodel.verify import Subject, check_causal_lm
from tests.test_adapters import Tiny, causal, verdicts


class Switched(Tiny):
    """Cuts inputs and labels out of its ids."""

    def forward(self, x: Tensor, return_loss: bool = False) -> Any:
        if not return_loss:
            return self.run(x, causal)
        return self.entropy(self.run(x[:, :-1], causal), x[:, 1:])

    def entropy(self, logits: Tensor, labels: Tensor) -> Any:
        return F.cross_entropy(logits.transpose(1, 2), labels)


class OnByDefault(Switched):
    """Gives what its loss is made of as well."""

    def forward(self, x: Tensor, return_loss: bool = True) -> Any:
        return super().forward(x, return_loss)

    def entropy(self, logits: Tensor, labels: Tensor) -> Any:
        main = super().entropy(logits, labels)
        z_loss = logits.logsumexp(-1).square().mean()
        return main + z_loss, main, z_loss


class PassesOverPadding(Switched):
    """MEGABYTE: token 0 is padding."""

    def entropy(self, logits: Tensor, labels: Tensor) -> Any:
        return F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=0)


@pytest.mark.parametrize(("factory", "place"), [(Switched, 0), (OnByDefault, 1), (PassesOverPadding, 0)])
def test_the_loss_of_the_ids_is_asked_for_and_checked(factory: Any, place: int) -> None:
    subject = Subject(factory)
    assert (subject.convention.loss_switch, subject.convention.loss_place) == ("return_loss", place)
    assert "return_loss asks for the loss of the ids, shifted inside the module" in subject.describe()
    assert ("passing over token 0" in subject.describe()) is (factory is PassesOverPadding)
    statuses = verdicts(subject, ("loss.*",) if factory is Switched else ("loss.value", "loss.pad*"))
    skipped = {"loss.all_ignored", "loss.items_in_batch", "loss.labels_change_no_logit"}
    skipped |= {"loss.pad_token_scored"} if factory is PassesOverPadding else set()
    assert statuses == {id: "skipped" if id in skipped else "passed" for id in statuses}
    assert subject.missing("labels") == "forward(return_loss=True) gives the loss of its ids, and takes no labels"


class Unshifted(Switched):
    def forward(self, x: Tensor, return_loss: bool = False) -> Any:
        logits = self.run(x, causal)
        return self.entropy(logits, x) if return_loss else logits


class Detached(Switched):
    def entropy(self, logits: Tensor, labels: Tensor) -> Any:
        return super().entropy(logits.detach(), labels) + 0 * logits.sum()


@pytest.mark.parametrize(
    ("factory", "check", "causes"),
    [(Unshifted, "loss.value", ["labels-not-shifted"]), (Detached, "loss.gradient", [])],
)
def test_what_is_wrong_with_such_a_loss_is_seen(factory: Any, check: str, causes: list[str]) -> None:
    report = check_causal_lm(factory, profile="quick", only=[check])
    assert [result.status for result in report.results] == ["failed"]
    assert [found.bug for found in report.diagnosis][: len(causes)] == causes


class HoldsATerm(Switched):
    def entropy(self, logits: Tensor, labels: Tensor) -> Any:
        return super().entropy(logits, labels) + logits.logsumexp(-1).square().mean() / 10


class NeedsMore(Switched):
    def entropy(self, logits: Tensor, labels: Tensor) -> Any:
        raise ValueError("set the depth first")


@pytest.mark.parametrize(
    ("factory", "why"),
    [
        (HoldsATerm, "forward(return_loss=True) is not the mean cross-entropy of the next tokens: it may hold a"),
        (NeedsMore, "forward(return_loss=True) gave no loss: ValueError: set the depth first"),
    ],
)
def test_what_may_be_right_is_no_failure(factory: Any, why: str) -> None:
    assert (Subject(factory).missing("loss") or "").startswith(why)


def test_labels_go_before_a_switch() -> None:
    class Both(Switched):
        def forward(self, x: Tensor, labels: Tensor | None = None, return_loss: bool = False) -> Any:  # type: ignore[override]
            logits = self.run(x, causal)
            if labels is None:
                return logits
            return logits, F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    found = Subject(Both).convention
    assert (found.labels, found.loss_switch, found.missing.get("loss")) == ("labels", None, None)
