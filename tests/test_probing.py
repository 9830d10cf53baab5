"""What is tried to find how a stranger's module is called, and what is said where nothing fits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diymodel import DIYConfig
from diymodel.verify import Subject, SubjectError, check_causal_lm
from diymodel.verify.html import to_html
from tests.test_adapters import Tiny, causal

# --- which configuration, which dtype --------------------------------------------------------------------------------


class Causal(Tiny):
    """It is called with token ids, and nothing else is to be found."""

    def forward(self, tokens: Tensor) -> Tensor:
        return self.run(tokens, causal)


def always_tied(config: Any) -> nn.Module:
    if not config.tie_word_embeddings:
        raise NotImplementedError("always tied")
    module = Causal(config)
    module.head.weight = module.embed.weight
    return module


def test_a_factory_that_knows_tied_models_only_is_verified() -> None:
    report = check_causal_lm(always_tied, profile="quick", only=["causality.edit", "state.tied*"])
    assert report.verdict == "passed", report.to_text()
    assert {result.status for result in report.results} == {"passed"}


class FloatTable(Causal):
    """It makes a table in float32 at its first call."""

    scale: Tensor | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        if self.scale is None:
            self.scale = torch.ones(self.embed.weight.shape[1])
        if self.scale.dtype != self.embed.weight.dtype:
            raise RuntimeError(f"expected {self.embed.weight.dtype} and found {self.scale.dtype}")
        return super().forward(tokens)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.scale = None if self.scale is None else args[0](self.scale)
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]


def test_what_a_new_module_refuses_is_not_its_dtype() -> None:
    report = check_causal_lm(FloatTable, profile="quick", only=["causality.edit"])
    assert (report.verdict, report.dtype) == ("passed", "float32")


def test_a_module_that_no_conversion_leaves_whole_is_told_where_it_fails() -> None:
    class Asserting(Causal):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.table = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))

        def forward(self, tokens: Tensor) -> Tensor:
            assert self.table.dtype == torch.bfloat16, "the table must be in bfloat16"
            return super().forward(tokens)

    message = r"converted to torch.float32 the module fails: AssertionError: the table must .*test_probing.py:\d+\)"
    with pytest.raises(SubjectError, match=message):
        check_causal_lm(Asserting, profile="quick", only=["causality.edit"])


def test_a_factory_that_refuses_all_is_told_what_was_tried() -> None:
    def never(config: Any) -> nn.Module:
        raise NotImplementedError

    tried = r"num_layers=2 num_heads=2 num_kv_heads=1 hidden_size=8; .*each untied and tied, .* 16\), the last with: "
    with pytest.raises(SubjectError, match=tried + "NotImplementedError"):
        _ = Subject(never).convention


class MaskOfFloat32(Tiny):
    """Its mask is float32 for good, and float64's smallest number does not fit into that."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if attention_mask is None:
            return self.run(input_ids, causal)
        added = torch.zeros(attention_mask.shape).masked_fill(
            attention_mask == 0, torch.finfo(self.head.weight.dtype).min
        )
        return self.run(input_ids, lambda scores: causal(scores) + added[:, None, None].to(scores.dtype))


def test_float32_is_taken_where_it_can_do_more() -> None:
    subject = Subject(MaskOfFloat32)
    assert subject.convention.dtype == torch.float32
    assert subject.missing("padding") is None


class SoftmaxOfFloat32(Tiny):
    """As Gemma 2: the mask holds the smallest number of the scores' dtype, and the softmax works in float32."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        least = torch.finfo(self.head.weight.dtype).min

        def narrow(scores: Tensor) -> Tensor:
            hidden = ~torch.ones_like(scores[0], dtype=torch.bool).tril() | (real[:, None, None] == 0)
            return scores.masked_fill(hidden, least).float().log_softmax(-1).to(scores.dtype)

        return self.run(input_ids, narrow)


def test_padding_that_overflows_in_float64_is_judged_in_float32_and_the_rest_is_not() -> None:
    subject = Subject(SoftmaxOfFloat32)
    assert (subject.convention.dtype, subject.convention.padded_dtype) == (torch.float64, torch.float32)
    report = check_causal_lm(subject, profile="quick", only=["causality.*", "padding.*"])
    assert report.verdict == "passed", report.to_text()
    assert report.dtype == "float64"


# --- the loss --------------------------------------------------------------------------------------------------------


class LastLoss(Tiny):
    """As in llama2.c: logits come back, and the loss stays behind; an auxiliary loss does as well."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.last_loss: Tensor | None = None
        self.aux_loss: Tensor | None = None

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        logits = self.run(tokens, causal)
        self.aux_loss = logits.square().mean()
        self.last_loss = None if targets is None else self.loss(logits, targets)
        return logits

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


