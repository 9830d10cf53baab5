"""A stranger's module is called as it wants to be called: what is found by trying, and what is said of the rest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diymodel._compat import TORCH
from diymodel.verify import Subject, SubjectError, check_causal_lm
from diymodel.verify.calling.masks import CausalMask
from diymodel.verify.calling.outputs import read_output
from diymodel.verify.registry import select_checks
from diymodel.verify.runner import run_checks
from diymodel.verify.settings import Settings
from diymodel.verify.subject import resolve
from diymodel.zoo.base import BASES

needs_rms_norm = pytest.mark.skipif(not hasattr(F, "rms_norm"), reason="zoo:supplied calls F.rms_norm: torch 2.4")
pytestmark = pytest.mark.usefixtures("few_trials")
CORE = ("shape.*", "causality.edit", "causality.truncation", "batch.*", "decode.c*", "padding.*")


class Tiny(nn.Module):
    """One attention layer over learned positions; ``forward`` is a subclass's."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        d = config.hidden_size
        self.heads = config.num_heads
        self.embed, self.positions = nn.Embedding(config.vocab_size, d), nn.Embedding(config.max_seq_len, d)
        self.qkv, self.head = nn.Linear(d, 3 * d), nn.Linear(d, config.vocab_size)

    def run(self, ids: Tensor, masked: Callable[[Tensor], Tensor], positions: Tensor | None = None) -> Tensor:
        """Logits; ``masked`` gets the scores (B, heads, T, T)."""
        (B, T), S = ids.shape, ids.shape[1]
        x = self.embed(ids) + self.positions(torch.arange(S, device=ids.device) if positions is None else positions)
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = masked(q @ k.transpose(2, 3) / k.shape[-1] ** 0.5).softmax(-1) @ v
        return self.head(x + y.transpose(1, 2).reshape(B, T, -1))


def causal(scores: Tensor) -> Tensor:
    T = scores.shape[-1]
    return scores.masked_fill(torch.ones(T, T, dtype=torch.bool, device=scores.device).triu(1), -torch.inf)


def verdicts(subject: Any, only: tuple[str, ...] = CORE) -> dict[str, str]:
    """By check; a failure shows the report."""
    report = check_causal_lm(subject, profile="quick", only=only)
    assert report.verdict == "passed", report.to_text()
    return {result.check.id: result.status for result in report.results}


# --- the conventions in the wild, as imitated in the zoo --------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "found"),
    [
        ("nanogpt", {"logits_need_labels": True, "labels_come_shifted": True, "ignore_index": -1}),
        ("hub", {"mask": "attention_mask", "mask_covers_cache": True, "cache_is_value": False, "ignore_index": -100}),
        ("rotary", {"past": "past", "use_cache": "use_cache", "cache_is_value": True}),
        ("onmodule", {"positions": "input_pos", "cache_on_module": True, "always_cached": False}),
        ("fastlike", {"positions": "input_pos", "cache_on_module": True, "always_cached": True}),
        ("startpos", {"start": "start_pos", "cache_on_module": True, "always_cached": True, "new_cache": None}),
        ("resettable", {"use_cache": "use_cache", "cache_on_module": True, "always_cached": False}),
        pytest.param(
            "supplied",
            {"past": "kv_cache", "shortest": 2, "ignore_index": -1, "labels_come_shifted": True},
            marks=needs_rms_norm,
        ),
        (
            "intermediates",
            {"left": "seq_start_pos", "mask_dtype": torch.bool, "new_tokens": "cache_age", "cache_is_value": False},
        ),
    ],
)
def test_the_convention_is_found(base: str, found: dict[str, Any]) -> None:
    convention = BASES[base].subject().convention
    assert {name: getattr(convention, name) for name in found} == found


@pytest.mark.parametrize(
    ("base", "capability", "reason"),
    [
        ("nanogpt", "cache", "forward has no past_key_values"),
        ("nanogpt", "padding", "forward has no attention_mask and no seq_lengths"),
        ("onmodule", "loss", "forward has no labels"),
        ("onmodule", "cache_value", "its cache is kept on the module, and the subject does not claim 'cache_value'"),
        pytest.param(
            "supplied",
            "cache_value",
            "its cache is an object that changes, and the subject does not claim",
            marks=needs_rms_norm,
        ),
        ("fastlike", "gradient", "every call is on the cache that the module keeps: it is for inference only"),
        ("startpos", "gradient", "every call is on the cache that the module keeps: it is for inference only"),
        ("intermediates", "ragged_cache", "forward has no seq_lengths and no position_ids"),
        ("rotary", "directory", "the subject is no directory with saved weights"),
    ],
)
def test_what_is_missing_has_a_reason(base: str, capability: str, reason: str) -> None:
    assert reason in (BASES[base].subject().missing(capability) or "")


