"""The choice of device and of type."""

from __future__ import annotations

import pytest
import torch

from diymodel.devices import choose_autocast, choose_device


def test_devices() -> None:
    assert choose_device("cpu").type == "cpu"
    assert choose_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(ValueError, match="device='gpu0' cannot be used: "):
        choose_device("gpu0")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device='cuda' cannot be used: "):
            choose_device("cuda")
    with pytest.raises(ValueError, match="device='meta' cannot be used: it holds shapes and no values"):
        choose_device("meta")


def test_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_autocast("float32", 4096, cuda) is None
    assert choose_autocast("bfloat16", 16, cpu) is torch.bfloat16
    assert choose_autocast("auto", 16, cuda) is torch.bfloat16
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    assert choose_autocast("auto", 64, cpu) is torch.bfloat16
    assert choose_autocast("auto", 63, cpu) is None
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    assert choose_autocast("auto", 512, cpu) is None
