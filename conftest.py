"""Settings that every test runs under: one torch thread, a Hypothesis profile, no flaky deadline."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings

# A model's first example takes ten times as long as its replay, so a deadline makes a healthy model flaky.
# Every example draws its own torch seed; the database is off so that a run depends on its seed alone.
_COMMON = settings(deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow], print_blob=False)
settings.register_profile("quick", _COMMON, max_examples=10)
settings.register_profile("standard", _COMMON, max_examples=40)
settings.register_profile("thorough", _COMMON, max_examples=400)

settings.load_profile("standard")  # pytest --hypothesis-profile quick overrides it

torch.set_num_threads(1)  # two threads on two busy cores are 25 times slower on tiny models


def pytest_report_header() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return f"torch {torch.__version__}, CUDA device: {device}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def few_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quick profile in a third of the time, where the question is how a module is called, and not how surely."""
    from diymodel.verify.options import PROFILES

    monkeypatch.setitem(PROFILES, "quick", 3)