@needs_rms_norm
def test_the_caller_of_a_module_with_a_cache_class_beside_it_makes_that() -> None:
    subject = BASES["supplied"].subject()
    module = subject.build(subject._first_config())
    assert subject.convention.new_cache is not None
    cache = subject.convention.new_cache(module, subject._first_config(), 3)
    assert type(cache).__name__ == "KVCache"
    assert cache.shape[1] == 3


@needs_rms_norm
def test_what_is_declared_is_not_tried() -> None:
    made: list[int] = []

    def new_cache(module: nn.Module, config: Any, rows: int) -> Any:
        made.append(rows)
        return beside["KVCache"](rows, config.kv_heads, config.max_seq_len, config.head_size, config.num_layers)

    build = BASES["supplied"].subject()._factory
    assert build is not None
    beside = build.forward.__globals__  # type: ignore[attr-defined]
    subject = Subject(build, new_cache=new_cache, cache_is_value=False, ignore_index=-1)
    assert subject.convention.new_cache is new_cache
    assert verdicts(subject, ("decode.c*", "loss.value"))["decode.cached_equals_full"] == "passed"
    assert made


A_CACHE = """
import torch

class KVCache:
    def __init__(self):
        self.kept = None

    @property
    def offset(self):
        return 0 if self.kept is None else self.kept.shape[1]

    def update(self, x):
        self.kept = x if self.kept is None else torch.cat((self.kept, x), 1)
        return self.kept
"""
PER_LAYER = """
import torch
from tests.test_adapters import Tiny

class PerLayer(Tiny):
    def forward(self, inputs, cache=None):
        start = cache[0].offset if cache else 0
        x = self.embed(inputs) + self.positions(torch.arange(start, start + inputs.shape[1], device=inputs.device))
        seen = cache[0].update(x) if cache else x
        mean = seen.cumsum(1) / torch.arange(1, seen.shape[1] + 1, device=x.device)[:, None]
        return self.head(x + torch.tanh(mean[:, start:]))
"""


@pytest.mark.parametrize(
    "files",
    [
        {"written": A_CACHE + PER_LAYER + "make = PerLayer\n"},
        {"layers": PER_LAYER, "written": A_CACHE + "from layers import PerLayer\ndef make(c): return PerLayer(c)\n"},
        {"lm": PER_LAYER, "caches": A_CACHE, "written": "import caches\nfrom lm import PerLayer as make\n"},
    ],
    ids=["its file", "the factory's file", "another file"],
)
def test_caches_of_each_layer_are_made_as_a_list_by_a_class_nearby(files: dict[str, str], tmp_path: Path) -> None:
    for name, source in files.items():
        (tmp_path / f"{name}.py").write_text(source)
    subject = resolve(f"{tmp_path / 'written.py'}:make")
    assert subject.convention.new_cache is not None
    assert isinstance(subject.convention.new_cache(nn.Linear(1, 1), subject._first_config(), 2), list)
    assert verdicts(subject)["decode.cached_equals_full"] == "passed"


# --- masks ------------------------------------------------------------------------------------------------------------


class KeepMask(Tiny):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.run(x, lambda scores: scores.masked_fill(~mask, -torch.inf))


class HideMask(Tiny):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.run(x, lambda scores: scores.masked_fill(mask, -torch.inf))


class AddMask(Tiny):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.run(x, lambda scores: scores + mask)


class OnesMask(Tiny):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.run(x, lambda scores: scores - (1 - mask) * 1e12)


class BatchedMask(Tiny):
    def forward(self, src: Tensor, src_mask: Tensor) -> Tensor:
        assert src_mask.dim() == 4, "the mask must be (B, 1, T, T)"
        return self.run(src, lambda scores: scores.masked_fill(src_mask == 0, -1e12))


