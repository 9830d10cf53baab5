"""One text a check, for a person: what it means, why it matters, likely causes, how to fix it, an example.

``<check id>.md`` holds the English text and, below the marker line, the Chinese one.
"""

from __future__ import annotations

import re
from importlib import resources

from diymodel.verify.catalogue import bug_class
from diymodel.verify.registry import Check, list_checks, nearest
from diymodel.verify.report import Diagnosis, Lang
from diymodel.verify.symptoms import list_symptoms

_MARKER = "\n<!-- zh -->\n"
_SUFFIX = ".md"
_CHECKS_NAMED = 4  # in the explanation of a diagnosis


def explain(check_id: str, lang: Lang = "en") -> str:
    """The text on a check, as Markdown.

    Raises:
        ValueError: there is no such check; the message names the nearest.
    """
    if check_id not in explained():
        raise ValueError(f"no check is called {check_id!r}{nearest(check_id, list_checks())}")
    text = resources.files(__name__).joinpath(check_id + _SUFFIX).read_text(encoding="utf-8")
    english, _, chinese = text.partition(_MARKER)
    return (chinese if lang == "zh" else english).strip() + "\n"


def explained() -> list[str]:
    """The ids of the checks that have a text."""
    names = (entry.name for entry in resources.files(__name__).iterdir())
    return sorted(name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX))


def title(check: Check, lang: Lang = "en") -> str:
    """The check's title; in Chinese the heading of its text."""
    if lang == "en":
        return check.title
    return explain(check.id, lang).partition("\n")[0].removeprefix("# ")


def cause(slug: str, check: Check, lang: Lang = "en") -> str:
    """What the check's text says of a bug, ``slug: sentence``; where it does not name it, what the catalogue says."""
    found = re.search(rf"^- `({re.escape(slug)})`(.*)$", explain(check.id, lang), re.MULTILINE)
    if found:
        return f"{found[1]}{found[2]}"
    try:
        what = bug_class(slug).text(lang).what
    except ValueError:  # a check of one's own may name what the catalogue does not know
        return slug
    return f"{slug}：{what}" if lang == "zh" else f"{slug}: {what}"


def explain_diagnosis(found: Diagnosis, lang: Lang = "en") -> str:
    """What the bug is, and what was seen that speaks for it."""
    what, zh = bug_class(found.bug).text(lang).what, lang == "zh"
    shown = [list_symptoms()[fact] for fact in found.evidence if fact in list_symptoms()]
    said = [symptom.yes_zh if zh else symptom.yes for symptom in shown]
    failed = [fact for fact in found.evidence if fact not in list_symptoms()]
    if failed:
        more = f" +{len(failed) - _CHECKS_NAMED}" if len(failed) > _CHECKS_NAMED else ""
        said.append(("失败的检查：" if zh else "failed: ") + ", ".join(failed[:_CHECKS_NAMED]) + more)
    return f"{what}依据：{'；'.join(said)}。" if zh else f"{what} Evidence: {'; '.join(said)}."
