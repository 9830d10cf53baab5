"""The model, from top to bottom: RMSNorm, rotary positions, attention, MLP, block, backbone, language model.

The architecture is Llama's: pre-norm blocks, rotary positions (rotate-half), grouped-query attention, SwiGLU, and no
biases.

Shapes: B batch, T query length, S key length (cached + T), H query heads, K key/value heads, D head size,
V vocabulary. "hidden" is always (B, T, hidden_size).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diymodel._attributes import direct
from diymodel._compat import attention
from diymodel.cache import LayerCache, LayerPast, PastKeyValues, Placement, Span, check_cache
from diymodel.config import DIYConfig
from diymodel.generate import generate
from diymodel.inputs import check_input_ids, check_logits_to_keep, check_seq_lengths, seq_lengths_of
from diymodel.linear import HALF_TYPES, Linear, drawn
from diymodel.weights import check_state_dict, check_tied, with_tied_head

INIT_STD = 0.02  # GPT-2's: small enough that the first loss is near ln(V)


@direct(parameters=("weight",))
class RMSNorm(nn.Module):
    """``weight · x / sqrt(mean(x²) + eps)`` over the last dimension (Zhang and Sennrich 2019, arXiv:1910.07467).

    The square is taken in float32 for half types: 256² already overflows float16.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        # Five norms cost a tiny model a fifth of its decode step: vector_norm and addcmul are the fewest kernels, and
        # their backward takes half the time of F.rms_norm's on CPU.
        wide = hidden.float() if hidden.dtype in HALF_TYPES else hidden
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        mean_square = torch.addcmul(torch.full_like(norm, self.eps), norm, norm, value=1 / hidden.shape[-1])
        normed = wide * mean_square.rsqrt_()
        return (normed if wide is hidden else normed.to(hidden.dtype)) * self.weight


class RotaryEmbedding(nn.Module):
    """The cosines and sines that turn queries and keys by their position (Su et al. 2021, arXiv:2104.09864).

    Pair i of a head is turned by ``position · theta^(-2i/D)``. The angles are computed in float64 whatever the model's
    dtype: at position 1000 a bfloat16 angle is off by whole radians. The table is as long as was needed so far and is
    no part of the state: it follows from the configuration.
    """

    def __init__(self, head_size: int, theta: float) -> None:
        super().__init__()
        self.head_size = head_size
        self.theta = theta
        self._table = torch.empty(2, 0, head_size)

    def forward(self, span: Span, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the span's positions, (T, D) or (B, 1, T, D), in dtype and on device of ``like``."""
        table = self._table
        if table.shape[1] < span.total or table.dtype != like.dtype or table.device != like.device:
            table = self._table = self.make_table(1 << (span.total - 1).bit_length(), like)
        if isinstance(span.start, int):
            cos, sin = table.narrow(1, span.start, span.num_new).unbind()
        else:
            cos, sin = table[:, span.slots(like.device)].unsqueeze(2).unbind()
        return cos, sin

    @torch.inference_mode(False)  # a table made in inference mode could not be saved for a later backward
    def make_table(self, length: int, like: Tensor) -> Tensor:
        """Cosines and sines of positions 0 … length - 1, (2, length, D), in dtype and on device of ``like``."""
        pairs = torch.arange(0, self.head_size, 2, dtype=torch.float64, device="cpu")
        frequencies = self.theta ** (-pairs / self.head_size)
        angles = torch.arange(length, dtype=torch.float64, device="cpu")[:, None] * frequencies
        cos, sin = angles.cos(), angles.sin()
        # The minus of rotate() lives in the table.
        return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))).to(like.device, like.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x1, x2) = (x[i], x[i + D/2]) by its angle: ``(x1·cos - x2·sin, x2·cos + x1·sin)``.

    ``x`` is (B, heads, T, D); ``sin`` comes with its first half negated.
    """
    if cos.dtype != x.dtype:  # under autocast, where x is narrower than the residual stream
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class Step(NamedTuple):
    """What one forward pass tells every block."""

    cos: Tensor  # (T, D) or (B, 1, T, D)
    sin: Tensor
    mask: Tensor | None  # (T, S) or (B, 1, T, S), True where a query may look; None: is_causal says it
    cached: Placement | None  # where the new keys go in the cache; None: no cache


@direct(modules=("qkv_proj", "o_proj"))
class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245): query head h reads key head h // (H / K)."""

    def __init__(self, config: DIYConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.num_kv_heads = config.kv_heads
        self.head_size = config.head_size
        self.max_seq_len = config.max_seq_len
        self.dropout = config.dropout
        heads = config.num_heads + 2 * config.kv_heads
        self.qkv_proj = Linear(config.hidden_size, heads * config.head_size, INIT_STD)
        self.o_proj = Linear(config.hidden_size, config.hidden_size, _residual_std(config))

    def forward(self, hidden: Tensor, step: Step, past: LayerPast | None) -> tuple[Tensor, LayerPast | None]:
        B, T, _ = hidden.shape
        H, K, D = self.num_heads, self.num_kv_heads, self.head_size
        qk, v = self.qkv_proj(hidden).view(B, T, H + 2 * K, D).transpose(1, 2).split_with_sizes((H + K, K), 1)
        q, k = rotate(qk, step.cos, step.sin).split_with_sizes((H, K), 1)
        present = None
        if step.cached is not None:
            k, v, present = step.cached.put(past, k, v, self.max_seq_len)
        attended = self._attend(q, k, v, step.mask)
        return self.o_proj(attended.transpose(1, 2).reshape(B, T, H * D)), present

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        T = q.shape[2]
        if self.training and q.dtype in HALF_TYPES and q.device.type == "cpu" and T <= 256:
            # Torch's backward takes up to seven times as long in half types here; autocast would narrow them again.
            with torch.autocast("cpu", enabled=False):
                return self._attend(q.float(), k.float(), v.float(), mask).to(q.dtype)
        dropout, causal = (self.dropout if self.training else 0.0), mask is None and T > 1
        grouped = self.num_heads != self.num_kv_heads
        return attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, enable_gqa=grouped)


