"""Draw what ``diymodel bench decode`` measured: a step and a whole generation, with and without cache, log-log.

Points are measured seconds; a hollow point is the sum of measured steps, where generating so many tokens would have
taken too long. Dashed lines are slopes for the eye to compare with; where they stand means nothing.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The ground is transparent: each of these keeps a contrast of at least 3 : 1 to white and to GitHub's dark #0d1117.
INK, FAINT = "#767d86", "#838a93"
WAYS = {  # colours apart in hue and in lightness, and a marker each, so that neither is needed alone
    "no_cache": {"color": "#d9480f", "marker": "s", "en": "without cache", "zh": "无缓存"},
    "concatenated": {"color": "#9c6ade", "marker": "^", "en": "torch.cat cache", "zh": "torch.cat 缓存"},
    "masked": {"color": "#2b8a3e", "marker": "D", "en": "masked buffer", "zh": "掩码缓冲区"},
    "masked_compiled": {"color": "#0c8599", "marker": "v", "en": "masked, compiled", "zh": "掩码缓冲区，编译"},
    "masked_graph": {"color": "#b07d00", "marker": "P", "en": "masked, CUDA graph", "zh": "掩码缓冲区，CUDA graph"},
    "masked_compiled_graph": {
        "color": "#c2558a",
        "marker": "X",
        "en": "compiled, CUDA graph",
        "zh": "编译，CUDA graph",
    },
    "cached": {"color": "#2f7fd6", "marker": "o", "en": "with cache", "zh": "有缓存"},
}
PANELS = {
    "step_seconds": {"en": "one step at t positions", "zh": "第 t 个位置的一步", "x": "t", "guides": (1, 2)},
    "total_seconds": {"en": "generating T tokens", "zh": "生成 T 个词元", "x": "T", "guides": (1, 2, 3)},
}
WORDS = {
    "positions": {"en": "positions", "zh": "位置数"},
    "tokens": {"en": "tokens", "zh": "词元数"},
    "seconds": {"en": "seconds", "zh": "秒"},
    "layers": {"en": "layers", "zh": "层"},
    "thread": {"en": "thread", "zh": "线程"},
    "hollow": {"en": "hollow: the sum of measured steps", "zh": "空心：由实测的单步求和"},
}
MAIN = ("no_cache", "cached")
PANEL_POINTS = 215.0  # height of a panel, roughly
LINE_POINTS = 11.0
SUPERSCRIPT = str.maketrans("0123456789.", "⁰¹²³⁴⁵⁶⁷⁸⁹·")
CHINESE_FONTS = ("Noto Sans CJK SC", "Source Han Sans SC", "PingFang SC", "Microsoft YaHei", "WenQuanYi Micro Hei")
CHINESE_FONTS_OF_OTHERS = ("Noto Sans CJK JP", "Noto Sans CJK TC")  # the same glyphs in one font file
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small, searchable, and in the reader's fonts
    "svg.hashsalt": "diymodel",  # the same picture from the same data, byte for byte
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "font.size": 10,
}


def draw(documents: Sequence[Mapping[str, Any]], out: Path, lang: str = "en") -> None:
    """One column of panels for each result, a step above and the whole below; the columns share their axes.

    Args:
        lang: of the labels, en or zh.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: Chinese labels are to become pixels, and no font here has them.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    fonts = ["DejaVu Sans", *(_chinese_fonts(out) if lang == "zh" else ())]
    with mpl.rc_context({**STYLE, "font.family": fonts}), warnings.catch_warnings():
        # An SVG's text is drawn where it is read, in the reader's fonts: that this machine lacks a glyph is no matter.
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from font")
        logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
        figure = Figure(figsize=(1.6 + 5.4 * len(documents), 8.4), layout="constrained")
        axes = figure.subplots(len(PANELS), len(documents), sharex=True, sharey="row", squeeze=False)
        for column, document in enumerate(documents):
            for row, (quantity, panel) in enumerate(PANELS.items()):
                _draw_panel(axes[row][column], document, quantity, panel, lang)
        for row, panel in enumerate(PANELS.values()):
            for column, document in enumerate(documents):  # once the columns of a row agree on its height
                _draw_guides(axes[row][column], panel, document["lengths"][0])
        for column, document in enumerate(documents):
            axes[0][column].set_title(_machine(document, lang) + "\n" + axes[0][column].get_title(), fontsize=11)
        if any(not row[way]["total_generated"] for d in documents for row in d["rows"] for way in _ways(d)):
            figure.supxlabel(WORDS["hollow"][lang], fontsize=9, color=FAINT)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=160, metadata={"Date": None} if out.suffix == ".svg" else None)


def _ways(document: Mapping[str, Any]) -> list[str]:
    return [way for way in WAYS if way in document["rows"][0]]


