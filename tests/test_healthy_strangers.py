"""Kinds of modules that public repositories have: healthy ones that a check once took for broken, or never ran on.

Beside some stands the broken one that must still be found.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diymodel import DIYConfig, DIYForCausalLM
from diymodel._compat import nan_where_undefined
from diymodel.verify import Subject, SubjectError, check_causal_lm
from diymodel.verify.options import PROFILES
from diymodel.verify.registry import select_checks
from diymodel.verify.runner import replay, verify_one
from diymodel.verify.settings import Settings
from diymodel.verify.subject import resolve
from diymodel.verify.text import to_text
from diymodel.verify.trial import draw_weights
from tests.test_adapters import Tiny, causal


def passes(module: Any, *only: str, seeds: int = 3) -> None:
    """Every one of these checks has something to say of the module, and it is good."""
    for seed in range(seeds):
        report = check_causal_lm(module, profile="quick", only=only, seed=seed)
        assert [result.status for result in report.results] == ["passed"] * len(report.results), to_text(report)


class Undefined(Tiny):
    """Made to be loaded, as Meta's llama, gemma_pytorch and gpt-oss: nothing has a value until then."""

    def __init__(self, config: DIYConfig) -> None:
        super().__init__(config)
        for part in self.modules():
            for name, parameter in list(part.named_parameters(recurse=False)):
                setattr(part, name, nn.Parameter(torch.empty(parameter.shape)))

    def forward(self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = False) -> Any:
        ids = input_ids if past_key_values is None else torch.cat((past_key_values, input_ids), 1)
        logits = self.run(ids, causal)
        torch.multinomial(logits[:, -1].softmax(-1), 1)  # raises where anything is NaN
        return (logits[:, -input_ids.shape[1] :], ids) if use_cache else logits


def test_what_a_constructor_leaves_undefined_is_drawn_before_it_is_used() -> None:
    passes(Undefined, "shape.*", "state.round_trip", "decode.cached_equals_full", "batch.row_alone")


def test_undefined_memory_is_nan_while_a_subject_is_built_and_only_then() -> None:
    with nan_where_undefined():
        assert torch.empty(8).isnan().all()
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    module = nn.Module()
    module.vector = nn.Parameter(torch.tensor([torch.nan, 1.0]))
    module.constant = nn.Parameter(torch.tensor([2.0]), requires_grad=False)
    draw_weights(module, seed=0, sharpness=1)
    assert module.vector.isfinite().all()
    assert module.constant == 2  # others may have been computed from it


class InSegments(Tiny):
    """Each segment of four tokens hands a sum to the next, through a matrix that short inputs never use."""

    def __init__(self, config: DIYConfig) -> None:
        super().__init__(config)
        self.carry = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids) + self.positions(torch.arange(input_ids.shape[1]))
        carried = torch.zeros_like(hidden[:, :1])
        parts = []
        for part in hidden.split(4, 1):
            parts.append(part + self.qkv(part).chunk(3, -1)[0].cumsum(1) + self.qkv(part).sum(-1, True) + carried)
            carried = carried + self.carry(part.sum(1, keepdim=True))
        return self.head(torch.cat(parts, 1))  # type: ignore[no-any-return]


def test_a_parameter_that_only_long_inputs_use_gets_its_gradient_from_them() -> None:
    passes(InSegments, "gradients.reach_every_parameter")


