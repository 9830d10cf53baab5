"""The models and bugs of benchmarks/unseen, and the figures that benchmarks/README.md gives of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks.unseen import BASES, source_of, subject_of
from benchmarks.unseen.bugs import BUGS
from benchmarks.unseen_bugs import figures, names, read
from diymodel.config import DIYConfig
from diymodel.verify.catalogue import bug_class

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_every_bug_has_one_place_and_a_class_and_is_python() -> None:
    assert len(set(names())) == len(BUGS) >= 80
    for bug in BUGS:
        assert bug_class(bug.slug).slug == bug.slug
        assert bug.source != source_of(bug.file), bug.id
        compile(bug.source, bug.id, "exec")


@pytest.mark.parametrize("base", BASES)
def test_the_correct_models_build(base: str) -> None:
    config = DIYConfig(vocab_size=11, num_layers=2, hidden_size=8, num_heads=2, num_kv_heads=1, max_seq_len=6)
    module = subject_of(base).build(config)
    ids = torch.arange(6)[None]
    labels = {"nano_like": {"targets": ids}}.get(base, {"labels": ids})
    assert "grad_fn" in repr(module(ids, **labels))


def test_the_figures_are_those_measured() -> None:
    samples = read((BENCHMARKS / "results/unseen-bugs.json").read_text("utf-8"))
    assert [(sample.bug, sample.slug, sample.base) for sample in samples] == [(b.id, b.slug, b.file) for b in BUGS]
    found = figures(samples)
    readme = re.sub(r"\s+", " ", (BENCHMARKS / "README.md").read_text("utf-8"))
    assert f"of {found.bugs} bugs of {found.classes} classes in {len(BASES)} models" in readme
    assert f"{found.killed} are noticed; {found.first} are named first and {found.three} among three" in readme
