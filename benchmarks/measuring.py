"""Samples measured in parallel and kept in a file."""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from diymodel._files import replace_text
from diymodel._machine import describe_machine
from diymodel.verify.samples import Sample, write_samples

PROFILE = "quick"


def measured(
    doc: str | None, measure: Callable[[Any], Sample], items: Iterable[Any] | Mapping[str, Iterable[Any]]
) -> list[Sample]:
    """What a program that was told a file, and how many processes to use, measures of each item and writes there.

    Of several lists of items it is told one by name, or takes the first.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--jobs", type=int, default=1)
    if isinstance(items, Mapping):
        parser.add_argument("--list", choices=list(items), default=next(iter(items)))
    args = parser.parse_args()
    if isinstance(items, Mapping):
        items = items[args.list]
    with concurrent.futures.ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        samples = list(pool.map(measure, items))
    machine = describe_machine(torch.device("cpu"))
    facts = {"profile": PROFILE, "seed": 0, "torch": torch.__version__, "machine": machine}
    replace_text(args.file, write_samples(samples, facts))
    return samples
