"""What stands in for newer versions of torch does as they do, whatever version runs the tests."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from diymodel import _compat


class Code:
    """A pickle of it calls a function when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("loaded",)


def saved(content: object) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("find", [_compat.unsafe_globals, _compat._unsafe_globals])
@pytest.mark.parametrize(
    ("content", "names"),
    [
        ({"a": torch.ones(2), "b": [1, "x", None]}, []),
        (OrderedDict(weight=torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))), []),
        ({"a": Code()}, ["print"]),
    ],
)
def test_names_that_only_code_can_restore_are_found(find: Any, content: object, names: list[str]) -> None:
    assert [name.rpartition(".")[2] for name in find(saved(content))] == names


def test_what_is_no_file_of_torch_save_is_refused_and_so_is_torchscript() -> None:
    with pytest.raises(Exception, match="zip"):
        _compat._unsafe_globals(io.BytesIO(pickle.dumps({})))
    scripted = io.BytesIO()
    with zipfile.ZipFile(scripted, "w") as archive:
        archive.writestr("model/data.pkl", pickle.dumps({}))
        archive.writestr("model/constants.pkl", pickle.dumps(()))
    with pytest.raises(ValueError, match="TorchScript"):
        _compat._unsafe_globals(scripted)


def test_scores_of_attention_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compat, "TORCH", (2, 4))
    query = torch.full((1, 1, 2, 4), 10.0)

    def attend() -> object:
        return F.scaled_dot_product_attention(query, query, query)

    assert _compat.scores_fit(attend, 201.0)
    assert not _compat.scores_fit(attend, 200.0)  # 4 · 10 · 10 / √4