@direct(modules=("gate_up_proj", "down_proj"))
class MLP(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) · up(x))`` (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: DIYConfig) -> None:
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.mlp_size, INIT_STD)
        self.down_proj = Linear(config.mlp_size, config.hidden_size, _residual_std(config))

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(hidden).chunk(2, -1)
        down: Tensor = self.down_proj(F.silu(gate) * up)
        return down


@direct(modules=("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"))
class ModelBlock(nn.Module):
    """Attention and MLP, each reading a normalised copy of the residual stream and added back to it."""

    def __init__(self, config: DIYConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.dropout = config.dropout

    def forward(self, hidden: Tensor, step: Step, past: LayerPast | None) -> tuple[Tensor, LayerPast | None]:
        attended, present = self.self_attn(self.input_layernorm(hidden), step, past)
        hidden = hidden + self._drop(attended)
        hidden = hidden + self._drop(self.mlp(self.post_attention_layernorm(hidden)))
        return hidden, present

    def _drop(self, update: Tensor) -> Tensor:
        return F.dropout(update, self.dropout) if self.training else update


@direct(modules=("embed_tokens", "layers", "norm", "rotary"))
class DIYModel(nn.Module):
    """The backbone: token ids to hidden states."""

    def __init__(self, config: DIYConfig) -> None:
        super().__init__()
        self.config = config
        embedding = drawn(config.vocab_size, config.hidden_size, INIT_STD)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=embedding)
        self.layers = nn.ModuleList(ModelBlock(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryEmbedding(config.head_size, config.rope_theta)

    def forward(
        self,
        input_ids: Tensor,
        seq_lengths: Tensor | None = None,
        past_key_values: PastKeyValues | None = None,
        use_cache: bool = False,
    ) -> Tensor | tuple[Tensor, PastKeyValues]:
        """Hidden states of the new tokens.

        Args:
            input_ids: (B, T) int64 or int32 token ids; with a cache only the tokens that follow it.
            seq_lengths: (B,) int64, how many of each row's T tokens are real, in [0, T]; the rest is padding on the
                right, whose content has no effect and whose hidden states mean nothing. None: all T.
            past_key_values: what an earlier call with ``use_cache=True`` returned, unchanged by this call.
            use_cache: return the cache as well. With a cache, given or asked for, no gradient is recorded.

        Returns:
            Hidden states (B, T, hidden_size); with ``use_cache`` a pair of them and ``presents``.

        Raises:
            ValueError, TypeError: an argument does not fit, or a cache is used in training mode; before any work.
        """
        caching = use_cache or past_key_values is not None
        if caching and self.training:
            raise ValueError("a KV cache is for inference and the model is in training mode: call model.eval() first")
        span = self._span(input_ids, seq_lengths, past_key_values)
        if not caching:
            hidden, _ = self.run(input_ids, seq_lengths, None, span, None)
            return hidden
        with torch.no_grad():
            hidden, presents = self.run(input_ids, seq_lengths, past_key_values, span, span)
        return (hidden, presents) if use_cache else hidden

    def run(
        self,
        input_ids: Tensor,
        seq_lengths: Tensor | None,
        past: PastKeyValues | None,
        span: Span,
        cached: Span | None,
    ) -> tuple[Tensor, PastKeyValues]:
        """``forward`` after its checks; ``cached`` says where the new keys go, None keeps none."""
        hidden = self.embed_tokens(input_ids)
        if self.training:
            hidden = F.dropout(hidden, self.config.dropout)
        if seq_lengths is not None:
            # Zeros at the padding, so that not even a NaN standing there gets into a sum.
            padding = torch.arange(span.num_new, device=hidden.device) >= seq_lengths[:, None]
            hidden = hidden.masked_fill(padding[..., None], 0.0)
        cos, sin = self.rotary(span, hidden)
        return self.run_layers(hidden, cos, sin, span.mask(hidden.device), cached, past)

    def run_layers(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        cached: Placement | None,
        past: PastKeyValues | None,
    ) -> tuple[Tensor, PastKeyValues]:
        """From the embeddings on; ``cos`` to ``cached`` are those of :class:`Step`."""
        step = Step(cos, sin, mask, cached)
        presents: PastKeyValues = []
        for layer, block in enumerate(self.layers):
            hidden, present = block(hidden, step, past[layer] if past is not None else None)
            presents.append(present)
        return self.norm(hidden), presents

    def _span(self, input_ids: Tensor, seq_lengths: Tensor | None, past: PastKeyValues | None) -> Span:
        """Where the new tokens stand, after refusing what the model cannot compute."""
        check_input_ids(input_ids, self.config.vocab_size)
        if seq_lengths is not None:
            check_seq_lengths(seq_lengths, input_ids)
        B, T = input_ids.shape
        start: int | Tensor = 0
        filled = 0
        if past is not None:
            start, filled = check_cache(past, self.config, B, input_ids.device)
        span = Span.after(start, filled, T, seq_lengths)
        if span.length > self.config.max_seq_len:
            raise ValueError(
                f"{span.length} positions ({filled} cached, {T} new) are more than "
                f"max_seq_len={self.config.max_seq_len}: shorten the input, or build the model with a larger one"
            )
        return span


@direct(modules=("model", "lm_head"))
class DIYForCausalLM(nn.Module):
    """The language model: backbone and ``lm_head``, a score for every token of the vocabulary at every position."""

    def __init__(self, config: DIYConfig) -> None:
        super().__init__()
        self.config = config
        self.model = DIYModel(config)
        if config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, device="meta")
            self._tie()
        else:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, INIT_STD)

    generate = generate

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        seq_lengths: Tensor | None = None,
        past_key_values: PastKeyValues | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
    ) -> Tensor | tuple[Tensor, PastKeyValues]:
        """Logits for the token after each position.

        Args:
            input_ids: (B, T), as for :class:`DIYModel`.
            attention_mask: (B, T), 1 for a token and 0 for padding on the right; another way to give ``seq_lengths``.
            seq_lengths: (B,), as for :class:`DIYModel`.
            past_key_values: as for :class:`DIYModel`.
            use_cache: as for :class:`DIYModel`.
            logits_to_keep: compute only the logits of each row's last so many real positions; 0 means all T.

        Returns:
            Logits (B, T or logits_to_keep, V); with ``use_cache`` a pair of them and ``presents``.

        Raises:
            ValueError, TypeError: an argument does not fit, or a cache is used in training mode; before any work.
        """
        if attention_mask is not None:
            if seq_lengths is not None:
                raise ValueError("attention_mask and seq_lengths say the same thing: give one of them")
            seq_lengths = seq_lengths_of(attention_mask, input_ids)
        if logits_to_keep:
            check_logits_to_keep(logits_to_keep, input_ids, seq_lengths)
        output = self.model(input_ids, seq_lengths, past_key_values, use_cache)
        hidden: Tensor = output[0] if use_cache else output
        if 0 < logits_to_keep < hidden.shape[1]:
            hidden = _last_positions(hidden, seq_lengths, logits_to_keep)
        caching = use_cache or past_key_values is not None
        with torch.set_grad_enabled(torch.is_grad_enabled() and not caching):
            logits: Tensor = self.lm_head(hidden)
        return (logits, output[1]) if use_cache else logits

    def decode_step(self, tokens: Tensor, past_key_values: PastKeyValues) -> tuple[Tensor, PastKeyValues]:
        """Logits (B, 1, V) after one more token a row, (B, 1), and the new cache: ``forward`` without its checks.

        For loops that feed a model its own tokens on its own cache, where nothing can be wrong: reading values back to
        check them costs a tiny model a tenth of the step, and makes a GPU wait. Call it without gradients.
        """
        cached, start = past_key_values[0]
        assert isinstance(cached, LayerCache)
        span = Span.after(start, cached.length, 1, None)
        hidden, presents = self.model.run(tokens, None, past_key_values, span, span)
        return self.lm_head(hidden), presents

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As ``nn.Module``'s, but nothing is changed unless all fits, and tied weights stay tied.

        Raises:
            ValueError: names what is missing, unexpected or misshapen and the configuration field that explains it; or
                the model ties its embedding and head, and these weights hold two different ones.
        """
        if strict:
            check_state_dict(state_dict, self.state_dict(), self.config)
            state_dict = with_tied_head(state_dict, self.config)
        check_tied(state_dict, self.config)
        keys = super().load_state_dict(state_dict, strict, assign)
        self._tie()
        return keys

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # to(), to_empty(), double() …: torch may put a new Parameter in place of each name of a shared one.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._tie()
        return self

    def _tie(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight


def _residual_std(config: DIYConfig) -> float:
    """For the 2 · num_layers projections that add to the residual stream, so that its variance stays (GPT-2)."""
    return INIT_STD / math.sqrt(2 * config.num_layers)


def _last_positions(hidden: Tensor, seq_lengths: Tensor | None, count: int) -> Tensor:
    """The last ``count`` real positions of each row, (B, count, hidden_size)."""
    if seq_lengths is None:
        return hidden[:, -count:]
    kept = torch.arange(-count, 0, device=hidden.device) + seq_lengths[:, None]
    return hidden.gather(1, kept[..., None].expand(-1, -1, hidden.shape[-1]))
