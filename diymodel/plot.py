"""The picture of a run: loss against step, training and held-out."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from diymodel._files import replace_file

# On a transparent ground these keep a contrast of at least 3 : 1 both to white and to a dark page.
INK = "#7d7d7d"
TRAINING = "#3f83d8"
HELD_OUT = "#d4731c"


def draw_loss(metrics: str | Path, picture: str | Path) -> None:
    """Draw the losses in a ``metrics.jsonl`` as an SVG that can be read on a light and on a dark page.

    Args:
        metrics: the file that :func:`diymodel.train.train` writes.
        picture: where the SVG goes; replaced if it is there.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    lines = [json.loads(line) for line in Path(metrics).read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "held_out_loss" in line]

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes: Any = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)", facecolor="none")
    losses = [line["loss"] for line in steps]
    axes.plot([line["step"] for line in steps], losses, color=TRAINING, lw=1, label="training")
    held_out = [line["held_out_loss"] for line in evaluations]
    axes.plot([line["step"] for line in evaluations], held_out, color=HELD_OUT, marker="o", ms=4, label="held out")
    if evaluations:
        axes.set_title(f"held out: {evaluations[-1]['bits_per_byte']:.3f} bits per byte", color=INK)
    axes.legend(frameon=False, labelcolor=INK)
    axes.tick_params(colors=INK)
    for part in (axes.xaxis.label, axes.yaxis.label):
        part.set_color(INK)
    for spine in ("top", "right"):
        axes.spines[spine].set_visible(False)
    for spine in ("bottom", "left"):
        axes.spines[spine].set_color(INK)

    svg = io.BytesIO()
    figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    replace_file(Path(picture), lambda file: file.write(svg.getvalue()))