class Within(nn.Module):
    """The part that keeps the loss is not the whole."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.model = LastLoss(config)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        return self.model(tokens, targets)


class HalvedLoss(LastLoss):
    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return super().loss(logits, targets) / 2


class LossOfEachToken(LastLoss):
    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")


@pytest.mark.parametrize(("module", "path"), [(LastLoss, "last_loss"), (Within, "model.last_loss")])
def test_a_loss_that_is_left_on_the_module_is_found(module: type[nn.Module], path: str) -> None:
    described = Subject(module).convention.describe()
    assert described == (
        f"forward(tokens, targets); targets come shifted by the caller, -1 is ignored; the loss is left in {path}"
    )
    report = check_causal_lm(module, profile="quick", only=["loss.*"])
    assert report.verdict == "passed", report.to_text()
    passed = {result.check.id for result in report.results if result.status == "passed"}
    assert {"loss.value", "loss.gradient", "loss.micro_batches_add_up"} <= passed


def test_a_wrong_loss_that_is_left_on_the_module_is_seen() -> None:
    report = check_causal_lm(HalvedLoss, profile="quick", only=["loss.value"])
    assert report.verdict == "failed"


def test_without_a_loss_it_is_said_what_to_write() -> None:
    subject = Subject(LossOfEachToken)
    assert "targets come" not in subject.convention.describe()
    assert subject.missing("loss") == (
        "forward(targets=…) returned no scalar loss, and left none in an attribute; let it return (logits, loss), or "
        "write Subject(…, loss=lambda logits, labels: …)"
    )


# --- modules that go on a cache only ---------------------------------------------------------------------------------


class CachesFirst(Tiny):
    """As in gpt-fast: nothing goes before ``setup_caches``, although the positions have a default."""

    keys: Tensor | None = None
    max_batch_size = max_seq_length = -1

    def setup_caches(self, max_batch_size: int, max_seq_length: int) -> None:
        if self.max_seq_length >= max_seq_length and self.max_batch_size >= max_batch_size:
            return
        self.max_batch_size, self.max_seq_length = max_batch_size, max_seq_length
        weight = self.head.weight
        self.keys = torch.zeros(max_batch_size, max_seq_length, weight.shape[1], dtype=weight.dtype)

    def forward(self, idx: Tensor, input_pos: Tensor | None = None) -> Tensor:
        assert self.keys is not None, "Caches must be initialized first"
        x = self.embed(idx) + self.positions(input_pos)
        self.keys[:, input_pos] = x
        mean = self.keys.cumsum(1) / torch.arange(1, self.keys.shape[1] + 1)[:, None]
        return self.head(x + torch.tanh(mean[:, input_pos]))


def set_up_by_the_factory(config: Any) -> nn.Module:
    module = CachesFirst(config)
    module.setup_caches(8, config.max_seq_len)
    return module


@pytest.mark.parametrize("factory", [CachesFirst, set_up_by_the_factory])
def test_a_module_that_needs_its_caches_first_gets_them(factory: Any) -> None:
    subject = Subject(factory)
    assert subject.convention.always_cached
    assert subject.convention.describe().endswith("the cache is on the module, and every call is on it")
    report = check_causal_lm(factory, profile="quick", only=["causality.edit", "decode.c*", "decode.session"])
    assert report.verdict == "passed", report.to_text()
    skipped = {result.check.id for result in report.results if result.status == "skipped"}
    assert skipped == {"decode.caller_object"}


class WrittenByPlace(CachesFirst):
    """The caller makes the cache, a tensor that is written to where the tokens stand; None comes back."""

    def forward(self, idx: Tensor, past: Tensor | None = None, start_pos: int = 0) -> Any:  # type: ignore[override]
        places = torch.arange(start_pos, start_pos + idx.shape[1])
        x = self.embed(idx) + self.positions(places)
        keys = self.kept(past, len(idx), x)
        keys[:, places] = x
        mean = keys.cumsum(1) / torch.arange(1, keys.shape[1] + 1)[:, None]
        return self.head(x + torch.tanh(mean[:, places])), self.handed_back(keys)

    def kept(self, past: Tensor | None, rows: int, like: Tensor) -> Tensor:
        return like.new_zeros(rows, 32, like.shape[2]) if past is None else past

    def handed_back(self, keys: Tensor) -> Tensor | None:
        return None


class WritesToACopy(WrittenByPlace):
    def kept(self, past: Tensor | None, rows: int, like: Tensor) -> Tensor:
        return super().kept(past, rows, like).clone()

    def handed_back(self, keys: Tensor) -> Tensor:
        return keys


@pytest.mark.parametrize(("module", "status"), [(WrittenByPlace, "passed"), (WritesToACopy, "skipped")])
def test_a_cache_that_is_written_by_place_is_told_from_one_that_is_copied(module: type[nn.Module], status: str) -> None:
    def empty(module: nn.Module, config: DIYConfig, rows: int) -> Tensor:
        return torch.zeros(rows, 32, config.hidden_size, dtype=next(module.parameters()).dtype)

    subject = Subject(module, new_cache=empty, cache_is_value=False)
    report = check_causal_lm(subject, profile="quick", only=["decode.cached_equals_full", "decode.caller_object"])
    assert report.verdict == "passed", report.to_text()
    assert {result.check.id: result.status for result in report.results} == {
        "decode.cached_equals_full": "passed",
        "decode.caller_object": status,
    }


class LeaksWithoutCache(CachesFirst):
    def forward(self, idx: Tensor, input_pos: Tensor | None = None) -> Tensor:
        if input_pos is None:
            return self.run(idx, lambda scores: scores)
        return super().forward(idx, input_pos)


def test_a_cache_hides_no_leak_of_a_module_that_goes_without_it() -> None:
    assert not Subject(LeaksWithoutCache).convention.always_cached
    assert check_causal_lm(LeaksWithoutCache, profile="quick", only=["causality.edit"]).verdict == "failed"


class NeedsAState(CachesFirst):
    """Its cache is made by a method, and the caller hands it over each time."""

    def init_state(self, batch_size: int) -> list[Tensor]:
        return [torch.zeros(batch_size, 0, self.head.in_features, dtype=self.head.weight.dtype)]

    def forward(self, idx: Tensor, state: list[Tensor]) -> Any:  # type: ignore[override]
        start = state[0].shape[1]
        x = self.embed(idx) + self.positions(torch.arange(start, start + idx.shape[1]))
        seen = torch.cat((state[0], x), 1)
        mean = seen.cumsum(1) / torch.arange(1, seen.shape[1] + 1)[:, None]
        return self.head(x + torch.tanh(mean[:, start:])), [seen]


def test_a_state_without_a_default_is_made_by_the_module() -> None:
    subject = Subject(NeedsAState)
    assert subject.convention.always_cached
    assert subject.missing("gradient") is None
    report = check_causal_lm(NeedsAState, profile="quick", only=["causality.*", "decode.c*"])
    assert report.verdict == "passed", report.to_text()


class CountsItself(CachesFirst):
    """As LLMs-from-scratch's pkg: the caller holds the cache, the module where it stands in it."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.reset_kv_cache()

    def reset_kv_cache(self) -> None:
        self.current_pos = 0

    def make_cache(self) -> dict[str, Tensor]:
        return {}

    def forward(self, in_idx: Tensor, cache: dict[str, Tensor] | None = None) -> Tensor:  # type: ignore[override]
        start = self.current_pos if cache is not None else 0
        end = start + in_idx.shape[1]
        x = self.embed(in_idx) + self.positions(torch.arange(start, end))
        seen = x
        if cache is not None:
            self.current_pos = end
            seen = cache["seen"] = torch.cat((cache["seen"], x), 1) if cache else x
        mean = seen.cumsum(1) / torch.arange(1, seen.shape[1] + 1)[:, None]
        return self.head(x + torch.tanh(mean[:, -in_idx.shape[1] :]))  # type: ignore[no-any-return]