@pytest.mark.parametrize(
    ("module", "mask"),
    [
        (KeepMask, CausalMask("keep", 2)),
        (HideMask, CausalMask("hide", 2)),
        (AddMask, CausalMask("add", 2)),
        (OnesMask, CausalMask("ones", 2)),
        (BatchedMask, CausalMask("keep", 4)),
    ],
)
def test_a_causal_mask_that_the_caller_makes_is_made(module: type[nn.Module], mask: CausalMask) -> None:
    subject = Subject(module)
    assert subject.convention.causal is not None
    assert subject.convention.causal_mask == mask
    assert "is a causal mask that the caller makes" in subject.convention.describe()
    found = verdicts(module)
    assert (found["causality.edit"], found["padding.right_changes_nothing"]) == ("passed", "skipped")


class PerhapsMask(Tiny):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.run(x, lambda scores: scores if mask is None else scores.masked_fill(mask == 0, -torch.inf))


def test_a_mask_that_need_not_be_given_is_made_where_the_module_is_not_causal_without() -> None:
    assert Subject(PerhapsMask).convention.causal == "mask"
    assert verdicts(PerhapsMask)["causality.edit"] == "passed"


class OwnMask(Tiny):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.run(x, causal if mask is None else lambda scores: scores.masked_fill(~mask, -torch.inf))


def test_an_attention_mask_is_not_taken_for_one_of_padding() -> None:
    subject = Subject(OwnMask)
    assert subject.convention.causal is None
    assert (subject.missing("padding") or "").startswith("forward(mask=…) takes no padding on the right: ")
    assert verdicts(OwnMask)["padding.right_changes_nothing"] == "skipped"


