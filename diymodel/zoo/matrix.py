"""The kill matrix: which checks fail on which bug. It measures the harness, and teaches the diagnosis."""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from diymodel._files import replace_text
from diymodel._machine import describe_machine
from diymodel.verify.options import PROFILE, PROFILES
from diymodel.verify.registry import list_checks
from diymodel.verify.runner import verify_one
from diymodel.verify.samples import Sample, read_samples, sample_of, write_samples
from diymodel.verify.settings import Settings
from diymodel.verify.symptoms import observe
from diymodel.zoo.bug import Bug, list_bugs


def measure(bug: Bug, profile: str = PROFILE, seed: int = 0) -> Sample:
    """Run the checks on a bug, of the optional ones those that must kill it, and look for symptoms."""
    subject, settings = bug.subject(), Settings(PROFILES[profile], seed, shrink=False)
    wanted = replace(settings, optional=False)
    results = [verify_one(subject, check, settings if check.id in bug.kills else wanted) for check in list_checks()]
    return sample_of(results, dict(observe(subject, results)), bug.id, bug.slug, bug.base)


def extend(
    path: Path,
    profile: str = PROFILE,
    seed: int = 0,
    jobs: int = 1,
    on_sample: Callable[[Sample], object] | None = None,
) -> list[Sample]:
    """Measure the bugs that the file does not hold yet; it is written bug by bug, so that an interrupted run goes on.

    Samples of bugs that the zoo no longer has are dropped.

    Raises:
        ValueError: the file was measured with another profile or seed, or other checks.
    """
    bugs = {bug.id: bug for bug in list_bugs()}
    checks = [check.id for check in list_checks()]
    facts = {"profile": profile, "seed": seed, "torch": torch.__version__}
    samples = [sample for sample in _measured(path, facts, checks) if sample.bug in bugs]
    left = [bug for id, bug in bugs.items() if id not in {sample.bug for sample in samples}]
    head = {**facts, "machine": describe_machine(torch.device("cpu"))}
    for sample in _parallel(_measure, [(bug.id, profile, seed) for bug in left], jobs):
        samples = sorted([*samples, sample], key=lambda sample: (sample.slug, sample.base, sample.bug))
        replace_text(path, write_samples(samples, head))
        if on_sample is not None:
            on_sample(sample)
    return samples


def _measured(path: Path, facts: Mapping[str, Any], checks: Sequence[str]) -> list[Sample]:
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    content = json.loads(text)
    for name, value in {**facts, "checks": list(checks)}.items():
        if content[name] != value:
            raise ValueError(f"{path} was measured with another {name}: begin a new file, or delete it")
    return read_samples(text)


def _measure(arguments: tuple[str, str, int]) -> Sample:
    """In a process of the pool."""
    id, profile, seed = arguments
    torch.set_num_threads(1)
    return measure(next(bug for bug in list_bugs() if bug.id == id), profile, seed)


def _parallel(function: Callable[[Any], Any], work: Sequence[Any], jobs: int) -> Iterator[Any]:
    """The results as they come."""
    with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for future in concurrent.futures.as_completed([pool.submit(function, item) for item in work]):
            yield future.result()


@dataclass(frozen=True)
class Figures:
    """What a matrix says of the harness."""

    bugs: int
    classes: int
    killed: int
    not_killed: tuple[str, ...]  # ids of bugs
    single_killer: Mapping[str, str]  # bug that one check alone kills: lose that check and the bug is free
    idle: tuple[str, ...]  # checks that kill nothing


def figures(samples: Iterable[Sample]) -> Figures:
    """The figures of a matrix."""
    samples = list(samples)
    killed = [sample for sample in samples if sample.killers]
    killing = {id for sample in samples for id in sample.killers}
    return Figures(
        bugs=len(samples),
        classes=len({sample.slug for sample in samples}),
        killed=len(killed),
        not_killed=tuple(sample.bug for sample in samples if not sample.killers),
        single_killer={sample.bug: sample.killers[0] for sample in killed if len(sample.killers) == 1},
        idle=tuple(sorted({id for sample in samples for id in sample.verdicts} - killing)),
    )


def luck(path: Path, profile: str, seeds: int, jobs: int = 1) -> dict[str, list[int]]:
    """With which seeds each bug escaped the checks that must kill it; few trials can miss a bug.

    The file is written bug by bug, so that an interrupted run goes on. It holds a table a profile. The trials of the
    quick profile are the first of every other: where it killed a bug with a seed, all do.

    Args:
        path: the file, in JSON.
        profile: whose number of trials.
        seeds: how many, from 0 on.
        jobs: processes.

    Raises:
        ValueError: the file holds another number of seeds.
    """
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    table = content.setdefault(profile, {"seeds": seeds, "torch": torch.__version__, "escaped": {}})
    if table["seeds"] != seeds:
        raise ValueError(f"{path} holds {table['seeds']} seeds at {profile}, not {seeds}: begin a new file")
    table["machine"] = describe_machine(torch.device("cpu"))
    bugs = [bug.id for bug in list_bugs()]
    table["escaped"] = {id: table["escaped"][id] for id in bugs if id in table["escaped"]}
    quick = content.get("quick", table)
    escaped_quick = {} if profile == "quick" or quick["seeds"] < seeds else quick["escaped"]
    left = [
        (id, profile, [seed for seed in escaped_quick.get(id, range(seeds)) if seed < seeds])
        for id in bugs
        if id not in table["escaped"]
    ]
    for id, escaped in _parallel(_escapes, left, jobs):
        table["escaped"][id] = escaped
        replace_text(path, f"{json.dumps(content, indent=1)}\n")
    return dict(table["escaped"])


def _escapes(arguments: tuple[str, str, list[int]]) -> tuple[str, list[int]]:
    """In a process of the pool."""
    id, profile, seeds = arguments
    torch.set_num_threads(1)
    bug = next(bug for bug in list_bugs() if bug.id == id)
    checks = {check.id: check for check in list_checks()}
    subject = bug.subject()

    def killed(seed: int) -> bool:
        settings = Settings(PROFILES[profile], seed, shrink=False)
        return any(verify_one(subject, checks[id], settings).status == "failed" for id in bug.kills)

    return bug.id, [seed for seed in seeds if not killed(seed)]