def test_a_module_that_counts_the_positions_of_its_callers_cache_is_reset_before_each_sequence() -> None:
    subject = Subject(CountsItself)
    assert subject.convention.describe().endswith("the cache is a mutable object, the position in it on the module")
    report = check_causal_lm(subject, profile="quick", only=["causality.through_cache", "decode.*"])
    assert report.verdict == "passed", report.to_text()
    ran = {result.check.id for result in report.results if result.status == "passed"}
    assert {"decode.cached_equals_full", "decode.session", "decode.reset", "decode.unrelated_call"} <= ran


class ForgetsToCount(CountsItself):
    """Its reset is there, and does nothing."""

    def reset_kv_cache(self) -> None:
        self.current_pos = getattr(self, "current_pos", 0)


def test_a_reset_that_does_not_reset_is_seen() -> None:
    report = check_causal_lm(ForgetsToCount, profile="quick", only=["decode.reset"])
    assert report.verdict == "failed", report.to_text()


class ResetsLater(Tiny):
    """As in torchtune: the first reset is refused, and calls on the cache need a mask of their own."""

    ready = False

    def setup_caches(self, batch_size: int) -> None:
        self.ready = True

    def reset_caches(self) -> None:
        if not self.ready:
            raise RuntimeError("Key value caches are not setup. Call model.setup_caches first.")

    def forward(self, tokens: Tensor, *, mask: Tensor | None = None, input_pos: Tensor | None = None) -> Tensor:
        if self.ready and mask is None:
            raise ValueError("causal masks must be provided")
        return self.run(tokens, causal)