class LeakyPaddingMask(Tiny):
    """Its mask is one of padding, and it has no causal one."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if attention_mask is None:
            return self.run(input_ids, lambda scores: scores)
        return self.run(input_ids, lambda scores: scores.masked_fill(attention_mask[:, None, None] == 0, -torch.inf))


def test_no_mask_is_made_for_a_module_that_forgets_its_own() -> None:
    report = check_causal_lm(LeakyPaddingMask, profile="quick", only=["causality.edit"])
    assert report.verdict == "failed"


class NeedsPaddingMask(Tiny):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.run(input_ids, lambda scores: causal(scores).masked_fill(attention_mask[:, None, None] == 0, -1e12))


class MarksPadding(Tiny):
    def forward(self, tokens: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        if key_padding_mask is None:
            return self.run(tokens, causal)
        return self.run(tokens, lambda scores: causal(scores).masked_fill(key_padding_mask[:, None, None], -1e12))


class NeedsLengths(Tiny):
    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        real = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        return self.run(tokens, lambda scores: causal(scores).masked_fill(~real[:, None, None], -1e12))


@pytest.mark.parametrize(
    ("module", "found"),
    [
        (NeedsPaddingMask, {"mask_always": True, "mask_marks_padding": False}),
        (MarksPadding, {"mask_always": False, "mask_marks_padding": True, "mask_dtype": torch.bool}),
        (NeedsLengths, {"mask_always": True, "mask": None, "lengths": "lengths"}),
    ],
)
def test_padding_is_told_as_the_module_wants_it(module: type[nn.Module], found: dict[str, Any]) -> None:
    convention = Subject(module).convention
    assert {name: getattr(convention, name) for name in found} == found
    assert verdicts(module)["padding.right_changes_nothing"] == "passed"


class InvertedMask(MarksPadding):
    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(tokens, None if attention_mask is None else attention_mask.bool())


def test_an_attention_mask_that_means_the_opposite_of_everybody_s_is_a_bug() -> None:
    assert check_causal_lm(InvertedMask, profile="quick", only=["padding.right_changes_nothing"]).verdict == "failed"


class NeedsPositions(Tiny):
    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        assert positions.dim() == 1, "positions must be (T,)"
        return self.run(tokens, causal, positions)


def test_positions_without_a_default_are_given() -> None:
    convention = Subject(NeedsPositions).convention
    assert (convention.positions_always, convention.positions_are_shared) == (True, True)
    verdicts(NeedsPositions)


# --- flex attention's mask --------------------------------------------------------------------------------------------


class Flex(Tiny):
    """As in gpt-fast: ``setup_caches`` first, and a block mask over the whole cache from the caller."""

    def setup_caches(self, max_batch_size: int, max_seq_length: int) -> None:
        self.max_batch_size, self.max_seq_length = max_batch_size, max_seq_length
        d, weight = self.head.in_features, self.head.weight
        self.keys = torch.zeros(max_batch_size, self.heads, max_seq_length, d // self.heads, dtype=weight.dtype)
        self.values = self.keys.clone()

    def forward(self, mask: Any, idx: Tensor, input_pos: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        B, T = idx.shape
        within = mask.mask_mod
        mask.mask_mod = lambda b, h, query, key: within(b, h, query + input_pos[0], key)
        x = self.embed(idx) + self.positions(input_pos)
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        self.keys[:, :, input_pos], self.values[:, :, input_pos] = k, v
        y = flex_attention(q, self.keys, self.values, block_mask=mask)
        return self.head(x + y.transpose(1, 2).reshape(B, T, -1))


@pytest.mark.slow
@pytest.mark.skipif(TORCH < (2, 5), reason="flex attention came with torch 2.5")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_block_mask_that_the_caller_makes_is_made() -> None:
    convention = Subject(Flex).convention
    assert (convention.block_mask, convention.ids, convention.always_cached) == ("mask", "idx", True)
    found = verdicts(Flex, ("causality.edit", "decode.cached_equals_full", "decode.cost"))
    assert found["decode.cached_equals_full"] == "passed"


# --- dtypes, lengths, families ----------------------------------------------------------------------------------------


class RefusesFloat64(Tiny):
    def forward(self, tokens: Tensor) -> Tensor:
        if self.head.weight.dtype == torch.float64:
            raise RuntimeError("this kernel does not support Double")
        return self.run(tokens, causal)


class KeepsFloat32(Tiny):
    """Its cache is float32, whatever the module is."""

    def forward(self, tokens: Tensor, past: Tensor | None = None, use_cache: bool = False) -> Any:
        start = 0 if past is None else past.shape[1]
        x = self.embed(tokens) + self.positions(torch.arange(start, start + tokens.shape[1], device=tokens.device))
        seen = x if past is None else torch.cat((past.to(x.dtype), x), 1)
        mean = seen.cumsum(1) / torch.arange(1, seen.shape[1] + 1, device=x.device)[:, None]
        logits = self.head(x + torch.tanh(mean[:, start:]))
        return (logits, seen.float()) if use_cache else logits


class CachedStepRefusesFloat64(KeepsFloat32):
    def forward(self, tokens: Tensor, past: Tensor | None = None, use_cache: bool = False) -> Any:
        if past is not None and past.dtype != self.head.weight.dtype:
            raise RuntimeError("expected m1 and m2 to have the same dtype")
        return super().forward(tokens, past, use_cache)


@pytest.mark.parametrize("module", [RefusesFloat64, KeepsFloat32, CachedStepRefusesFloat64])
def test_a_module_that_has_no_float64_is_judged_in_float32(module: type[nn.Module]) -> None:
    report = check_causal_lm(module, profile="quick", only=CORE)
    assert (report.verdict, report.dtype) == ("passed", "float32"), report.to_text()
    cached = next(result for result in report.results if result.check.id == "decode.cached_equals_full")
    assert cached.status == ("skipped" if module is RefusesFloat64 else "passed")


class TwoTokens(Tiny):
    def forward(self, tokens: Tensor) -> Tensor:
        assert tokens.shape[1] > 1, "a training step needs a next token"
        return self.run(tokens, causal)


def test_a_module_that_needs_two_tokens_gets_two() -> None:
    assert Subject(TwoTokens).convention.shortest == 2
    report = check_causal_lm(TwoTokens, profile="quick", skip=["numerics.large*"])  # it has no norm
    assert report.verdict == "passed", report.to_text()


class SequenceFirst(Tiny):
    """As torch's own modules are by default: (T, B), with padding told as (B, T)."""

    def forward(self, src: Tensor, src_key_padding_mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
        ids = src.t()

        def masked(scores: Tensor) -> Tensor:
            hidden = self.hidden(scores)
            if src_key_padding_mask is not None:
                hidden = hidden | src_key_padding_mask[:, None, None]
            return scores.masked_fill(hidden, torch.finfo(scores.dtype).min)

        logits = self.run(ids, masked).transpose(0, 1)
        if labels is None:
            return logits
        return logits, F.cross_entropy(logits[:-1].flatten(0, 1), labels[1:].flatten())

    def hidden(self, scores: Tensor) -> Tensor:
        return torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)


