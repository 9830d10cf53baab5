"""Broken models: each is one of the bases with one line exchanged."""

from __future__ import annotations

import functools
import inspect
import types
from dataclasses import dataclass

from diymodel.verify.registry import list_checks
from diymodel.verify.report import Result
from diymodel.verify.runner import run_check
from diymodel.verify.subject import Subject
from tests.meta import bases

EXAMPLES = 20  # trials in which a bug must show


@dataclass(frozen=True)
class Broken:
    """One small change to a base that a check must not let pass."""

    check: str  # id
    bug: str  # slug; among the check's causes
    base: str  # class in bases.py that is verified
    where: str  # class or function in bases.py whose source is changed
    old: str  # occurs there once
    new: str
    claims: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        return f"{self.check}-{self.bug}-{self.base}"

    def subject(self) -> Subject:
        module = types.ModuleType(f"broken_{self.bug}")
        source, part = inspect.getsource(bases), inspect.getsource(getattr(bases, self.where))
        assert part.count(self.old) == 1, f"{self.old!r} occurs {part.count(self.old)} times in {self.where}"
        exec(source.replace(part, part.replace(self.old, self.new)), module.__dict__)
        return Subject(getattr(module, self.base), self.id, ("strict_context", "finite_loss", *self.claims))


_CAUSAL = "arange(k.shape[2]) <= position[:, None]"
_HUB_CAUSAL = "(torch.arange(start + T) <= position[:, None])[None, None]"
_X = "x = self.embed(input_ids)"
_NANO_X = "x = self.drop(self.wte(idx) + self.wpe(torch.arange(T)))"
_NANO_MASK = "scores = scores.masked_fill(self.mask[:T, :T] == 0, -math.inf)"
_TOTAL = 'F.cross_entropy(scored, targets, ignore_index=-100, reduction="sum")'
_STRICT = "def forward(self, input_ids: Tensor, past"
_PLAIN = "return self.head(self.encoder(self.embed(x) + self.positions[:T], mask=future))"
_LAYERS = "nn.ModuleList([RotaryBlock(config) for _ in range(config.num_layers)])"


def _method(name: str, body: str) -> str:
    """A method put in front of Rotary.forward."""
    return f"def {name}:\n        {body}\n\n    {_STRICT}"