def _draw_panel(axes: Axes, document: Mapping[str, Any], quantity: str, panel: Mapping[str, Any], lang: str) -> None:
    rows, lengths = document["rows"], document["lengths"]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.minorticks_off()
    axes.grid(color=FAINT, alpha=0.25, linewidth=0.6)
    axes.set_title(panel[lang])
    unit = WORDS["positions" if panel["x"] == "t" else "tokens"][lang]
    axes.set_xlabel(f"{unit} {panel['x']}")
    axes.set_ylabel(WORDS["seconds"][lang])
    ends = {}
    for way in _ways(document):
        style = WAYS[way]
        seconds = [_median(row[way][quantity]) for row in rows]
        measured = [quantity != "total_seconds" or row[way]["total_generated"] for row in rows]
        axes.plot(lengths, seconds, color=style["color"], linewidth=1.2, zorder=3)
        for x, y, solid in zip(lengths, seconds, measured, strict=True):
            face = style["color"] if solid else "none"
            axes.plot(x, y, style["marker"], color=style["color"], markerfacecolor=face, markersize=5.5, zorder=4)
        ends[way] = seconds[-1]
    axes.margins(y=0.12)
    _label_ends(axes, document, quantity, panel, lang, ends)


def _label_ends(
    axes: Axes,
    document: Mapping[str, Any],
    quantity: str,
    panel: Mapping[str, Any],
    lang: str,
    ends: Mapping[str, float],
) -> None:
    """Names at the right of the curves, moved apart where they would overlap."""
    bottom, top = axes.get_ylim()
    points = {way: PANEL_POINTS * _log_share(value, bottom, top) for way, value in ends.items()}
    words = {way: _words(document, way, quantity, panel, lang) for way in ends}
    for way, height in _apart(points, {way: LINE_POINTS * len(lines) + 2 for way, lines in words.items()}).items():
        for line, text in enumerate(words[way]):  # one text a line: an SVG's reader sets its own widths
            axes.annotate(
                text,
                (document["lengths"][-1], ends[way]),
                xytext=(9, height - points[way] + 2 - LINE_POINTS * line),
                textcoords="offset points",
                color=WAYS[way]["color"],
                fontsize=9,
                annotation_clip=False,
            )


def _words(document: Mapping[str, Any], way: str, quantity: str, panel: Mapping[str, Any], lang: str) -> list[str]:
    """What stands beside a curve: its name, and for the two that matter how their FLOPs grow."""
    fit = document["fits"].get(way, {}).get(quantity.replace("seconds", "flops"))
    if way not in MAIN or fit is None:
        return [WAYS[way][lang]]
    exponent = f"{fit['exponent']:.2f}".translate(SUPERSCRIPT)
    return [WAYS[way][lang], f"FLOPs ∝ {panel['x']}{exponent}"]


def _apart(heights: Mapping[str, float], needed: Mapping[str, float]) -> dict[str, float]:
    """Heights in points, from the top down, so that none comes nearer to the next than it needs, nor below 0."""
    placed: dict[str, float] = {}
    at = float("inf")
    for way in sorted(heights, key=lambda way: -heights[way]):
        placed[way] = at = min(heights[way], at)
        at -= needed[way]
    floor = 0.0
    for way in reversed(placed):
        placed[way] = max(placed[way], floor + needed[way] - LINE_POINTS)
        floor = placed[way] + LINE_POINTS
    return placed


def _log_share(value: float, bottom: float, top: float) -> float:
    return math.log(value / bottom) / math.log(top / bottom)


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
    median: float = value["median"] if isinstance(value, Mapping) else value
    return median


def _machine(document: Mapping[str, Any], lang: str) -> str:
    config, machine = document["config"], document["machine"]
    threads = f"{machine['threads']} {WORDS['thread'][lang]}"
    where = machine["gpu"].split(",")[0] if machine["gpu"] else f"CPU ({machine['cpu']}), {threads}"
    own = document["subject"] == "diymodel"
    size = f"hidden {config['hidden_size']} × {config['num_layers']} {WORDS['layers'][lang]}"
    return f"{where}, {document['dtype']}\n{'' if own else document['subject'] + ', '}{size}\n"


def _chinese_fonts(out: Path) -> Sequence[str]:
    """Fonts for the Chinese labels.

    Raises:
        ValueError: the picture is made of pixels, and this machine has no such font.
    """
    if out.suffix == ".svg":
        return CHINESE_FONTS
    from matplotlib import font_manager

    here = {font.name for font in font_manager.fontManager.ttflist}
    found = [name for name in (*CHINESE_FONTS, *CHINESE_FONTS_OF_OTHERS) if name in here]
    if not found:
        raise ValueError(
            f"no font here has Chinese characters, which {out.name} would be drawn with: write an .svg, or install one "
            f"of {', '.join(CHINESE_FONTS)}"
        )
    return found