class Clamped(Tiny):
    """Samples at a temperature of at least 1e-10, which is greedy and draws all the same."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.run(input_ids, causal)

    def generate(self, input_ids: Tensor, max_new_tokens: int, temperature: float = 1.0) -> Tensor:
        for _ in range(max_new_tokens):
            logits = self(input_ids)[:, -1] / max(temperature, 1e-10)
            input_ids = torch.cat((input_ids, torch.multinomial(logits.softmax(-1), 1)), 1)
        return input_ids


class Reseeding(Clamped):
    """The same, after a seed of its own."""

    def generate(self, input_ids: Tensor, max_new_tokens: int, temperature: float = 1.0) -> Tensor:
        torch.manual_seed(0)
        return super().generate(input_ids, max_new_tokens, temperature)


def test_a_draw_that_leaves_no_choice_may_use_the_random_state_and_a_seed_may_not_be_set() -> None:
    only = "generation.random_state_untouched"
    passes(Clamped, only)
    assert [result.check.id for result in check_causal_lm(Reseeding, profile="quick", only=[only]).failed] == [only]


class KeepsItsDropout(Tiny):
    """A part was never told the configuration's dropout, as in PyTorch's own example of a language model."""

    def __init__(self, config: DIYConfig) -> None:
        super().__init__(config)
        self.drop = nn.Dropout(0.9)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.drop(self.run(input_ids, causal))  # type: ignore[no-any-return]


def test_a_module_that_keeps_its_dropout_learns_without_it() -> None:
    passes(KeepsItsDropout, "training.overfits_a_tiny_batch")


class LogProbabilities(Tiny):
    """The normaliser depends on every row of a tied head."""

    def __init__(self, config: DIYConfig) -> None:
        super().__init__(config)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        return F.log_softmax(self.run(input_ids, causal), -1)


def test_log_probabilities_with_tied_weights_have_a_right_to_their_normaliser() -> None:
    passes(LogProbabilities, "gradients.absent_tokens_zero")


class Complex(Tiny):
    """A matrix of complex numbers takes part."""

    def __init__(self, config: DIYConfig) -> None:
        super().__init__(config)
        d = config.hidden_size
        self.turn = nn.Parameter(torch.randn(d, d, dtype=torch.complex64) / d)
        self.phase = nn.Parameter(torch.ones(d, dtype=torch.complex64))

    def forward(self, input_ids: Tensor) -> Tensor:
        turned = (self.embed(input_ids).to(self.turn.dtype) @ self.turn * self.phase).cumsum(1)
        return self.run(input_ids, causal) + self.head(turned.real + turned.imag)  # type: ignore[no-any-return]


def test_complex_parameters_are_drawn_and_trained() -> None:
    passes(Complex, "training.small_step*", "training.overfits*", "gradients.accumulate", "gradients.reach*", seeds=1)
    module = Complex(DIYConfig(hidden_size=8, num_heads=2))
    draw_weights(module, seed=0, sharpness=1)
    assert module.turn.imag.std() > 0.1


class Out(NamedTuple):
    """As OLMo's."""

    logits: Tensor
    attn_key_values: Any = None


class OddlyNamedCache(DIYForCausalLM):
    """Hands its cache back under a name of its own."""

    def forward(self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = False) -> Any:
        output = super().forward(input_ids, past_key_values=past_key_values, use_cache=use_cache)
        return Out(*output) if use_cache else Out(output)


class MadeLazily(DIYForCausalLM):
    """Its cache comes with the first call on it, and there is nothing to reset before, as in lit-llama."""

    def reset_cache(self) -> None:
        del self.past

    def forward(self, idx: Tensor, input_pos: Tensor | None = None) -> Any:
        if input_pos is None:
            return super().forward(idx)
        logits, past = super().forward(idx, past_key_values=self.__dict__.get("past"), use_cache=True)
        self.__dict__["past"] = past
        return logits


class Recurrent(nn.Module):
    """Its state is called by one letter, as mamba2-minimal's."""

    def __init__(self, config: DIYConfig) -> None:
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.cells = nn.GRU(config.hidden_size, config.hidden_size, config.num_layers, batch_first=True)
        self.head = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, input_ids: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
        hidden, h = self.cells(self.embed(input_ids), h)
        return self.head(hidden), h


@pytest.mark.parametrize("module", [OddlyNamedCache, MadeLazily, Recurrent])
def test_a_cache_is_found(module: type[nn.Module]) -> None:
    passes(module, "decode.cached_equals_full", seeds=1)