def test_caches_are_not_reset_before_the_first_and_what_is_lacking_is_said() -> None:
    why = (
        "a cached call failed: ValueError: causal masks must be provided; it was given tokens, input_pos: name a "
        "module instead, whose forward(tokens, start_pos) adds what it needs"
    )
    assert Subject(ResetsLater).missing("cache") == why
    assert Subject(ResetsLater).describe() == f"forward(tokens, mask, input_pos); left out after an error: {why}"
    assert "left out" not in Subject(Causal).describe()  # it has no cache
    report = check_causal_lm(ResetsLater, profile="quick", only=["shape.logits"])
    assert report.to_text().endswith("; left out after an error: cache\n")
    assert report.to_dict()["left_out"] == ["cache"]
    assert "left out after an error: cache</p>" in to_html(report)


# --- what further arguments may hide ----------------------------------------------------------------------------------


class TakesMore(Tiny):
    def forward(self, tokens: Tensor, **settings: Any) -> Tensor:
        return self.run(tokens, causal)


def test_what_further_keywords_may_hide_is_not_denied() -> None:
    subject = Subject(TakesMore)
    assert subject.missing("padding") == "forward names no attention_mask and no seq_lengths"
    assert subject.missing("loss") == "forward names no labels"
    assert Subject(Causal).missing("padding") == "forward has no attention_mask and no seq_lengths"


# --- a padding mask under the name of a causal one --------------------------------------------------------------------


