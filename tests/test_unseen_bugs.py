"""The models and bugs of benchmarks/unseen, and the figures that benchmarks/README.md gives of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks.unseen import BASES, SECOND_BASES, THIRD_BASES, source_of, subject_of
from benchmarks.unseen_bugs import LISTS, Named, figures, names, read
from diymodel.config import DIYConfig
from diymodel.verify import check_causal_lm
from diymodel.verify.catalogue import bug_class

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_every_bug_has_one_place_and_a_class_and_is_python() -> None:
    every = [bug for bugs in LISTS.values() for bug in bugs]
    assert len({bug.id for bug in every}) == len(every)
    assert all(len(names(which)) >= 80 for which in LISTS)
    for bug in every:
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


@pytest.mark.parametrize("base", THIRD_BASES)
def test_the_correct_models_of_the_third_list_build(base: str) -> None:
    config = DIYConfig(vocab_size=11, num_layers=2, hidden_size=8, num_heads=2, num_kv_heads=1, max_seq_len=6)
    assert "grad_fn" in repr(subject_of(base).build(config)(torch.arange(6)[None]))


@pytest.mark.parametrize("base", SECOND_BASES)
def test_the_correct_models_of_the_second_list_say_nothing_of_themselves(base: str) -> None:
    subject = subject_of(base)
    assert not subject.claims
    assert not subject.declared
    assert subject.convention.ids


def test_positions_that_address_a_cache_on_the_module_are_not_left_out() -> None:
    report = check_causal_lm(subject_of("multiquery_static"), profile="quick", only=["padding.left_with_cache"])
    assert report.verdict == "passed", report.to_text()


def measured(which: str) -> tuple[Named, str]:
    """The figures of a list, and what benchmarks/README.md says of them."""
    name = {"first": "unseen-bugs"}.get(which, f"unseen-bugs-{which}")
    samples = read((BENCHMARKS / f"results/{name}.json").read_text("utf-8"))
    listed = [(bug.id, bug.slug, bug.file) for bug in LISTS[which]]
    assert [(sample.bug, sample.slug, sample.base) for sample in samples] == listed
    found, models = figures(samples), len({bug.file for bug in LISTS[which]})
    return found, (
        f"of {found.bugs} bugs of {found.classes} classes in {models} models {found.killed} are noticed; "
        f"{found.first} are named first and {found.three} among three ([{name}.json]"
    )


@pytest.mark.parametrize("which", LISTS)
def test_the_figures_are_those_measured(which: str) -> None:
    readme = re.sub(r"\s+", " ", (BENCHMARKS / "README.md").read_text("utf-8"))
    assert measured(which)[1] in readme


def test_the_readmes_give_the_figures_of_all_lists_together() -> None:
    found = [measured(which)[0] for which in LISTS]
    bugs, killed, first, three = (
        sum(each) for each in zip(*((f.bugs, f.killed, f.first, f.three) for f in found), strict=True)
    )
    english, chinese = (
        re.sub(r"\s+", " ", (BENCHMARKS.parent / name).read_text("utf-8")) for name in ("README.md", "README.zh-CN.md")
    )
    assert f"{bugs} others: the quick profile notices {killed}, of which {first} are named first and {three}" in english
    assert f"共 {bugs} 个 bug：quick 强度能发现 {killed} 个，其中 {first} 个排第一，{three} 个在前三" in chinese
