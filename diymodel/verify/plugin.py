"""``pytest --lm SUBJECT``: every check a test, chosen by ``-k ID``. Part of every pytest run, it imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from diymodel.verify.options import DTYPES, PROFILE, PROFILES

if TYPE_CHECKING:
    from diymodel.verify.registry import Check
    from diymodel.verify.report import Result, Status
    from diymodel.verify.settings import Settings
    from diymodel.verify.subject import Factory, Subject

_SUBJECT: pytest.StashKey[Subject] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("diymodel", "verify a causal language model")
    group.addoption(
        "--lm", metavar="SUBJECT", help="what diymodel verify takes; 'diymodel' is ours; -k ID runs one check"
    )
    group.addoption("--lm-profile", choices=PROFILES, default=PROFILE)
    group.addoption("--lm-seed", type=int, default=0, help="the same seed gives the same verdicts (default: 0)")
    group.addoption("--lm-device", default="cpu", help="where the modules are built (default: cpu)")
    group.addoption("--lm-dtype", choices=DTYPES, help="of the modules (default: float64, or what the subject runs in)")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--lm") and config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args[:] = []  # SUBJECT alone, unless files were named as well


def pytest_report_header(config: pytest.Config) -> str | None:
    if not config.getoption("--lm"):
        return None
    import torch

    from diymodel.verify.trial import dtype_name

    subject = _subject(config)
    dtype = config.getoption("--lm-dtype") or dtype_name(subject.convention.dtype)
    options = ", ".join(f"{name} {config.getoption(f'--lm-{name}')}" for name in ("device", "profile", "seed"))
    return f"lm: {subject.name}, torch {torch.__version__}, dtype {dtype}, {options}"


def _subject(config: pytest.Config) -> Subject:
    """What --lm names, found once a run, for settings that can be."""
    from diymodel.verify.failure import SubjectError
    from diymodel.verify.subject import resolve

    if _SUBJECT not in config.stash:
        _settings(config)
        try:
            config.stash[_SUBJECT] = resolve(config.getoption("--lm"))
            _ = config.stash[_SUBJECT].convention
        except SubjectError as error:
            raise pytest.UsageError(f"--lm {config.getoption('--lm')}: {error}") from None
    return config.stash[_SUBJECT]


def _settings(config: pytest.Config, optional: bool = False) -> Settings:
    """What the other options say."""
    from diymodel.verify.settings import Settings

    options = {name: config.getoption(f"--lm-{name}") for name in ("profile", "seed", "device", "dtype")}
    try:
        return Settings.of(**options, optional=optional)
    except ValueError as error:  # of the device: argparse has refused all else
        raise pytest.UsageError(f"--lm-device: {error}") from None


@pytest.hookimpl(tryfirst=True)  # before -k and -m choose among the items
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--lm"):
        checks = ChecksCollector.from_parent(session, name="lm", nodeid="lm")
        items[:0] = checks.collect()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if isinstance(item, CheckItem) and call.when == "call" and item.result is not None:
        failure = item.result.failure  # under xdist the report, and what hangs on it, comes from another process
        report.lm = [item.check.id, item.result.status, failure and failure.values]  # type: ignore[attr-defined]
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    reports = (report for kind in terminalreporter.stats.values() for report in kind)
    verdicts = [report.lm for report in reports if hasattr(report, "lm")]
    if any(status in ("failed", "error") for _, status, _ in verdicts):
        heading, *lines = _diagnosis(_subject(config), verdicts, config.getoption("--lm-device"))
        terminalreporter.section(heading)
        for line in lines:
            terminalreporter.write_line(line)


def _diagnosis(
    subject: Subject, verdicts: Iterable[tuple[str, Status, dict[str, Any] | None]], device: str
) -> list[str]:
    """What the failures look like, from the check, the verdict and the failing values of each test."""
    from diymodel.verify.examination import diagnose
    from diymodel.verify.registry import list_checks
    from diymodel.verify.report import Failure, Report, Result
    from diymodel.verify.text import diagnosis_lines

    checks = {check.id: check for check in list_checks()}
    report = Report(subject.name, device=device)
    for id, status, values in verdicts:
        failure = None if values is None else Failure("", checks[id].causes, values.get("config", {}), values, "")
        report.results.append(Result(checks[id], status, failure=failure))
    diagnose(report, subject)
    return diagnosis_lines(report)


class ChecksCollector(pytest.Collector):
    """The checks on one subject."""

    def collect(self) -> Iterator[CheckItem]:
        from diymodel.verify.registry import list_checks

        for check in list_checks():
            yield CheckItem.from_parent(self, name=check.id, check=check, subject=_subject(self.config))


class CheckItem(pytest.Item):
    """One check as a test."""

    def __init__(self, *, check: Check, subject: Subject, **node: Any) -> None:
        super().__init__(**node)
        self.check = check
        self.subject = subject
        self.result: Result | None = None

    def runtest(self) -> None:
        from diymodel.verify.runner import verify_one

        named = self.check.id.partition(".")[0] in self.config.getoption("keyword")
        self.result = verify_one(self.subject, self.check, _settings(self.config, optional=named))
        raise_for(self.result)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        if isinstance(excinfo.value, CheckFailed):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Any, int | None, str]:
        return self.path, None, f"{self.subject.name} {self.check.id}"


class CheckFailed(Exception):
    """A check failed; the text is what the report says of it."""


def raise_for(result: Result) -> None:
    """Skip the running test with the result's reason, or fail it with the report's words."""
    from diymodel.verify.text import failure_lines

    if result.status in ("skipped", "inconclusive"):
        pytest.skip(f"{result.status}: {result.reason}")
    if result.status in ("failed", "error"):
        raise CheckFailed("\n".join(failure_lines(result)))


def parametrize_with_checks(
    subjects: Iterable[str | Subject | Factory], *, expected_failures: dict[str, str] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator that turns a test into one for every subject and check.

    The test takes ``lm`` and ``check`` and calls ``check(lm)``::

        @parametrize_with_checks([MyLM])
        def test_my_model(lm, check):
            check(lm)

    Args:
        subjects: what ``check_causal_lm`` takes.
        expected_failures: ``{id: reason}``; such a check is marked xfail.

    Raises:
        ValueError: an id in ``expected_failures`` is no check's; the message names the nearest.
    """
    from diymodel.verify.registry import list_checks, nearest
    from diymodel.verify.runner import verify_one
    from diymodel.verify.settings import Settings
    from diymodel.verify.subject import resolve

    checks, expected = list_checks(), dict(expected_failures or {})
    for id in expected:
        if id not in {check.id for check in checks}:
            raise ValueError(f"no check is called {id!r}{nearest(id, checks)}")

    def call(check: Check) -> Callable[[Subject], None]:
        return lambda lm: raise_for(verify_one(lm, check, Settings.of()))

    cases = [
        pytest.param(
            lm,
            call(check),
            id=f"{lm.name}-{check.id}",
            marks=[pytest.mark.xfail(reason=expected[check.id], strict=True)] if check.id in expected else [],
        )
        for lm in map(resolve, subjects)
        for check in checks
    ]
    return pytest.mark.parametrize(("lm", "check"), cases)