class SequenceFirstLeaks(SequenceFirst):
    def hidden(self, scores: Tensor) -> Tensor:
        return torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(2)


def test_a_module_that_takes_the_sequence_first_is_called_so() -> None:
    assert (
        resolve(SequenceFirst)
        .convention.describe()
        .startswith("forward(src, src_key_padding_mask, labels); tensors are (seq, batch); labels are shifted inside")
    )
    groups = ("shape.*", "causality.*", "batch.*", "loss.*", "padding.*", "gradients.*", "modes.*", "state.*")
    found = verdicts(SequenceFirst, only=groups)
    ran = {"causality.edit", "causality.gradient", "batch.row_alone", "loss.value", "padding.right_changes_nothing"}
    assert ran <= {id for id, status in found.items() if status == "passed"}


def test_a_module_that_takes_the_sequence_first_is_seen_through() -> None:
    report = check_causal_lm(SequenceFirstLeaks, profile="quick", only=["causality.edit"])
    assert report.verdict == "failed"


class SeesAll(Tiny):
    def forward(self, tokens: Tensor) -> Tensor:
        return self.run(tokens, lambda scores: scores)


def test_a_family_that_is_not_causal_by_design_says_so() -> None:
    subject = Subject(SeesAll, lacks={"causal": "a prefix language model"})
    report = check_causal_lm(subject, profile="quick", only=CORE)
    assert report.verdict == "passed", report.to_text()
    skipped = {result.check.id: result.reason for result in report.results if result.status == "skipped"}
    assert skipped["causality.edit"] == skipped["causality.truncation"] == "a prefix language model"
    assert check_causal_lm(SeesAll, profile="quick", only=["causality.edit"]).verdict == "failed"