class PaddedByAttnMask(Tiny):
    """(B, T) of what is real; with a mask or without, no token sees the future."""

    def forward(self, input_ids: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        return self.run(input_ids, causal if attn_mask is None else lambda s: causal(self.hide(s, attn_mask)))

    def hide(self, scores: Tensor, mask: Tensor) -> Tensor:
        return scores.masked_fill(~mask.bool()[:, None, None], -1e9)


class PaddedByTheOpposite(PaddedByAttnMask):
    """True at padding."""

    def hide(self, scores: Tensor, mask: Tensor) -> Tensor:
        return scores.masked_fill(mask.bool()[:, None, None], -1e9)


class AddedAttnMask(PaddedByAttnMask):
    """Floats that are added to the scores: no mask of ones and zeros."""

    def hide(self, scores: Tensor, mask: Tensor) -> Tensor:
        return scores + mask.to(scores)[:, None, None]


class UnusedAttnMask(PaddedByAttnMask):
    def hide(self, scores: Tensor, mask: Tensor) -> Tensor:
        return scores


@pytest.mark.parametrize(
    ("module", "found"),
    [
        (PaddedByAttnMask, ("attn_mask", False)),
        (PaddedByTheOpposite, ("attn_mask", True)),
        (AddedAttnMask, (None, False)),
        (UnusedAttnMask, (None, False)),
    ],
)
def test_attn_mask_is_taken_for_a_padding_mask_where_it_hides_padding(
    module: type[nn.Module], found: tuple[str | None, bool]
) -> None:
    convention = Subject(module).convention
    assert (convention.mask, convention.mask_marks_padding) == found
    assert ("padding.content_irrelevant" in passed(module)) == bool(found[0])


class PaddedOnTheLeft(PaddedByAttnMask):
    """It counts positions from the first real token."""

    def forward(self, input_ids: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        if attn_mask is None:
            return super().forward(input_ids)
        positions = (attn_mask.cumsum(1) - 1).clamp(min=0)
        return self.run(input_ids, lambda scores: causal(self.hide(scores, attn_mask)), positions)


def test_padding_on_the_left_is_checked_where_it_changes_nothing_whether_it_is_claimed_or_not() -> None:
    assert Subject(PaddedOnTheLeft).missing("left_padding") is None
    assert "gives something else than alone" in str(Subject(PaddedByAttnMask).missing("left_padding"))
    assert Subject(PaddedByAttnMask, claims=["left_padding"]).missing("left_padding") is None
    assert "no attention_mask" in str(Subject(Causal).missing("left_padding"))
    assert "padding.left_changes_nothing" in passed(PaddedOnTheLeft)


def passed(module: type[nn.Module]) -> set[str]:
    """The checks of padding that a module passes."""
    report = check_causal_lm(module, profile="quick", only=["padding.*"])
    assert not report.failed, report.to_text()
    return {result.check.id for result in report.results if result.status == "passed"}


# --- nothing that could learn -----------------------------------------------------------------------------------------


class WithoutGradients(Causal):
    """Written for inference, or by mistake."""

    @torch.no_grad()
    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Any:
        logits = super().forward(tokens)
        if labels is None:
            return logits
        return logits, F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def test_logits_without_a_gradient_are_told_once() -> None:
    report = check_causal_lm(
        WithoutGradients, profile="quick", only=["gradients.*", "training.*", "loss.*", "numerics.z*"]
    )
    assert [result.check.id for result in report.failed] == ["gradients.reach_every_parameter"], report.to_text()
    assert report.likely[0].bug == "gradient-detached"
    skipped = {result.check.id: result.reason for result in report.results if result.status == "skipped"}
    assert "carry no gradient" in str(skipped["loss.gradient"])


def test_what_lacks_gradients_lacks_all_that_needs_them() -> None:
    subject = Subject(WithoutGradients, lacks={"gradient": "for inference only"})
    report = check_causal_lm(subject, profile="quick", only=["gradients.*", "loss.gradient"])
    assert {(result.status, result.reason) for result in report.results} == {("skipped", "for inference only")}


class DetachedLoss(Causal):
    """The number that is printed, and not what is trained by."""

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Any:  # type: ignore[override]
        logits = super().forward(tokens)
        if labels is None:
            return logits
        return logits, F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).detach()


def test_a_loss_without_a_gradient_is_a_failure() -> None:
    report = check_causal_lm(DetachedLoss, profile="quick", only=["gradients.*", "training.*", "loss.*"])
    assert [result.check.id for result in report.failed] == ["loss.gradient"], report.to_text()
    assert report.failed[0].failure is not None
    assert "the loss must carry a gradient" in report.failed[0].failure.message


# --- logits that must be asked for ------------------------------------------------------------------------------------


class LogitsOnRequest(Causal):
    """As in llm-baselines: the loss is what is wanted, and logits where one asks, of all positions with targets."""

    def forward(  # type: ignore[override]
        self, idx: Tensor, targets: Tensor | None = None, get_logits: bool = False
    ) -> dict[str, Tensor | None]:
        logits = super().forward(idx)
        if targets is None:
            return {"logits": logits[:, [-1]] if get_logits else None, "loss": None}
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return {"logits": logits if get_logits else None, "loss": loss}


def test_logits_are_asked_for_where_forward_has_an_argument_for_it() -> None:
    report = check_causal_lm(LogitsOnRequest, profile="quick", only=["causality.edit", "loss.value", "shape.logits"])
    assert [result.status for result in report.results] == ["passed"] * 3, report.to_text()
    assert "get_logits=True" in report.called


class EmbeddingsUnlessToldOtherwise(Tiny):
    """As in HazyResearch's zoology: a backbone first of all."""

    def forward(self, input_ids: Tensor, return_embeddings: bool = True) -> Tensor:
        return self.embed(input_ids) if return_embeddings else self.run(input_ids, causal)


def test_what_comes_in_the_place_of_logits_is_declined() -> None:
    report = check_causal_lm(EmbeddingsUnlessToldOtherwise, profile="quick", only=["causality.edit", "shape.logits"])
    assert [result.status for result in report.results] == ["passed"] * 2, report.to_text()
    assert "return_embeddings=False" in report.called