BROKEN = [
    # Causality
    Broken("causality.edit", "mask-sees-next-token", "Rotary", "RotaryBlock", _CAUSAL, f"{_CAUSAL} + 1"),
    Broken("causality.edit", "bidirectional-mask", "Plain", "Plain", ", mask=future", ""),
    Broken("causality.edit", "mask-value-too-small", "NanoGPT", "NanoBlock", "-math.inf", "-8.0"),
    Broken("causality.edit", "softmax-wrong-axis", "NanoGPT", "NanoBlock", "scores.softmax(-1)", "scores.softmax(-2)"),
    Broken("causality.edit", "statistic-over-sequence", "Hub", "Hub", _X, f"{_X}; x = x - x.mean(1, keepdim=True)"),
    Broken("causality.truncation", "statistic-over-sequence", "Plain", "Plain", "triu(1)", "triu(1) & (T < 3)"),
    Broken("causality.truncation", "mask-sees-next-token", "NanoGPT", "NanoBlock", ".tril())", ".tril(1))"),
    Broken(
        "causality.in_training",
        "mask-dropped-with-dropout",
        "NanoGPT",
        "NanoBlock",
        _NANO_MASK,
        f"if not (self.training and self.dropout): {_NANO_MASK}",
    ),
    # Sensitivity
    Broken(
        "sensitivity.sees_itself_and_its_past",
        "mask-hides-self",
        "Plain",
        "Plain",
        _PLAIN,
        _PLAIN.replace("self.embed(x)", "self.embed(F.pad(x[:, :-1], (1, 0)))"),
    ),
    Broken("sensitivity.order_matters", "no-positions", "NanoGPT", "NanoGPT", " + self.wpe(torch.arange(T))", ""),
    Broken("sensitivity.order_matters", "no-positions", "Rotary", "rotate", "position[:, None] * freq", "0 * freq"),
    # Shapes, batches
    Broken("shape.logits", "masked-row-nan", "NanoGPT", "NanoBlock", ".tril())", ".tril(-1))"),
    Broken(
        "shape.longest",
        "position-table-clamped",
        "Plain",
        "Plain",
        "randn(config.max_seq_len",
        "randn(config.max_seq_len - 1",
    ),
    Broken(
        "forward.deterministic",
        "dropout-active-in-eval",
        "NanoGPT",
        "NanoBlock",
        "weights = F.dropout(scores.softmax(-1), self.dropout, self.training)",
        "weights = F.dropout(scores.softmax(-1), self.dropout)",
    ),
    Broken(
        "forward.deterministic",
        "state-survives-calls",
        "Rotary",
        "Rotary",
        _X,
        f"{_X}; x = x + getattr(self, 'kept', 0); self.kept = x.mean().item()",
    ),
    Broken(
        "forward.inputs_unchanged", "inputs-written-in-place", "Hub", "Hub", _X, f"{_X}; input_ids[input_ids == 1] = 0"
    ),
    Broken(
        "batch.row_alone",
        "statistic-over-batch",
        "Plain",
        "Plain",
        "self.embed(x) +",
        "self.embed(x) - self.embed(x).mean(0) +",
    ),
    Broken(
        "batch.permutation",
        "cache-rows-shared",
        "Rotary",
        "RotaryBlock",
        "k.repeat_interleave(self.groups, 1)",
        "k[:1].repeat_interleave(self.groups, 1).expand_as(q[:, :, :1].expand(B, self.heads, k.shape[2], self.size))",
    ),
    Broken(
        "context.overlong_refused",
        "position-table-clamped",
        "Plain",
        "Plain",
        "self.positions[:T]",
        "self.positions[torch.arange(T).clamp(max=len(self.positions) - 1)]",
    ),
    Broken(
        "context.overlong_refused", "generation-overflow", "Rotary", "Rotary", "if cached + input_ids", "if input_ids"
    ),
    # Decoding
    Broken(
        "decode.cached_equals_full",
        "position-restarts-in-decode",
        "Rotary",
        "RotaryBlock",
        "torch.arange(start, start + T)",
        "torch.arange(T)",
    ),
    Broken(
        "decode.cached_equals_full",
        "cached-keys-rotated-again",
        "Rotary",
        "RotaryBlock",
        "k, v = torch.cat((past[0], k), 2)",
        "k, v = torch.cat((rotate(past[0], position[:1], self.theta), k), 2)",
    ),
    Broken(
        "decode.cached_equals_full",
        "position-advances-per-layer",
        "Hub",
        "HubBlock",
        "q, k = rotate(q, position, self.theta)",
        "position = position + self.index * (cache is not None and cache.length() > len(position))\n"
        "        q, k = rotate(q, position, self.theta)",
    ),
    Broken(
        "decode.chunks",
        "chunk-unmasked",
        "Rotary",
        "RotaryBlock",
        "attn_mask=mask",
        "attn_mask=mask if past is None else None",
    ),
    Broken(
        "decode.chunks",
        "chunk-mask-top-left",
        "Rotary",
        "RotaryBlock",
        "attn_mask=mask",
        "attn_mask=mask if T == 1 else None, is_causal=T > 1",
    ),
    Broken(
        "decode.branch",
        "cache-list-mutated",
        "Rotary",
        "Rotary",
        "return (logits, tuple(present))",
        "past = [] if past is None else past; past[:] = present; return (logits, past)",
    ),
    Broken("decode.branch", "cache-mutated-in-place", "Hub", "Hub", "start, T", "start, T", ("cache_value",)),
    Broken(
        "decode.unrelated_call",
        "state-survives-calls",
        "Rotary",
        "Rotary",
        _X,
        f"{_X}; self.calls = getattr(self, 'calls', 0) + 1 if past is None else self.calls; x = x * self.calls",
    ),
    Broken(
        "decode.no_graph",
        "cache-keeps-graph",
        "Rotary",
        "Rotary",
        "return (logits, tuple(present))",
        "return (logits, tuple((k.requires_grad_(), v) for k, v in present))",
    ),
    Broken(
        "decode.step_shape",
        "cache-recomputes",
        "Rotary",
        "Rotary",
        "logits = self.head(self.norm(x))",
        "logits = self.head(self.norm(x)); logits = logits.repeat(1, cached + 1, 1) if cached else logits",
    ),
    Broken(
        "decode.cost",
        "cache-recomputes",
        "Rotary",
        "Rotary",
        "return (logits, tuple(present)) if use_cache else logits",
        "if not use_cache:\n            return logits\n"
        "        ids = input_ids if past is None else torch.cat((past[0][2], input_ids), 1)\n"
        "        return self(ids)[:, -input_ids.shape[1] :], ((*present[0], ids), *present[1:])",
    ),
    # Padding
    Broken(
        "padding.right_changes_nothing",
        "statistic-over-sequence",
        "Hub",
        "Hub",
        _X,
        f"{_X}; x = x + x.mean(1, keepdim=True)",
    ),
    Broken(
        "padding.right_changes_nothing",
        "padded-batch-shared-position",
        "Hub",
        "Hub",
        "attention_mask[:, None, None, :].bool()",
        "attention_mask[:, None, None, :].flip(-1).bool() | torch.eye(T, dtype=torch.bool)",
    ),
    Broken(
        "padding.content_irrelevant",
        "bidirectional-mask",
        "Hub",
        "Hub",
        _HUB_CAUSAL,
        "torch.ones(1, 1, T, start + T, dtype=torch.bool)\n        attention_mask = None",
    ),
    Broken("padding.content_irrelevant", "statistic-over-sequence", "Hub", "Hub", _X, f"{_X}; x = x / x.std()"),
    Broken("padding.all_padding_finite", "masked-row-nan", "Hub", "HubBlock", "torch.finfo(x.dtype).min", "-math.inf"),
    # Loss
    Broken(
        "loss.value",
        "labels-not-shifted",
        "Hub",
        "Hub",
        "logits[:, :-1].flatten(0, 1), labels[:, 1:]",
        "logits.flatten(0, 1), labels",
    ),
    Broken(
        "loss.value",
        "labels-flattened-before-shift",
        "Hub",
        "Hub",
        "logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()",
        "logits.flatten(0, 1)[:-1], labels.flatten()[1:]",
    ),
    Broken(
        "loss.value",
        "ignore-index-not-honoured",
        "NanoGPT",
        "NanoGPT",
        "targets.flatten(), ignore_index=-1,",
        "targets.flatten().clamp(min=0),",
    ),
    Broken(
        "loss.value",
        "loss-wrong-denominator",
        "NanoGPT",
        "NanoGPT",
        "(targets != -1).sum().clamp(min=1)",
        "targets.numel()",
    ),
    Broken(
        "loss.gradient",
        "gradient-detached",
        "Hub",
        "Hub",
        "logits[:, :-1].flatten(0, 1)",
        "self.lm_head(self.norm(x.detach()))[:, :-1].flatten(0, 1)",
    ),
    Broken("loss.all_ignored", "all-ignored-loss-nan", "NanoGPT", "NanoGPT", ".clamp(min=1)", ""),
    # Modes
    Broken(
        "modes.dropout_active_in_training",
        "dropout-never-active",
        "Rotary",
        "Rotary",
        "x, kv = layer(",
        "x, kv = layer.eval()(",
    ),
    Broken(
        "modes.agree_without_dropout",
        "training-branch-differs",
        "Plain",
        "Plain",
        "self.embed(x) +",
        "self.embed(x) * (1.5 if self.training else 1) +",
    ),
    Broken(
        "modes.followed_at_every_depth",
        "mode-flag-copied",
        "NanoGPT",
        "NanoBlock",
        "self.dropout, self.training)\n        x =",
        "self.dropout, True)\n        x =",
    ),
    Broken(
        "modes.followed_at_every_depth",
        "mode-not-restored",
        "Rotary",
        "Rotary",
        _STRICT,
        _method("train(self, mode: bool = True)", "self.training = mode; return self"),
    ),
    # Gradients and training
    Broken(
        "gradients.reach_every_parameter",
        "gradient-detached",
        "Rotary",
        "RotaryBlock",
        "y = F.scaled",
        "k = k.detach(); keys = keys.detach(); y = F.scaled",
    ),
    Broken(
        "gradients.finite",
        "masked-row-nan",
        "Hub",
        "HubBlock",
        "y = F.dropout(scores.softmax(-1)",
        "allowed = allowed & allowed.diagonal(dim1=2, dim2=3)[..., None]  # padding sees nothing\n"
        "        scores = scores + torch.zeros_like(scores).masked_fill(~allowed, -math.inf)\n"
        "        y = F.dropout(scores.softmax(-1).nan_to_num()",
    ),
    Broken(
        "gradients.absent_tokens_zero",
        "statistic-over-vocabulary",
        "Rotary",
        "Rotary",
        _X,
        f"{_X} * (1 + self.embed.weight.mean())",
    ),
    Broken(
        "training.small_step_lowers_loss",
        "gradient-wrong",
        "Plain",
        "Plain",
        _PLAIN,
        f"{_PLAIN.replace('return', 'y =')}; return 2 * y.detach() - y",
    ),
    Broken(
        "training.overfits_a_tiny_batch",
        "statistic-over-sequence",
        "Rotary",
        "Rotary",
        "self.head(self.norm(x))",
        "self.head(self.norm(x.mean(1, keepdim=True).expand_as(x)))",
    ),
    # State
    Broken(
        "state.round_trip",
        "state-outside-checkpoint",
        "Plain",
        "Plain",
        "self.positions = nn.Parameter(torch.randn(config.max_seq_len, d))",
        'self.register_buffer("positions", torch.randn(config.max_seq_len, d), persistent=False)',
    ),
    Broken(
        "state.strict_load",
        "lenient-load",
        "Rotary",
        "Rotary",
        _STRICT,
        _method(
            "load_state_dict(self, values)",
            "own = self.state_dict()\n"
            "        fitting = {k: v for k, v in values.items() if k in own and v.shape == own[k].shape}\n"
            "        return super().load_state_dict(fitting, strict=False)",
        ),
    ),
    Broken(
        "state.depth_adds_parameters",
        "block-shared",
        "Rotary",
        "Rotary",
        _LAYERS,
        "nn.ModuleList([RotaryBlock(config)] * config.num_layers)",
    ),
    Broken(
        "state.every_parameter_registered",
        "parameters-unregistered",
        "Rotary",
        "Rotary",
        _LAYERS,
        _LAYERS.replace("nn.ModuleList(", "list("),
    ),
    Broken(
        "state.tied_weights_stay_tied",
        "tie-lost",
        "Rotary",
        "Rotary",
        "self.head.weight = self.embed.weight",
        "self.head.weight = nn.Parameter(self.embed.weight.clone())",
    ),
    Broken(
        "state.tied_weights_stay_tied",
        "tie-lost",
        "Hub",
        "Hub",
        "def forward(\n",
        "def load_state_dict(self, values):\n        return super().load_state_dict(values, assign=True)\n\n"
        "    def forward(\n",
    ),
    Broken(
        "state.deepcopy",
        "state-outside-checkpoint",
        "Rotary",
        "Rotary",
        "self.embed = nn.Embedding(config.vocab_size, config.hidden_size)",
        "self.embed = embed = nn.Embedding(config.vocab_size, config.hidden_size)\n"
        "        embed.forward = lambda ids: F.embedding(ids, embed.weight)",
    ),
    # Numerics
    Broken(
        "numerics.bfloat16_near_float64",
        "rope-low-precision",
        "Rotary",
        "rotate",
        "position[:, None] * frequency",
        "position[:, None].to(x.dtype) * frequency.to(x.dtype)",
    ),
    Broken(
        "numerics.large_activations_finite",
        "rmsnorm-overflow-half",
        "Hub",
        "RMSNorm",
        "x.float() if x.dtype in (torch.float16, torch.bfloat16) else x",
        "x",
    ),
]


@functools.cache
def verdict(broken: Broken) -> Result:
    """What the check says of the broken model, shrunk; run once for all tests that ask."""
    check = next(check for check in list_checks() if check.id == broken.check)
    return run_check(broken.subject(), check, EXAMPLES, 0)
