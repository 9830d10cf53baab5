"""Atomic writing: the old content or the new, and an error that says which."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO
from unittest import mock

import pytest

from diymodel._files import create_directory, replace_file, require_place, require_places


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def _fail_with(error: BaseException) -> Callable[[BinaryIO], object]:
    def write(file: BinaryIO) -> None:
        file.write(b"half of the new con")
        raise error

    return write


def test_creates_and_replaces(tmp_path: Path) -> None:
    for content in (b"first", b"second, and longer"):
        replace_file(tmp_path / "f", lambda file, content=content: file.write(content))
        assert (tmp_path / "f").read_bytes() == content
    assert names(tmp_path) == ["f"]


def test_the_path_holds_the_old_content_until_the_new_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")

    def write(file: BinaryIO) -> None:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"

    replace_file(path, write)
    assert path.read_bytes() == b"new"


def test_a_new_file_has_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    replace_file(tmp_path / "f", lambda file: file.write(b""))
    assert (tmp_path / "f").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    replace_file(tmp_path / "link", lambda file: file.write(b"new"))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EACCES])
@pytest.mark.parametrize("existed", [True, False])
def test_an_error_of_the_system_keeps_its_type_and_tells_what_is_left(
    tmp_path: Path, number: int, existed: bool
) -> None:
    path = tmp_path / "f"
    if existed:
        path.write_bytes(b"old")
    raised = OSError(number, os.strerror(number))
    with pytest.raises(type(raised)) as caught:
        replace_file(path, _fail_with(raised))
    assert caught.value.errno == number
    assert f"could not write {path} ({os.strerror(number)})" in str(caught.value)
    if existed:
        assert "what was there is unchanged" in str(caught.value)
        assert path.read_bytes() == b"old"
    else:
        assert "nothing was there" in str(caught.value)
    assert names(tmp_path) == (["f"] if existed else [])


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_any_other_error_passes_through_and_leaves_nothing_behind(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "f").write_bytes(b"old")
    with pytest.raises(type(error)) as caught:
        replace_file(tmp_path / "f", _fail_with(error))
    assert caught.value is error
    assert (tmp_path / "f").read_bytes() == b"old"
    assert names(tmp_path) == ["f"]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"could not write .*nowhere/f .*nothing was there"):
        replace_file(tmp_path / "nowhere" / "f", lambda file: file.write(b""))


def test_a_place_where_no_file_can_be_is_refused_and_nothing_is_left_behind(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"old")
    require_place(tmp_path / "f")
    require_place(tmp_path / "new")
    with pytest.raises(FileNotFoundError, match=r"nowhere/f cannot be written: there is no directory .*nowhere"):
        require_place(tmp_path / "nowhere" / "f")
    with pytest.raises(FileExistsError, match="cannot be written: it is a directory"):
        require_place(tmp_path)
    with pytest.raises(FileExistsError, match="/dev/null cannot be written: it is no regular file"):
        require_place("/dev/null")
    denied = PermissionError(errno.EACCES, "denied")  # root, as whom tests may run, is denied nothing
    with (
        mock.patch.object(Path, "open", side_effect=denied),
        pytest.raises(PermissionError, match=r"no file can be created in .*\(denied\)"),
    ):
        require_place(tmp_path / "new")
    assert (tmp_path / "f").read_bytes() == b"old"
    assert names(tmp_path) == ["f"]


def test_two_places_must_be_two_files(tmp_path: Path) -> None:
    require_places(None, tmp_path / "a", None, tmp_path / "b")
    with pytest.raises(ValueError, match="is named for two files"):
        require_places(tmp_path / "a", tmp_path / "b", tmp_path / ".." / tmp_path.name / "a")
    with pytest.raises(FileExistsError):
        require_places(None, tmp_path)


def test_create_directory_makes_all_files(tmp_path: Path) -> None:
    create_directory(tmp_path / "d", {"a": b"1", "b": bytearray(b"2")})
    assert {path.name: path.read_bytes() for path in (tmp_path / "d").iterdir()} == {"a": b"1", "b": b"2"}
    assert names(tmp_path) == ["d"]


def test_create_directory_fills_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    create_directory(tmp_path / "d", {"a": b"1"})
    assert (tmp_path / "d" / "a").read_bytes() == b"1"


def test_create_directory_leaves_a_directory_with_content_alone(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "mine").write_bytes(b"old")
    with pytest.raises(FileExistsError, match="what was there is unchanged"):
        create_directory(tmp_path / "d", {"a": b"1"})
    assert names(tmp_path / "d") == ["mine"]
    assert names(tmp_path) == ["d"]