class ByLetters(Tiny):
    """``x`` and the tokens after them, ``y``, as their caller cut them out."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        logits = self.run(x, causal)
        return logits, None if y is None else F.cross_entropy(logits.flatten(0, 1), y.flatten())


def test_what_is_called_y_comes_after_x() -> None:
    passes(ByLetters, "loss.value", "loss.gradient", "loss.many_labels", seeds=1)


class MinusOne(Tiny):
    """A loss under the usual name, that takes -1 for what is ignored."""

    def forward(self, input_ids: Tensor, lm_labels: Tensor | None = None) -> Any:
        logits = self.run(input_ids, causal)
        if lm_labels is None:
            return logits
        return logits, F.cross_entropy(logits[:, :-1].flatten(0, 1), lm_labels[:, 1:].flatten(), ignore_index=-1)


def test_another_label_is_ignored_where_the_usual_one_is_out_of_bounds() -> None:
    passes(MinusOne, "loss.value", seeds=1)


class Balanced(Tiny):
    """As nanoMoE: a term is added to the cross-entropy, in eval mode as well."""

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        logits = self.run(idx, causal)
        if targets is None:
            return logits, None
        return logits, self.cross_entropy(logits.flatten(0, 1), targets.flatten()) + self.term(logits)

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets, ignore_index=-1)

    def term(self, logits: Tensor) -> Tensor:
        return 0.01 * logits.logsumexp(-1).square().mean()


class BalancedInFloat32(Balanced):
    """As where the loss is taken in float32 whatever the weights are."""

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        return super().cross_entropy(logits.float(), targets)


class SmallTerm(Balanced):
    """One that the first look at the loss takes for rounding."""

    def term(self, logits: Tensor) -> Tensor:
        return super().term(logits) / 300


@pytest.mark.parametrize("module", [Balanced, BalancedInFloat32, SmallTerm])
def test_a_term_of_its_own_is_subtracted_from_the_loss(module: type[nn.Module]) -> None:
    assert "the loss holds a further term" in Subject(module).describe()
    passes(module, "loss.value", "loss.gradient", "loss.micro_batches_add_up", "loss.pad_token_scored", seeds=1)


class WithoutATerm(Balanced):
    def term(self, logits: Tensor) -> Tensor:
        return logits.new_zeros(())


class Constant(Balanced):
    """Nothing learns from it: it was added by mistake."""

    def term(self, logits: Tensor) -> Tensor:
        return logits.new_tensor(0.1)


def test_a_constant_in_the_loss_is_no_term_and_neither_is_rounding() -> None:
    assert "a further term" not in Subject(WithoutATerm).describe()
    assert check_causal_lm(Constant, profile="quick", only=["loss.value"]).verdict == "failed"


class OverAllPositions(Balanced):
    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum") / targets.numel()


class ScoresIgnored(Balanced):
    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets.clamp(min=0))


class Doubled(Balanced):
    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        return 2 * super().cross_entropy(logits, targets)


class Detached(Balanced):
    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        return super().cross_entropy(logits.detach(), targets)


class MeanOfChunks(Balanced):
    """Right as long as there is one."""

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        chunks = zip(logits.split(256), targets.split(256), strict=True)
        return torch.stack([F.cross_entropy(*chunk, ignore_index=-1) for chunk in chunks]).nanmean()


@pytest.mark.parametrize(
    ("module", "check"),
    [
        (OverAllPositions, "loss.value"),
        (ScoresIgnored, "loss.value"),
        (Doubled, "loss.value"),
        (Detached, "loss.gradient"),
        (MeanOfChunks, "loss.many_labels"),
    ],
)
def test_beside_a_term_a_wrong_loss_is_seen(module: type[nn.Module], check: str) -> None:
    (found,) = select_checks([check])
    assert verify_one(resolve(module), found, Settings(PROFILES["quick"], shrink=False)).status == "failed"


class Unhashable(Tiny):
    """``nn.Module`` keeps its parts in sets."""

    __hash__ = None  # type: ignore[assignment]

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.run(input_ids, causal)

    def __eq__(self, other: object) -> bool:
        return self is other

    def eval(self) -> Any:
        return hash(self)


def test_a_module_without_eval_mode_is_told_so() -> None:
    with pytest.raises(SubjectError, match=r"eval\(\) failed: TypeError: unhashable type: 'Unhashable'"):
        check_causal_lm(Unhashable)


class MaskedTwice(Tiny):
    """Torch refuses a mask beside is_causal, but for the kernel that has no dropout."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if attention_mask is not None and self.training:
            raise RuntimeError("Explicit attn_mask should not be set when is_causal=True")
        return self.run(input_ids, causal)


