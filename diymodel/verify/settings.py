"""How checks are run: how many trials, from which seed, on which device, and for how long."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch

from diymodel.devices import usable_device
from diymodel.verify.options import CHECK_SECONDS, PROFILES
from diymodel.verify.trial import DTYPES

_LONGEST = 1e6  # seconds; timers of the operating system overflow beyond


@dataclass(frozen=True)
class Settings:
    """How a check is run."""

    examples: int = PROFILES["standard"]  # trials
    seed: int = 0
    device: str = "cpu"
    dtype: torch.dtype | None = None  # None: the subject's own
    check_seconds: float = CHECK_SECONDS
    deadline: float | None = None  # of time.monotonic(), for all checks together
    shrink: bool = True  # make failures as small as they can be
    optional: bool = True  # run checks that are optional as well

    @classmethod
    def of(
        cls,
        profile: str = "standard",
        seed: int = 0,
        device: str = "cpu",
        dtype: str | None = None,
        check_seconds: float = CHECK_SECONDS,
        deadline: float | None = None,
        optional: bool = False,
    ) -> Settings:
        """From what users write; the arguments are those of :func:`check_causal_lm`.

        Raises:
            ValueError: there is no such profile, dtype or device, or check_seconds is no time.
        """
        check_time("check_seconds", check_seconds)
        check_device(device)
        if profile not in PROFILES:
            raise ValueError(f"profile={profile!r}: must be one of {', '.join(PROFILES)}")
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r}: must be one of {', '.join(DTYPES)}")
        own_dtype = DTYPES[dtype] if dtype else None
        return cls(PROFILES[profile], seed, device, own_dtype, check_seconds, deadline, optional=optional)

    def in_time(self) -> Settings | None:
        """Those of a check that begins now: it has no longer than what is left for all. None: nothing is left."""
        if self.deadline is None:
            return self
        left = self.deadline - time.monotonic()
        return replace(self, check_seconds=min(self.check_seconds, left)) if left > 0 else None


def check_time(name: str, seconds: float) -> None:
    """Refuse what is no length of time."""
    if not 0 < seconds <= _LONGEST:
        raise ValueError(f"{name}={seconds:g} must be above 0 and at most {_LONGEST:g} seconds")


def check_device(name: str) -> None:
    """Refuse what is no device of this torch and machine. CUDA itself is left to the child that runs the checks."""
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise ValueError(f"device={name!r}: {str(error).splitlines()[0]}") from None
    if kind != "cuda":
        usable_device(name)
    elif not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        raise ValueError(f"device={name!r}: this torch, {torch.__version__}, was built without CUDA")