class UnusedTower(Tiny):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.tower = nn.Linear(2, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.run(tokens, causal)


def test_parameters_that_rightly_get_no_gradient_are_left_out() -> None:
    only = ("gradients.reach_every_parameter",)
    report = check_causal_lm(UnusedTower, profile="quick", only=only)
    failure = report.results[0].failure
    assert failure is not None
    assert "tower.bias, tower.weight" in failure.message
    assert verdicts(Subject(UnusedTower, no_gradient=["tower.*"]), only) == {only[0]: "passed"}


# --- what forward returns ---------------------------------------------------------------------------------------------

LOGITS, LOSS, HIDDEN, CACHE = torch.zeros(2, 3, 8), torch.tensor(1.0), torch.zeros(2, 3, 16), [torch.zeros(2, 4)]


@pytest.mark.parametrize(
    ("output", "loss", "past"),
    [
        (LOGITS, None, None),
        ((LOGITS, LOSS), LOSS, None),
        ((LOSS, LOGITS), LOSS, None),
        ((LOGITS, None), None, None),
        ((HIDDEN, LOGITS), None, HIDDEN),
        ((LOGITS, CACHE, LOSS), LOSS, CACHE),
        ({"logits": LOGITS, "loss": LOSS, "past_key_values": CACHE}, LOSS, CACHE),
        ({"output": LOGITS}, None, None),
        ({"logits": LOGITS, "kv_cache": CACHE}, None, CACHE),
        ({"logits": LOGITS, "representation": HIDDEN, "attn_key_values": CACHE}, None, CACHE),
        (SimpleNamespace(logits=LOGITS, loss=LOSS, representation=HIDDEN, new_kv=CACHE), LOSS, CACHE),
    ],
)
def test_logits_loss_and_cache_are_told_apart(output: Any, loss: Tensor | None, past: Any) -> None:
    found = read_output(output, vocab_size=8)
    assert found.logits is LOGITS
    assert found.loss is loss
    assert found.past is past


def test_an_output_that_is_none_of_these_is_named() -> None:
    with pytest.raises(SubjectError, match="forward returned NoneType: expected logits"):
        read_output(None, 8)


# --- the real things --------------------------------------------------------------------------------------------------


def lit_gpt(config: Any) -> nn.Module:
    litgpt = pytest.importorskip("litgpt")
    return litgpt.GPT(
        litgpt.Config(
            block_size=config.max_seq_len,
            vocab_size=config.vocab_size,
            padding_multiple=8,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            n_query_groups=config.num_kv_heads,
            n_embd=config.hidden_size,
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            norm_eps=config.rms_norm_eps,
            mlp_class_name="LLaMAMLP",
            intermediate_size=config.intermediate_size,
            rope_base=int(config.rope_theta),
        )
    )


def x_transformer(config: Any, **positions: Any) -> nn.Module:
    x = pytest.importorskip("x_transformers")
    decoder = x.Decoder(
        dim=config.hidden_size,
        depth=config.num_layers,
        heads=config.num_heads,
        attn_dim_head=config.head_size,
        attn_dropout=config.dropout,
        ff_dropout=config.dropout,
        **positions,
    )
    return x.TransformerWrapper(
        num_tokens=config.vocab_size,
        max_seq_len=config.max_seq_len,
        attn_layers=decoder,
        use_abs_pos_emb=not positions,
    )


def x_rotary(config: Any) -> nn.Module:
    if config.head_size < 4:
        raise NotImplementedError("x-transformers divides by the size of the rotary part, less 2")
    return x_transformer(config, rotary_pos_emb=True, rotary_emb_dim=config.head_size)


def x_alibi(config: Any) -> nn.Module:
    return x_transformer(config, alibi_pos_bias=True)


@pytest.mark.parametrize(
    ("package", "factory", "lacks"),
    [
        ("litgpt", lit_gpt, ("padding", "loss", "cache_value")),
        ("x_transformers", x_transformer, ("ragged_cache", "loss", "cache_value")),
        ("x_transformers", x_rotary, ("ragged_cache", "loss", "cache_value")),
        ("x_transformers", x_alibi, ("ragged_cache", "loss", "cache_value")),
    ],
)
@pytest.mark.filterwarnings("ignore")  # of the packages themselves
def test_the_real_package_passes(package: str, factory: Callable[[Any], nn.Module], lacks: tuple[str, ...]) -> None:
    pytest.importorskip(package)
    subject = Subject(factory)
    assert all(subject.missing(capability) for capability in lacks)
    assert not any(subject.missing(capability) for capability in ("cache", "chunks", "causal"))
    found = verdicts(subject, ("shape.*", "causality.*", "decode.*", "padding.*", "batch.*"))
    assert sum(status == "passed" for status in found.values()) >= 15


@pytest.mark.parametrize(
    ("model_type", "padded_dtype", "missing"),
    [
        ("llama", None, {"cache_value"}),
        ("mixtral", None, {"cache_value"}),  # its grouped kernels would refuse float64
        ("bloom", torch.float32, {"cache_value"}),  # its padded rows are NaN in float64
        ("falcon", None, {"cache_value"}),
        ("gptj", None, {"cache_value"}),
        ("mamba", None, {"cache_value", "chunks"}),
        ("openai-gpt", None, {"cache_value", "chunks", "cache"}),
    ],
)
def test_families_of_transformers_are_made_small_and_called(
    model_type: str, padded_dtype: torch.dtype | None, missing: set[str], capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    subject = resolve(f"hf:{model_type}")
    assert (subject.convention.dtype, subject.convention.padded_dtype) == (torch.float64, padded_dtype)
    asked = ("cache", "chunks", "padding", "loss", "gradient", "cache_value", "causal", "left_padding")
    assert {capability for capability in asked if subject.missing(capability)} == missing
    assert capfd.readouterr().err == ""


FAMILIES = ("llama", "gpt2", "qwen2", "mistral", "gemma2", "gpt_neox", "phi3", "opt", "bloom", "mixtral")


@pytest.mark.slow
@pytest.mark.parametrize("model_type", FAMILIES)
def test_popular_families_of_transformers_pass(model_type: str) -> None:
    """In a few trials; ``benchmarks/false_alarms.py`` counts many."""
    pytest.importorskip("transformers")
    checks = select_checks(("causality.*", "decode.*", "loss.*", "padding.*"))
    results = list(run_checks(resolve(f"hf:{model_type}"), checks, Settings(3)))
    assert [result for result in results if result.status not in ("passed", "skipped")] == []
    assert sum(result.status == "passed" for result in results) >= 25