def test_a_mask_is_given_in_training_as_well() -> None:
    report = check_causal_lm(MaskedTwice, profile="quick", only=["modes.call_leaves_mode"])
    assert [result.check.id for result in report.failed] == ["modes.call_leaves_mode"]


class MisshapenTopK(Clamped):
    """The limit of each row is compared along the vocabulary."""

    def generate(  # type: ignore[override]
        self, input_ids: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None
    ) -> Tensor:
        if top_k is not None:
            logits = self(input_ids)[:, -1]
            logits = logits.masked_fill(logits < logits.topk(top_k)[0].sum(1).expand(len(input_ids)), -torch.inf)
        return super().generate(input_ids, max_new_tokens, temperature)


def test_a_setting_that_always_raises_says_nothing_of_temperature_0() -> None:
    passes(MisshapenTopK, "generation.temperature_zero", seeds=1)


def test_tensors_that_do_not_fit_are_a_mistake_and_no_refusal() -> None:
    report = check_causal_lm(MisshapenTopK, profile="quick", only=["generation.top_k"])
    assert [result.check.id for result in report.failed] == ["generation.top_k"], to_text(report)


class WritesIntoItsCache(Tiny):
    """A recurrent state that is written in place, as in recurrentgemma."""

    def forward(self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = False) -> Any:
        state = torch.zeros_like(self.embed(input_ids[:, 0])) if past_key_values is None else past_key_values["state"]
        sums = []
        for x in self.embed(input_ids).unbind(1):
            state.mul_(0.5).add_(x)
            sums.append(state.clone())
        logits = self.head(torch.stack(sums, 1))
        return (logits, {"state": state}) if use_cache else logits


class WithoutItsOwnOrder(WritesIntoItsCache):
    """What older versions of transformers hand down to every class that can generate."""

    def _reorder_cache(self, past_key_values: Any, beam_idx: Tensor) -> Any:
        raise NotImplementedError("Make sure that a `_reorder_cache` function is correctly implemented")


class Sums:
    """A cache that gives another one with its rows reordered, rather than reordering its own."""

    def __init__(self, sums: Tensor) -> None:
        self.sums = sums

    def reorder(self, beam_idx: Tensor) -> Sums:
        return Sums(self.sums[beam_idx])


class GivesAnother(Tiny):
    def forward(self, input_ids: Tensor, past_key_values: Sums | None = None, use_cache: bool = False) -> Any:
        before = 0.0 if past_key_values is None else past_key_values.sums[:, None]
        sums = before + self.embed(input_ids).cumsum(1)
        logits = self.head(sums)
        return (logits, Sums(sums[:, -1])) if use_cache else logits


@pytest.mark.parametrize("module", [WritesIntoItsCache, WithoutItsOwnOrder, GivesAnother])
def test_rows_are_chosen_by_hand_and_gone_on_with_once(module: type[nn.Module]) -> None:
    passes(module, "decode.rows_reordered", seeds=1)


class Balanced(Tiny):
    """A bias that training moves against the tokens that are chosen, as DeepSeek-V3 balances its experts."""

    def __init__(self, config: DIYConfig) -> None:
        super().__init__(config)
        self.register_buffer("bias", torch.zeros(config.vocab_size))

    def forward(self, input_ids: Tensor) -> Tensor:
        logits = self.run(input_ids, causal) + self.bias
        if self.training:
            self.bias[logits.argmax(-1).unique()] -= 0.01
        return logits


