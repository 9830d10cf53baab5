"""What ``diymodel bench decode`` prints: a table of rows as they are done, then exponents beside the theory."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from diymodel.bench.decode import WAYS
from diymodel.bench.figures import seconds_text

_COLUMNS = f"{'step':>8} {'FLOPs':>8} {'MiB':>7} {'total':>9} {'FLOPs':>8} {'tokens/s':>8}"
_MAIN = ("no_cache", "cached")


def print_head() -> None:
    """The table's two header lines."""
    print(f"{'':>6} | {WAYS['no_cache']:^{len(_COLUMNS)}} | {WAYS['cached']:^{len(_COLUMNS)}} |")
    print(f"{'length':>6} | {_COLUMNS} | {_COLUMNS} | {'KV MiB':>8}")


def print_progress(text: str) -> None:
    """What comes next, on a terminal; a pipe gets the table alone."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text} …", end="", file=sys.stderr, flush=True)


def print_row(row: Mapping[str, Any]) -> None:
    """One length, both ways; MiB is what a step allocates at most."""
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    cells = [f"{row['length']:>6}"]
    for way in _MAIN:
        r = row.get(way)
        if r is None:
            cells.append(f"{'—':^{len(_COLUMNS)}}")
            continue
        mark = " " if r["total_generated"] else "*"
        cells.append(
            f"{seconds_text(r['step_seconds'].median):>8} {r['step_flops']:>8.2g} {_mib(r['step_peak_bytes']):>7} "
            f"{seconds_text(r['total_seconds']):>8}{mark} {r['total_flops']:>8.2g} {r['tokens_per_second']:>8.3g}"
        )
    cells.append(f"{_mib(row.get('cached', {}).get('kv_bytes')):>8}")
    print(" | ".join(cells), flush=True)


def print_rest(result: Mapping[str, Any]) -> None:
    """All below the table: other caches, exponents, verdict."""
    rows = result["rows"]
    if not all(row[way]["total_generated"] for row in rows for way in _MAIN if way in row):
        print("* not generated: the sum of the measured steps")
    _print_others(rows)
    _print_fits(result)
    for way, reason in result["skipped"].items():
        print(f"{WAYS[way]}: skipped, {reason}")
    print(f"cache: {result['cache']['verdict']}: {result['cache']['reason']}")
    if result["attention_overtakes_at"] is not None:
        positions = result["attention_overtakes_at"]
        theory = result["attention_overtakes_in_theory"]
        print(
            f"from {positions:.0f} positions on, a cached step spends more on attention than on products with weights"
            + (
                f" (theory: 6 × hidden_size, and for the head vocab_size / (2 × num_layers): {theory:.0f})"
                if theory
                else ""
            )
        )


def _print_others(rows: Any) -> None:
    """Every other way's step by ours, in turn; the floor is below 1."""
    ways = [way for way in WAYS if f"{way}/cached" in rows[0]["ratios"] and way != "no_cache"]
    if not ways:
        return
    print("\nseconds of a step by those of the step with cache, in turn: median [quartiles]")
    width = max(len(WAYS[way]) for way in ways)
    lengths = "".join(f"{row['length']:>18}" for row in rows)
    print(f"  {'length':<{width}} {lengths}")
    for way in ways:
        cells = "".join(f"{row['ratios'][f'{way}/cached'].text():>18}" for row in rows)
        print(f"  {WAYS[way]:<{width}} {cells}")
    for way in ("cached", *ways):
        shares = [row[way].get("share_of_bandwidth_bound") for row in rows]
        if shares[-1] is not None:
            print(f"  {WAYS[way]}: {shares[0]:.2f} to {shares[-1]:.2f} of the memory-bandwidth bound")


def _print_fits(result: Mapping[str, Any]) -> None:
    print("\nexponents over these lengths [slope between each two]")
    for way, found in result["fits"].items():
        for quantity, fit in found.items():
            if way not in _MAIN and quantity not in ("step_flops", "step_seconds"):
                continue
            local = " ".join(f"{slope:.2f}" for slope in fit.local)
            kind = quantity.removeprefix("total_").removesuffix("_flops")
            theory = result["theory"].get(way, {}).get(kind) if quantity.startswith("total") else None
            beside = f"  theory {theory:.2f}" if theory else ""
            print(f"  {WAYS[way]:<28} {quantity.replace('_', ' '):<22} {fit.exponent:5.2f}  [{local}]{beside}")


def _mib(size: int | None) -> str:
    return "—" if size is None else f"{size / 2**20:.3g}"
