"""A bug as a lesson: its lines, what one sees when training with it, the check that catches it, where it was seen."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from diymodel.config import DIYConfig
from diymodel.verify.adapters import LM
from diymodel.verify.catalogue import bug_class
from diymodel.verify.report import Lang
from diymodel.verify.subject import Subject
from diymodel.zoo.base import BASES
from diymodel.zoo.bug import Bug, list_bugs

TRAIN_STEPS = 100
_CONFIG = DIYConfig(
    vocab_size=16, num_layers=2, hidden_size=16, num_heads=4, num_kv_heads=2, max_seq_len=16, dropout=0.0
)
_WORDS: dict[Lang, dict[str, str]] = {
    "en": {
        "look": "Look for",
        "symptom": "What one sees",
        "diff": "The bug in {base}, a correct model otherwise",
        "promise": "Not a line is changed: the model promises what it does not keep ({claims}).",
        "also": "Also planted in {bases}: --base NAME",
        "train": "Training both for {steps} steps on one batch",
        "own": "loss it trains on",
        "true": "true next-token loss",
        "correct": "correct",
        "broken": "with the bug",
        "caught": "Caught by",
        "seen": "Seen in public code",
        "nowhere": "no public issue is known to us",
        "left_out": "Not in the zoo",
        "untrained": "it cannot be trained: {why}",
    },
    "zh": {
        "look": "该看哪里",
        "symptom": "现象",
        "diff": "{base} 本来是正确的模型，下面是它的 bug",
        "promise": "一行也没改：模型承诺了它做不到的事（{claims}）。",
        "also": "还种在 {bases} 里：--base NAME",
        "train": "两者都在同一批数据上训练 {steps} 步",
        "own": "训练所用的 loss",
        "true": "真正的下一个 token 的 loss",
        "correct": "正确",
        "broken": "有 bug",
        "caught": "由这些检查发现",
        "seen": "公开代码中的实例",
        "nowhere": "我们没有找到公开的 issue",
        "left_out": "zoo 里没有",
        "untrained": "无法训练：{why}",
    },
}


@dataclass(frozen=True)
class Curve:
    """A training: the loss that the model trains on, and the next-token loss of its logits, in nats."""

    first: float
    last: float
    true_first: float
    true_last: float


def bugs_of(slug: str) -> list[Bug]:
    """The bugs of a class.

    Raises:
        ValueError: there is no such class; the message names the nearest.
    """
    bug_class(slug)
    return [bug for bug in list_bugs() if bug.slug == slug]


def lesson(slug: str, base: str | None = None, lang: Lang = "en", steps: int = TRAIN_STEPS) -> str:
    """All that is known of a class of bugs, with one of its bugs as a diff.

    Args:
        slug: the class.
        base: the model to show it in; None: the first.
        lang: of the text.
        steps: optimizer steps of the two trainings; 0: none.

    Raises:
        ValueError: there is no such class, or it is not planted in ``base``.
    """
    words, about, bugs = _WORDS[lang], bug_class(slug), bugs_of(slug)
    text = about.text(lang)
    parts = [slug, text.what, "", f"{words['look']}: {text.look_for}", "", f"{words['symptom']}: {text.symptom}"]
    if bugs:
        bug = _on(bugs, base)
        parts += [
            "",
            f"{words['diff'].format(base=bug.base)}:",
            "",
            diff(bug) or words["promise"].format(claims=", ".join(bug.claims)),
        ]
        others = sorted({other.base for other in bugs} - {bug.base})
        parts += [words["also"].format(bases=", ".join(others))] if others else []
        parts += ["", *_training(bug, steps, words)] if steps else []
        caught = dict.fromkeys(id for other in bugs for id in other.kills)
        parts += ["", f"{words['caught']}: {', '.join(caught)}"]
    else:
        parts += ["", f"{words['left_out']}: {about.left_out}"]
    seen = [f"https://github.com/{where.replace('#', '/issues/')}" for where in about.seen]
    parts += ["", f"{words['seen']}: " + (", ".join(seen) or words["nowhere"])]
    return "\n".join(parts) + "\n"


def diff(bug: Bug) -> str:
    """The lines that the bug changes, as a unified diff of the base's file."""
    before, after = BASES[bug.base].source.splitlines(), bug.source.splitlines()
    name = f"zoo/bases/{bug.base}.py"
    return "\n".join(difflib.unified_diff(before, after, name, name, n=2, lineterm=""))


def train(subject: Subject, steps: int) -> Curve:
    """Train a tiny model of the subject on one batch, by its own loss where it has one.

    Raises:
        Exception: what the subject raises.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(_CONFIG.vocab_size, (4, 8), generator=generator)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        module = subject.build(_CONFIG).to(subject.convention.dtype).train()
        lm = LM(module, _CONFIG, subject.convention)
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        own, true = [], []
        for _ in range(steps):
            loss = true_loss = _true_loss(lm, ids)
            if "loss" not in subject.convention.missing:
                loss = lm.loss(ids, ids)
            true.append(float(true_loss.detach()))
            own.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return Curve(own[0], own[-1], true[0], true[-1])


def _true_loss(lm: LM, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(lm.logits(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def _on(bugs: list[Bug], base: str | None) -> Bug:
    if base is None:
        return bugs[0]
    found = next((bug for bug in bugs if bug.base == base), None)
    if found is None:
        bases = ", ".join(sorted({bug.base for bug in bugs}))
        raise ValueError(f"{bugs[0].slug} is not planted in base {base!r}: it is in {bases}")
    return found


def _training(bug: Bug, steps: int, words: dict[str, str]) -> list[str]:
    lines = [words["train"].format(steps=steps) + ":"]
    for name, subject in ((words["correct"], BASES[bug.base].subject()), (words["broken"], bug.subject())):
        try:
            curve = train(subject, steps)
        except Exception as error:  # what a broken model raises is for its reader to see
            lines.append(f"  {name}: {words['untrained'].format(why=error)}")
            continue
        lines.append(
            f"  {name}: {words['own']} {curve.first:.3f} → {curve.last:.3f}, "
            f"{words['true']} {curve.true_first:.3f} → {curve.true_last:.3f}"
        )
    return lines
