"""The shapes that are measured. Needs no torch."""

from __future__ import annotations

from diymodel.config import DIYConfig


def _shape(
    hidden_size: int, num_layers: int, num_heads: int, vocab_size: int, num_kv_heads: int | None = None
) -> DIYConfig:
    return DIYConfig(
        vocab_size=vocab_size,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        max_seq_len=4096,  # costs nothing until it is used
        dropout=0.0,
    )


SHAPES = {
    "T256": _shape(64, 2, 4, vocab_size=256),  # byte-level: the head is as small as the rest, only overhead is left
    "T": _shape(64, 2, 4, vocab_size=6400),
    "S": _shape(512, 8, 8, vocab_size=6400),
    "M": _shape(768, 12, 12, vocab_size=32000),
    "L": _shape(960, 32, 15, vocab_size=49152, num_kv_heads=5),
}


def parse_shapes(text: str) -> dict[str, DIYConfig]:
    """``"T,S"`` to configurations by name.

    Raises:
        ValueError: a name is no shape.
    """
    names = text.split(",")
    for name in names:
        if name not in SHAPES:
            raise ValueError(f"no shape {name!r}; there are {', '.join(SHAPES)}")
    return {name: SHAPES[name] for name in names}


def parse_lengths(option: str, text: str, longest: int) -> list[int]:
    """``"32,64"`` to increasing lengths, at least two, from 4 to ``longest`` positions.

    Raises:
        ValueError: they are no such lengths.
    """
    try:
        lengths = sorted({int(word) for word in text.split(",")})
    except ValueError:
        raise ValueError(f"{option} {text}: write whole numbers with commas between, such as 32,64,128") from None
    if len(lengths) < 2 or lengths[0] < 4 or lengths[-1] > longest:
        raise ValueError(f"{option} {text}: at least two lengths, from 4 to {longest} positions")
    return lengths
