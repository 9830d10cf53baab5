"""Draw what ``benchmarks.decode_scaling`` measured: a step and a whole generation, with and without cache, log-log.

``python -m benchmarks.plot CPU.json [GPU.json] --out decode_scaling.svg``

Points are measured seconds; a hollow point is the integral of measured steps, where generating so many tokens would
have taken too long. The dashed lines are slopes for the eye to compare with; where they stand means nothing. The
picture has its own background, so it reads the same on a light page and on a dark one.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAPER, INK, FAINT = "#fcfcfa", "#24292f", "#7b828a"
WAYS = {  # colours apart in hue and in lightness, and a marker each, so that neither is needed alone
    "no_cache": {"color": "#c2410c", "marker": "s", "label": "without cache", "zh": "无缓存"},
    "cached": {"color": "#1d6fb8", "marker": "o", "label": "with cache", "zh": "有缓存"},
}
PANELS = {  # slope of the guides
    "step_seconds": {"title": "one step at t positions", "zh": "第 t 个位置的一步", "x": "t", "guides": (1, 2)},
    "total_seconds": {"title": "generating T tokens", "zh": "生成 T 个词元", "x": "T", "guides": (1, 2, 3)},
}
SUPERSCRIPT = str.maketrans("0123456789.", "⁰¹²³⁴⁵⁶⁷⁸⁹·")
CHINESE_FONTS = ("Noto Sans CJK SC", "Source Han Sans SC", "PingFang SC", "Microsoft YaHei", "WenQuanYi Micro Hei")
STYLE = {
    "svg.fonttype": "none",  # text stays text: small, searchable, and in the reader's fonts
    "svg.hashsalt": "diymodel",  # the same picture from the same data, byte for byte
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "font.size": 10,
}


def draw(documents: Sequence[Mapping[str, Any]], out: Path) -> None:
    """One column of panels for each result, a step above and the whole below; the columns share their axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    chinese = _chinese_fonts(out)
    with plt.rc_context({**STYLE, "font.sans-serif": ["DejaVu Sans", *chinese]}), warnings.catch_warnings():
        # An SVG's text is drawn where it is read, in the reader's fonts: that this machine lacks a glyph is no matter.
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from font")
        figure, axes = plt.subplots(
            len(PANELS),
            len(documents),
            figsize=(0.8 + 5.4 * len(documents), 8.0),
            sharex=True,
            sharey="row",
            squeeze=False,
            layout="constrained",
        )
        for column, document in enumerate(documents):
            for row, (quantity, panel) in enumerate(PANELS.items()):
                _draw_panel(axes[row][column], document, quantity, panel, bool(chinese))
        for row, panel in enumerate(PANELS.values()):
            for column, document in enumerate(documents):  # once the columns of a row agree on its height
                _draw_guides(axes[row][column], panel, document["rows"][0]["length"])
        for column, document in enumerate(documents):
            axes[0][column].set_title(_machine(document) + "\n" + axes[0][column].get_title(), fontsize=11)
        if not all(row[way]["total_generated"] for document in documents for row in document["rows"] for way in WAYS):
            note = "hollow: the sum of measured steps" + ("  空心：由实测的单步求和" if chinese else "")
            figure.supxlabel(note, fontsize=9, color=FAINT)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=160, metadata={"Date": None} if out.suffix == ".svg" else None)
        plt.close(figure)


def _draw_panel(
    axes: Axes, document: Mapping[str, Any], quantity: str, panel: Mapping[str, Any], chinese: bool
) -> None:
    rows = document["rows"]
    lengths = [row["length"] for row in rows]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.minorticks_off()
    axes.grid(color=FAINT, alpha=0.25, linewidth=0.6)
    second_line = f"\n{panel['zh']}" if chinese else ""
    axes.set_title(panel["title"] + second_line)
    axes.set_xlabel(f"positions {panel['x']}" + (f"  位置数 {panel['x']}" if chinese else ""))
    axes.set_ylabel("seconds" + ("  秒" if chinese else ""))
    for way, style in WAYS.items():
        seconds = [_median(row[way][quantity]) for row in rows]
        measured = [quantity != "total_seconds" or row[way]["total_generated"] for row in rows]
        axes.plot(lengths, seconds, color=style["color"], linewidth=1.2, zorder=3)
        for x, y, solid in zip(lengths, seconds, measured, strict=True):
            face = style["color"] if solid else PAPER
            axes.plot(x, y, style["marker"], color=style["color"], markerfacecolor=face, markersize=6, zorder=4)
        flops = document["fits"][way][quantity.replace("seconds", "flops")]["exponent"]
        words = (
            style["label"] + (f" {style['zh']}" if chinese else ""),
            f"FLOPs ∝ {panel['x']}{f'{flops:.2f}'.translate(SUPERSCRIPT)}",
        )
        for line, text in enumerate(words):  # one text a line: an SVG's reader sets its own widths
            axes.annotate(
                text,
                (lengths[-1], seconds[-1]),
                xytext=(9, 2 - 12 * line),
                textcoords="offset points",
                color=style["color"],
                fontsize=9,
                annotation_clip=False,
            )
    axes.margins(y=0.12)


def _draw_guides(axes: Axes, panel: Mapping[str, Any], start: int) -> None:
    """Dashed lines of whole slopes that leave one point of the upper left corner, which rising curves leave empty."""
    bottom, top = axes.get_ylim()
    reach = 4
    origin = top / reach ** panel["guides"][-1] / 1.3
    for slope in panel["guides"]:
        height = origin * reach**slope
        axes.plot((start, start * reach), (origin, height), "--", color=FAINT, linewidth=1.0, zorder=1)
        label = f"∝ {panel['x']}{('', '²', '³')[slope - 1]}"
        axes.annotate(
            label, (start * reach, height), xytext=(4, -3), textcoords="offset points", color=FAINT, fontsize=9
        )
    axes.set_ylim(bottom, top)


def _median(value: Any) -> float:
    return value["median"] if isinstance(value, Mapping) else value


def _machine(document: Mapping[str, Any]) -> str:
    config, machine = document["config"], document["machine"]
    where = machine["gpu"].split(",")[0] if machine["gpu"] else f"CPU ({machine['cpu']}), {machine['threads']} thread"
    return f"{where}, {document['dtype']}\nhidden {config['hidden_size']} × {config['num_layers']} layers\n"


def _chinese_fonts(out: Path) -> list[str]:
    """Fonts for the Chinese labels; none where the picture is made of pixels and this machine has no such font."""
    if out.suffix == ".svg":
        return list(CHINESE_FONTS)
    from matplotlib import font_manager

    here = {font.name for font in font_manager.fontManager.ttflist}
    return [name for name in CHINESE_FONTS if name in here]


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(document, dict) or document.get("benchmark") != "decode_scaling":
        raise ValueError(f"{path} is no result of benchmarks.decode_scaling")
    return document


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("results", type=Path, nargs="+", help="files that benchmarks.decode_scaling wrote: one or two")
    options.add_argument("--out", type=Path, required=True, help="picture to write: .svg, .png …")
    args = options.parse_args(argv)
    try:
        documents = [_read(path) for path in args.results]
    except (OSError, ValueError) as error:
        options.error(str(error))
    draw(documents, args.out)


if __name__ == "__main__":
    main()