class BalancedByParameter(Balanced):
    """The same, in a parameter that is frozen."""

    def __init__(self, config: DIYConfig) -> None:
        super().__init__(config)
        del self.bias
        self.bias = nn.Parameter(torch.zeros(config.vocab_size), requires_grad=False)


class NotSaved(Balanced):
    """The same, in a tensor that no state dict holds."""

    def __init__(self, config: DIYConfig) -> None:
        super().__init__(config)
        self.register_buffer("bias", torch.zeros(config.vocab_size), persistent=False)


TRAINED = ("causality.in_training", "modes.followed_at_every_depth", "modes.dropout_off_in_eval", "modes.agree_*")


@pytest.mark.parametrize("module", [Balanced, BalancedByParameter])
def test_what_training_changes_by_design_is_no_state_that_survives(module: type[nn.Module]) -> None:
    passes(module, *TRAINED, seeds=1)
    (result,) = check_causal_lm(module, profile="quick", only=["modes.dropout_active_in_training"]).results
    assert result.status == "skipped"  # it has no dropout, and its calls in training differ all the same


def test_what_training_changes_and_nobody_saves_is_state_that_survives() -> None:
    report = check_causal_lm(NotSaved, profile="quick", only=TRAINED)
    assert {"modes.followed_at_every_depth", "causality.in_training"} <= {result.check.id for result in report.failed}


