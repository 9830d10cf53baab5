"""The kill matrix as a picture and as a page: classes of bugs by checks, in light and dark."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from html import escape

from diymodel.verify.catalogue import AREAS, bug_class
from diymodel.verify.diagnose import leave_one_base_out
from diymodel.verify.samples import Sample
from diymodel.zoo.matrix import figures

_CELL = 9  # pixels
_LEFT, _TOP = 210, 215  # room for the labels
_GAP = 6  # between areas
_STYLE = """
svg { font: 8.5px ui-sans-serif, system-ui, sans-serif; }
text { fill: #30363d; } .head { font-weight: 700; font-size: 12px; } .soft { fill: #6a737d; }
.row { fill: #8b949e; opacity: .1; } .cell { fill: #b3261e; } .only { fill: #c77700; }
@media (prefers-color-scheme: dark) { text { fill: #d0d7de; } .soft { fill: #8b949e; } .cell { fill: #ff7b72; }
  .only { fill: #e9b44c; } }
"""
_PAGE_STYLE = """
:root { color-scheme: light dark; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 75rem; line-height: 1.5;
  font-family: system-ui, "Segoe UI", Roboto, "PingFang SC", "Noto Sans CJK SC", sans-serif; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
figure { margin: 1rem 0; overflow-x: auto; } svg { max-width: none; }
code { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .9em; }
table { border-collapse: collapse; font-size: .85rem; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .25rem .8rem .25rem 0; border-top: 1px solid #8b949e55; }
"""


def picture(samples: Sequence[Sample]) -> str:
    """An SVG of the matrix: a row a class, a column a check, the fuller the more bugs it kills."""
    totals = Counter(sample.slug for sample in samples)
    kills = Counter((sample.slug, id) for sample in samples for id in sample.killers)
    alone = {(sample.slug, sample.killers[0]) for sample in samples if len(sample.killers) == 1}
    columns = _positions(list(samples[0].verdicts), lambda id: id.partition(".")[0], _LEFT)
    slugs = sorted(totals, key=lambda slug: (AREAS.index(bug_class(slug).area), slug))
    rows = _positions(slugs, lambda slug: bug_class(slug).area, _TOP)
    end, height = max(columns.values()) + _CELL, max(rows.values()) + 3 * _CELL
    width = end + _TOP // 2  # the last names lean beyond their columns
    said = figures(samples)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        f"<style>{_STYLE}</style>",
        f'<text class="head" x="4" y="16">{said.killed} of {said.bugs} bugs killed</text>',
        f'<text class="soft" x="4" y="32">{said.classes} classes × {len(columns)} checks</text>',
        '<text class="soft" x="4" y="46">the fuller a cell, the more of a class a check kills</text>',
        f'<rect class="only" x="4" y="54" width="{_CELL}" height="{_CELL}"/>'
        f'<text class="soft" x="{8 + _CELL}" y="62">a bug that this check alone kills</text>',
    ]
    for id, x in columns.items():
        place = f"translate({x + _CELL - 2} {_TOP - 4}) rotate(-60)"
        parts.append(f'<text transform="{place}">{escape(id)}</text>')
    for slug, y in rows.items():
        parts.append(f'<rect class="row" x="{_LEFT}" y="{y}" width="{end - _LEFT}" height="{_CELL - 1}"/>')
        label = f"{escape(slug)} <tspan class='soft'>{totals[slug]}</tspan>"
        parts.append(f'<text text-anchor="end" x="{_LEFT - 4}" y="{y + 7}">{label}</text>')
        for id, x in columns.items():
            if killed := kills[slug, id]:
                kind = "only" if (slug, id) in alone else "cell"
                share = killed / totals[slug]
                parts.append(
                    f'<rect class="{kind}" x="{x}" y="{y}" width="{_CELL - 1}" height="{_CELL - 1}" '
                    f'opacity="{0.25 + 0.75 * share:.2f}"><title>{escape(slug)} · {escape(id)}: {killed} of '
                    f"{totals[slug]}</title></rect>"
                )
    return "\n".join([*parts, "</svg>"]) + "\n"


def page(samples: Sequence[Sample]) -> str:
    """A self-contained HTML page: the picture, the figures, and every bug with what kills it."""
    said = figures(samples)
    rows = "\n".join(
        f"<tr><td><code>{escape(sample.slug)}</code></td><td>{escape(sample.base)}</td><td>"
        + (", ".join(f"<code>{escape(id)}</code>" for id in sample.killers) or "—")
        + "</td></tr>"
        for sample in samples
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>The kill matrix of diymodel</title><style>{_PAGE_STYLE}</style></head><body>\n"
        f"<h1>The kill matrix: {said.killed} of {said.bugs} bugs killed</h1>\n"
        f"{''.join(f'<p>{escape(line)}</p>' for line in figure_lines(samples))}\n"
        f"<figure>{picture(samples)}</figure>\n"
        "<h2>Every bug, and the checks that kill it</h2>\n"
        f"<table><tr><th>bug</th><th>base</th><th>killed by</th></tr>\n{rows}\n</table></body></html>\n"
    )


def text(samples: Sequence[Sample]) -> str:
    """The matrix for a terminal: a line a class, with the checks that kill it, the most effective first."""
    lines = []
    for slug in dict.fromkeys(sample.slug for sample in samples):
        of_class = [sample for sample in samples if sample.slug == slug]
        kills = Counter(id for sample in of_class for id in sample.killers)
        killed = sum(bool(sample.killers) for sample in of_class)
        said = ", ".join(f"{id} {count}" if len(of_class) > 1 else id for id, count in kills.most_common(4))
        more = f", and {len(kills) - 4} more" if len(kills) > 4 else ""
        lines.append(f"{slug:<36} {killed}/{len(of_class)}  {said}{more}")
    return "\n".join([*lines, "", *figure_lines(samples)]) + "\n"


def figure_lines(samples: Sequence[Sample]) -> list[str]:
    """The figures in words."""
    said, named = figures(samples), leave_one_base_out(samples)
    lines = [f"{said.killed} of {said.bugs} bugs of {said.classes} classes are killed."]
    if named.bugs:
        lines.append(
            f"Diagnosed in a model that the diagnosis has not learned from (leave one base out): {named.first} of "
            f"{named.bugs} come first ({named.first / named.bugs:.1%}), {named.among_three} among the first three "
            f"({named.among_three / named.bugs:.1%})."
        )
    if said.not_killed:
        lines.append(f"Not killed: {', '.join(said.not_killed)}.")
    alone = Counter(said.single_killer.values())
    lines.append(
        f"{len(said.single_killer)} bugs have a single killer: lose that check, and the bug is free. "
        f"By check: {', '.join(f'{id} {count}' for id, count in alone.most_common())}."
    )
    if said.idle:
        lines.append(f"Checks that kill nothing: {', '.join(said.idle)}.")
    return lines


def _positions(names: Iterable[str], group_of: Callable[[str], str], start: int) -> dict[str, int]:
    """Where each row or column begins, with a gap before a new group."""
    places: dict[str, int] = {}
    place, group = start, None
    for name in names:
        if group not in (None, group_of(name)):
            place += _GAP
        group = group_of(name)
        places[name] = place
        place += _CELL
    return places