class PostNorm(nn.Module):
    """Torch's own encoder, whose norms stand behind the sums, without a final one."""

    def __init__(self, config: DIYConfig) -> None:
        super().__init__()
        d = config.hidden_size
        layer = nn.TransformerEncoderLayer(d, config.num_heads, config.intermediate_size, 0.0, batch_first=True)
        self.embed, self.head = nn.Embedding(config.vocab_size, d), nn.Linear(d, config.vocab_size)
        self.encoder = nn.TransformerEncoder(layer, config.num_layers, enable_nested_tensor=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        angle = torch.arange(input_ids.shape[1])[:, None] * 10000 ** -(torch.arange(0, hidden.shape[-1], 2) / 16)
        hidden = hidden + torch.stack((angle.sin(), angle.cos()), -1).flatten(1).to(hidden)
        future = torch.ones(input_ids.shape[1], input_ids.shape[1], dtype=torch.bool).triu(1)
        return self.head(self.encoder(hidden, mask=future))  # type: ignore[no-any-return]


class Frozen(PostNorm):
    """All but the last bias is cut off from the gradient."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids).detach() + self.head.bias


def test_what_learns_at_a_smaller_rate_or_slowly_learns() -> None:
    (check,) = select_checks(["training.overfits_a_tiny_batch"])
    size = {"vocab_size": 16, "num_layers": 3, "hidden_size": 16, "intermediate_size": 16, "max_seq_len": 8}
    config = {**size, "num_heads": 2, "num_kv_heads": 2, "tie_word_embeddings": False}
    values = {"config": config, "sharpness": 1, "length": 5, "tokens": [0, 1, 2, 3, 4]}
    result = replay(PostNorm, check, {**values, "weights": 28})
    assert result.status == "passed", result
    deep = {**values, "config": {**config, "num_layers": 6}}  # at no rate in 40 steps
    result = replay(PostNorm, check, {**deep, "weights": 8})
    assert result.status == "passed", result
    failure = replay(Frozen, check, {**values, "weights": 0}).failure
    assert failure is not None
    assert "at rates of 0.03, 0.01, 0.003" in failure.message


class Mapped(Tiny):
    """Calls a part within vmap, where no number can be looked at."""

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = torch.func.vmap(self.head)(self.embed(input_ids))
        return logits


def test_what_has_no_value_yet_is_not_looked_at() -> None:
    passes(Mapped, "numerics.large_activations_finite", seeds=1)


class Idle(Tiny):
    """Three parts are never called, as heads for more tokens are without labels; the logits are turned around."""

    def __init__(self, config: DIYConfig) -> None:
        super().__init__(config)
        self.more = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))

    def forward(self, input_ids: Tensor) -> Tensor:
        logits = self.run(input_ids, causal)
        return 2 * logits.detach() - logits


def test_of_many_parameters_the_first_few_are_named() -> None:
    only = ("gradients.reach_every_parameter", "training.small_step_lowers_loss")
    found = check_causal_lm(Idle, profile="quick", only=only).failed
    messages = {result.check.id: result.failure.message for result in found if result.failure is not None}
    assert messages[only[0]].endswith("none at more.0.bias, more.0.weight, more.1.bias, more.1.weight and 2 more")
    assert "by what the gradient predicts, saw -1 of it" in messages[only[1]]


class KeyBias(Tiny):
    """As TransformerLens: biases have a row a head, and that of the keys moves all scores of a query alike."""

    def __init__(self, config: DIYConfig) -> None:
        super().__init__(config)
        self.b_K = nn.Parameter(torch.zeros(2, config.hidden_size // 2))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids) + self.positions(torch.arange(input_ids.shape[1]))
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = self.scores(q, k + self.b_K.flatten())
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        return self.head(x + scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.mT


class IdleTable(KeyBias):
    """A matrix on the scores that is the same for all keys, where it was meant to tell them apart."""

    def __init__(self, config: DIYConfig) -> None:
        super().__init__(config)
        self.table = nn.Parameter(torch.zeros(1, 1))

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return super().scores(q, k) + self.table


class IdleMatrix(KeyBias):
    """One that is divided by itself, as the weight of a router of one expert."""

    def __init__(self, config: DIYConfig) -> None:
        super().__init__(config)
        self.router = nn.Parameter(torch.zeros(config.hidden_size, 1))

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        chosen = (q @ self.router).exp()
        return super().scores(q, k) * (chosen / chosen)


def test_the_bias_of_a_key_needs_no_gradient_whatever_its_shape() -> None:
    passes(KeyBias, "gradients.reach_every_parameter", seeds=2)


@pytest.mark.parametrize(("module", "name"), [(IdleTable, "table"), (IdleMatrix, "router")])
def test_a_matrix_without_gradient_is_no_bias(module: type[nn.Module], name: str) -> None:
    (result,) = check_causal_lm(module, profile="quick", only=["gradients.reach_every_parameter"]).failed
    assert result.failure is not None
    assert result.failure.message.endswith(f"saw none at {name}")


class OddHeads(Tiny):
    """It is built with heads of two numbers, and then raises whatever it is given."""

    def forward(self, input_ids: Tensor) -> Tensor:
        if self.embed.embedding_dim // self.heads == 2:
            raise RuntimeError("odd heads")
        return self.run(input_ids, causal)

    def generate(
        self, input_ids: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
    ) -> Tensor:
        for _ in range(max_new_tokens):
            logits = self(input_ids)[:, -1]
            logits = logits.masked_fill(logits < logits.topk(min(top_k or 99, logits.shape[-1]))[0][:, -1:], -torch.inf)
            kept = logits if top_p > 0.5 else logits.masked_fill(logits < logits.amax(-1, keepdim=True), -torch.inf)
            drawn = torch.multinomial((kept / max(temperature, 1e-10)).softmax(-1), 1)
            input_ids = torch.cat((input_ids, drawn), 1)
        return input_ids


def test_an_error_that_comes_without_what_a_check_varies_is_no_failure_of_that() -> None:
    only = ("shape.longest", "forward.memory_layout", "gradients.accumulate", "generation.t*")
    report = check_causal_lm(OddHeads, profile="quick", only=only)
    assert len(report.failed) == len(report.results) == 6
    for result in report.failed:
        assert result.failure is not None
        assert result.failure.message == "the subject raised RuntimeError: odd heads"
        assert not result.failure.likely_causes


class Embedding(nn.Module):
    """As courses ask for it, who forbid nn.Embedding."""

    def __init__(self, rows: int, size: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(rows, size))

    def forward(self, ids: Tensor) -> Tensor:
        return self.table[ids]


class EmbedsByHand(Tiny):
    def __init__(self, config: DIYConfig) -> None:
        super().__init__(config)
        self.embed = Embedding(*self.embed.weight.shape)  # type: ignore[assignment]
        self.positions = Embedding(*self.positions.weight.shape)  # type: ignore[assignment]

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.run(input_ids, causal)


class NormedWithoutEps(EmbedsByHand):
    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids) + self.positions(torch.arange(input_ids.shape[1]))
        return self.head(x / x.pow(2).mean(-1, keepdim=True).sqrt())


def test_an_embedding_that_is_written_by_hand_is_found() -> None:
    passes(EmbedsByHand, "causality.gradient", "gradients.absent_tokens_zero", "numerics.zeros_finite", seeds=1)
    report = check_causal_lm(NormedWithoutEps, profile="quick", only=("numerics.zeros_finite",))
    assert [result.status for result in report.results] == ["failed"]


class LooksUp(Tiny):
    """As RWKV_Explained: the table is a parameter of the whole, whose forward looks up its rows."""

    eps = 1e-6

    def __init__(self, config: DIYConfig) -> None:
        super().__init__(config)
        self.wte = nn.Parameter(self.embed.weight.detach())
        del self.embed, self.positions

    def rows(self, ids: Tensor) -> Tensor:
        return self.wte[ids]

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.rows(input_ids)
        hidden = self.hidden(x)
        return self.head(hidden / (hidden.abs().mean(-1, keepdim=True) + self.eps))

    def hidden(self, x: Tensor) -> Tensor:
        return x.cumsum(1)


class LooksUpByFunction(LooksUp):
    def rows(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.wte)


class LooksUpOneHot(LooksUp):
    def rows(self, ids: Tensor) -> Tensor:
        return F.one_hot(ids, len(self.wte)).to(self.wte) @ self.wte


class LooksUpByScattering(LooksUp):
    def rows(self, ids: Tensor) -> Tensor:
        chosen = self.wte.new_zeros(*ids.shape, len(self.wte)).scatter(-1, ids[..., None], 1)
        return torch.einsum("btv,vd->btd", chosen, self.wte)


class LooksUpWithoutEps(LooksUp):
    eps = 0.0


class LooksUpAndLeaks(LooksUpByFunction):
    def hidden(self, x: Tensor) -> Tensor:
        return x + x.mean(1, keepdim=True)


class OneHotAndLeaks(LooksUpOneHot, LooksUpAndLeaks):
    pass


_OF_TABLES = (
    *("causality.gradient", "gradients.absent_tokens_zero"),
    *("numerics.zeros_finite", "numerics.large_activations_finite"),
)


@pytest.mark.parametrize("module", [LooksUp, LooksUpByFunction, LooksUpOneHot, LooksUpByScattering])
def test_a_parameter_that_rows_are_looked_up_in_is_an_embedding(module: type[nn.Module]) -> None:
    passes(module, *_OF_TABLES, seeds=1)


@pytest.mark.parametrize(
    ("module", "check"),
    [
        (LooksUpWithoutEps, "numerics.zeros_finite"),
        (LooksUpAndLeaks, "causality.gradient"),
        (OneHotAndLeaks, "causality.gradient"),
    ],
)
def test_what_is_wrong_with_such_an_embedding_is_seen(module: type[nn.Module], check: str) -> None:
    assert check_causal_lm(module, profile="quick", only=[check]).verdict == "failed"


class MovesByOne(Tiny):
    """As TransformerLens, whose ``to`` takes a device or a dtype, and after it whether to say so."""

    def to(self, device_or_dtype: Any, print_details: bool = True) -> MovesByOne:  # type: ignore[override]
        return super().to(device_or_dtype)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.run(input_ids, causal)


class MovesByName(MovesByOne):
    def to(self, dtype: Any = None, device: Any = None) -> MovesByName:  # type: ignore[override]
        return nn.Module.to(self, device, dtype)


class LeavesBehind(MovesByOne):
    """What it keeps from its first call stays of the type that it was."""

    kept: Tensor | None = None

    def forward(self, input_ids: Tensor) -> Tensor:
        self.kept = torch.ones_like(self.head.bias) if self.kept is None else self.kept
        return super().forward(input_ids) * self.kept


def test_a_module_is_moved_by_a_method_of_its_own() -> None:
    for module in (MovesByOne, MovesByName):
        passes(module, "state.moves", seeds=1)
    assert check_causal_lm(LeavesBehind, profile="quick", only=["state.moves"]).verdict == "failed"


class RefusesInTraining(Tiny):
    """MPT: padding on the left is not implemented in training, and it says so."""

    words = "no padding on the left in training"

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if self.training and attention_mask is not None and not bool(attention_mask[:, 0].all()):
            raise NotImplementedError(self.words)
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        hidden = (real == 0)[:, None, None]
        return self.run(input_ids, lambda scores: causal(scores).masked_fill(hidden, -1e30))


class RefusesWithoutWords(RefusesInTraining):
    words = ""


def test_what_is_said_not_to_be_implemented_is_a_refusal_and_no_failure() -> None:
    said, silent = (
        check_causal_lm(Subject(each, claims=("left_padding",)), profile="quick", only=["modes.agree*"]).results[0]
        for each in (RefusesInTraining, RefusesWithoutWords)
    )
    assert (said.status, silent.status) == ("passed", "failed")


class CallsForwardItself(Tiny):
    """Its ``generate`` calls ``self.forward``, which runs no hooks; the penalty divides whatever the sign."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.run(input_ids, causal)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, max_new_tokens: int, repetition_penalty: float = 1.0) -> Tensor:
        for _ in range(max_new_tokens):
            logits = self.forward(input_ids)[:, -1]
            lowered = self.penalised(logits.gather(1, input_ids), repetition_penalty)
            new = logits.scatter(1, input_ids, lowered).argmax(-1, keepdim=True)
            input_ids = torch.cat((input_ids, new), 1)
        return input_ids

    def penalised(self, held: Tensor, penalty: float) -> Tensor:
        return torch.where(held > 0, held / penalty, held * penalty)


class DividesByThePenalty(CallsForwardItself):
    def penalised(self, held: Tensor, penalty: float) -> Tensor:
        return held / penalty


def test_a_generate_that_calls_forward_without_hooks_is_given_negative_logits_too() -> None:
    passes(CallsForwardItself, "generation.repetition_penalty", seeds=2)
    report = check_causal_lm(DividesByThePenalty, profile="quick", only=["generation.repetition_penalty"])
    assert report.verdict == "failed"


class OneBlock(nn.Module):
    """ALBERT and universal transformers: one block is every layer. It is recomputed in backward, the old way."""

    def __init__(self, config: DIYConfig) -> None:
        super().__init__()
        if config.tie_word_embeddings:
            raise NotImplementedError("its weights are not tied")
        self.depth = config.num_layers
        self.embed, self.head = (nn.Embedding(config.vocab_size, 8), nn.Linear(8, config.vocab_size))
        self.block = nn.GRU(8, 8, batch_first=True)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for _ in range(self.depth):
            more = checkpoint(self.run, x, use_reentrant=True) if x.requires_grad else self.run(x)
            x = x + more
        return self.head(x)

    def run(self, x: Tensor) -> Tensor:
        return self.block(x)[0]


class NamedTwice(OneBlock):
    """The one block stands in a list of layers, where each should be its own."""

    def __init__(self, config: DIYConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList([self.block] * config.num_layers)


def test_one_block_by_design_is_no_layer_that_is_shared_by_mistake() -> None:
    reports = [check_causal_lm(each, profile="quick", only=("state.depth*",)) for each in (OneBlock, NamedTwice)]
    assert [report.results[0].status for report in reports] == ["skipped", "failed"]
    assert reports[0].results[0].reason == "by its design block is every layer: it stands in the module once"


def test_gradients_go_through_a_reentrant_checkpoint() -> None:
    passes(OneBlock, "gradients.reach*", "gradients.finite", "gradients.absent*", "training.small*", seeds=1)
