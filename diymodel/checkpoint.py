"""Saving and loading a model, in two forms.

**One file** (:func:`save_checkpoint`, :func:`load_checkpoint`): what ``torch.save`` writes of ``{"config": dict,
"state_dict": …}``, and ``"training"`` with whatever a run needs to go on. Anyone reads it with
``torch.load(path, weights_only=True)``; such a file written by hand is read here as well.

**A Hugging Face directory** (:func:`save_pretrained`, :func:`load_pretrained`): ``config.json`` and
``model.safetensors``. transformers opens ours with the same logits, and here opens any directory of the Llama family.

Both hold on to three promises:

* *All or nothing.* A reader finds the old weights or the new, never a mixture, also after kill -9 or on a full disk.
* *Sealed.* Neither torch nor safetensors notices every changed byte, so what is written here carries the SHA-256 of
  all its bytes, configuration included. A flipped bit, a cut, or an edit afterwards is refused before anything is
  unpickled.
* *Strict.* Missing, additional and misshapen weights are refused, and so are weights of another configuration where
  ``expected`` is given: a changed ``rope_theta`` fits every shape.

A single file's seal is the comment at the end of its ZIP archive, over all bytes before its own digits. A directory's
is ``diymodel_sha256`` in the metadata of ``model.safetensors``, over ``config.json`` and then the weights, with its own
digits taken as zeros; ``diymodel_format`` in ``config.json`` says that there has to be one.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor, nn

from diymodel import hf_form
from diymodel._compat import unsafe_globals
from diymodel._files import create_directory, replace_file
from diymodel.config import DIYConfig
from diymodel.devices import usable_device
from diymodel.model import DIYForCausalLM
from diymodel.weights import check_expected, check_state_dict, with_tied_head, without_prefix

FORMAT = 1  # of both forms; a file of another format is refused

_StrPath = str | os.PathLike[str]

_DIGITS = 64  # of a SHA-256 in hexadecimal
_FILE_SEAL = b"diymodel sha256 "  # and the digits: the ZIP comment of a single file

_MARKER, _SEAL_KEY = "diymodel_format", "diymodel_sha256"  # in config.json, and in the metadata of the weights
_WEIGHTS_SEAL = re.compile(rb'"diymodel_sha256":"([0-9a-f]{64})"')


class Checkpoint(NamedTuple):
    """What a single file holds."""

    config: DIYConfig
    state_dict: dict[str, Tensor]  # complete, of one floating dtype, on the CPU
    training: dict[str, Any] | None  # as it was given to save_checkpoint

    def model(self, device: str | torch.device = "cpu") -> DIYForCausalLM:
        """The model, in eval mode, on ``device`` and in the dtype it was saved in.

        Raises:
            ValueError: ``device`` cannot be used.
        """
        return _build(self.config, self.state_dict, usable_device(device))


def save_checkpoint(path: _StrPath, model: nn.Module, training: dict[str, Any] | None = None) -> None:
    """Write the model, and what a training run needs to go on, to one file.

    The file is made up in memory first, which takes its size once more.

    Args:
        path: replaced if it exists.
        model: a :class:`DIYForCausalLM`, as it is or compiled; left as it was.
        training: tensors, numbers, strings, and lists, tuples and dicts of them.

    Raises:
        TypeError: the model is another one.
        ValueError: what is to be saved could not be loaded again: weights of several dtypes or without values, or in
            ``training`` an object that only code can restore.
        OSError: the file could not be written; what was there is unchanged.
    """
    config, state_dict = _parts_of(model)
    content = {"format": FORMAT, "config": config.to_dict(), "state_dict": state_dict}
    if training is not None:
        content["training"] = training
    buffer = io.BytesIO()
    torch.save(content, buffer)
    unsafe = _unsafe_globals(buffer)
    if unsafe:
        raise ValueError(f"training holds {unsafe}, which only code can restore: keep tensors and plain values in it")
    _seal_file(buffer)
    replace_file(path, lambda file: file.write(buffer.getbuffer()))


def load_checkpoint(
    path: _StrPath, expected: DIYConfig | None = None, device: str | torch.device = "cpu"
) -> DIYForCausalLM:
    """The model of a single file, in eval mode, on ``device`` and in the dtype it was saved in.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ValueError: as :func:`read_checkpoint`, or its configuration is not ``expected``; names each field that differs.
            Or ``device`` cannot be used, which is found before anything is read.
    """
    device = usable_device(device)
    return read_checkpoint(path, expected).model(device)


def read_checkpoint(path: _StrPath, expected: DIYConfig | None = None) -> Checkpoint:
    """The content of a single file, checked: its weights are those that its configuration asks for.

    The names may carry the prefix of ``torch.compile`` (``_orig_mod.``) or ``DataParallel`` (``module.``).

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ValueError: the file is damaged, is no checkpoint, would run code, has an impossible configuration or other
            weights than it asks for, or its configuration is not ``expected``.
    """
    with _naming(path):
        content = _read_file(Path(path))
        config = DIYConfig.from_dict(content["config"])
        check_expected(config, expected)
        state_dict = without_prefix(content["state_dict"])
        check_state_dict(state_dict, _skeleton(config).state_dict(), config)
    return Checkpoint(config, with_tied_head(state_dict, config), content.get("training"))


def save_pretrained(model: nn.Module, directory: _StrPath) -> None:
    """Write the model as ``config.json`` and ``model.safetensors``, which transformers opens.

    A new directory appears whole. In one that already holds this configuration only the weights are replaced. Needs
    ``safetensors``.

    Args:
        model: a :class:`DIYForCausalLM`, as it is or compiled; left as it was.
        directory: made if it is missing, with its parents.

    Raises:
        TypeError: the model is another one.
        ValueError: the directory holds a model of another configuration or dtype; names the first field that differs.
        OSError: a file could not be written; what was there is unchanged.
    """
    safetensors = hf_form.import_safetensors()
    config, state_dict = _parts_of(model)
    values = hf_form.config_to_hf(config, state_dict["model.norm.weight"].dtype)
    config_json = (json.dumps({**values, _MARKER: FORMAT}, indent=2) + "\n").encode()
    metadata = {"format": "pt", _SEAL_KEY: "0" * _DIGITS}
    weights = bytearray(safetensors.torch.save(hf_form.weights_to_hf(state_dict, config), metadata))
    _seal_weights(config_json, weights)
    directory = Path(directory)
    if not directory.exists() or not any(directory.iterdir()):
        directory.absolute().parent.mkdir(parents=True, exist_ok=True)
        try:
            return create_directory(directory, {hf_form.CONFIG: config_json, hf_form.WEIGHTS: weights})
        except FileExistsError:
            pass  # another writer was faster, and its configuration counts now
    old = (directory / hf_form.CONFIG).read_bytes() if (directory / hf_form.CONFIG).exists() else None
    if old is not None and old != config_json:
        difference = hf_form.first_difference(old, config_json)
        raise ValueError(
            f"{directory} holds another model ({difference}): choose another directory, or delete that one"
        )
    replace_file(directory / hf_form.WEIGHTS, lambda file: file.write(weights))
    if old is None:
        replace_file(directory / hf_form.CONFIG, lambda file: file.write(config_json))
    return None


def load_pretrained(
    directory: _StrPath, expected: DIYConfig | None = None, device: str | torch.device = "cpu"
) -> DIYForCausalLM:
    """The model of a Hugging Face directory, in eval mode, on ``device`` and in the dtype of its weights.

    The directory is ours, or any of the Llama family (then with ``dropout=0``), its weights in ``model.safetensors`` or
    in the files that ``model.safetensors.index.json`` lists. Needs ``safetensors``.

    Raises:
        FileNotFoundError: there is nothing at ``directory``.
        ValueError: it is damaged, is no such directory, describes a model that ours cannot be, has other weights than
            its configuration asks for, or its configuration is not ``expected``. Or ``device`` cannot be used, which
            is found before anything is read.
    """
    device = usable_device(device)
    directory = Path(directory)
    with _naming(directory):
        config_json, shards = hf_form.find_files(directory)
        values = hf_form.parse_json(config_json, hf_form.CONFIG)
        for shard in shards:
            _check_weights_seal(values, config_json, shard)
        _check_format(values.get(_MARKER, FORMAT))
        config = hf_form.config_from_hf(values)
        check_expected(config, expected)
        weights = hf_form.read_weights(shards)
        check_state_dict(weights, hf_form.weights_to_hf(_skeleton(config).state_dict(), config), config)
    return _build(config, with_tied_head(hf_form.weights_from_hf(weights, config), config), device)


# --- the single file -------------------------------------------------------------------------------------------------


def _seal_file(buffer: io.BytesIO) -> None:
    """Append the digest of a ZIP archive as its comment."""
    buffer.seek(-2, os.SEEK_END)
    assert buffer.read() == b"\0\0"  # the length of the comment, the last field of an archive that has none
    buffer.seek(-2, os.SEEK_END)
    buffer.write(struct.pack("<H", len(_FILE_SEAL) + _DIGITS) + _FILE_SEAL)
    with buffer.getbuffer() as view:
        digits = hashlib.sha256(view).hexdigest()
    buffer.write(digits.encode())


def _check_file_seal(file: BinaryIO) -> bool:
    """Whether the file ends in a seal, which then has to be right."""
    size = file.seek(0, os.SEEK_END)
    tail = len(_FILE_SEAL) + _DIGITS
    file.seek(max(0, size - tail))
    seal = file.read()
    if not seal.startswith(_FILE_SEAL):
        return False
    file.seek(0)
    if _sha256(b"", file, size - _DIGITS) != seal[len(_FILE_SEAL) :]:
        raise ValueError(_DAMAGED.format("file"))
    return True


def _read_file(path: Path) -> dict[str, Any]:
    """The content of a single file, with the types of its entries checked."""
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    if path.is_dir():
        raise ValueError("is a directory: load_pretrained reads the Hugging Face form")
    with path.open("rb") as file:
        sealed = _check_file_seal(file)
        content = _unpickle(file)
    if not isinstance(content, dict) or not {"config", "state_dict"} <= content.keys():
        raise ValueError('is no checkpoint: that is a dict with at least "config" and "state_dict"')
    if "format" in content and not sealed:
        raise ValueError("the file has lost its sha256 seal: it was changed or cut short; restore it from a copy")
    _check_format(content.get("format", FORMAT))
    for name, kind in (("config", dict), ("state_dict", dict), ("training", (dict, type(None)))):
        if not isinstance(content.get(name), kind):
            raise ValueError(f'"{name}" must be a dict, and is a {type(content[name]).__name__}')
    for name, weight in content["state_dict"].items():
        if not (isinstance(name, str) and isinstance(weight, Tensor)):
            raise ValueError(f'"state_dict" must map names to tensors, and has {name!r}: {type(weight).__name__}')
    return content


def _unpickle(file: BinaryIO) -> Any:
    file.seek(0)
    if file.read(4) != b"PK\x03\x04":
        raise ValueError("is no checkpoint: not a file that torch.save wrote, or cut off at its beginning")
    # torch reports a broken archive with many types of error; some of its messages advise weights_only=False, and so
    # none of them is passed on.
    try:
        unsafe = _unsafe_globals(file)
        if not unsafe:
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"is damaged, or holds more than tensors and plain values ({type(error).__name__})") from None
    raise ValueError(f"refused: it contains code ({unsafe}), and a checkpoint is tensors and plain values")


def _unsafe_globals(file: BinaryIO) -> str:
    """The names in a file of ``torch.save`` that unpickling would have to call or build; empty for plain data."""
    file.seek(0)
    return ", ".join(unsafe_globals(file))


# --- the directory ---------------------------------------------------------------------------------------------------


def _seal_weights(config_json: bytes, weights: bytearray) -> None:
    """Put the digest into the metadata, where 64 zeros hold its place."""
    place = _WEIGHTS_SEAL.search(weights)
    assert place
    digest = hashlib.sha256(config_json)
    digest.update(weights)
    weights[slice(*place.span(1))] = digest.hexdigest().encode()


def _check_weights_seal(config: Mapping[str, Any], config_json: bytes, shard: Path) -> None:
    """Hold a file of weights to its seal, and the seal to the marker in ``config.json``."""
    with shard.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        header = file.read(8)
        length = int.from_bytes(header, "little")
        if length > size - 8:
            raise ValueError(f"{shard.name} is damaged: it is cut short, or no safetensors file")
        header += file.read(length)
        place = _WEIGHTS_SEAL.search(header)
        if place:
            start, end = place.span(1)
            unsealed = header[:start] + b"0" * _DIGITS + header[end:]
            if _sha256(config_json + unsealed, file, size - len(header)) != place[1]:
                raise ValueError(_DAMAGED.format("directory"))
    # transformers carries the marker along when it saves a model that it read here, under a seal it knows nothing of;
    # it also adds its own version, which tells such a directory from a damaged one.
    if not place and _MARKER in config and "transformers_version" not in config:
        raise ValueError(f"{shard.name} has lost its sha256 seal: it was changed or replaced; restore it from a copy")


# --- both ------------------------------------------------------------------------------------------------------------


def _parts_of(model: nn.Module) -> tuple[DIYConfig, dict[str, Tensor]]:
    """Configuration and state dict (on the CPU, detached, tied weights as one tensor) of a model about to be saved."""
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, DIYForCausalLM):
        raise TypeError(f"a DIYForCausalLM can be saved, not a {type(model).__name__}")
    config = model.config
    # Blocks that were compiled one by one carry the prefix of torch.compile inside their names.
    state_dict = {name.replace("_orig_mod.", ""): w.detach() for name, w in model.state_dict().items()}
    check_state_dict(state_dict, _skeleton(config).state_dict(), config)
    return config, with_tied_head({name: weight.cpu() for name, weight in state_dict.items()}, config)


def _skeleton(config: DIYConfig) -> DIYForCausalLM:
    """The model without memory: its names and shapes."""
    with torch.device("meta"):
        return DIYForCausalLM(config)


def _build(config: DIYConfig, state_dict: Mapping[str, Tensor], device: torch.device) -> DIYForCausalLM:
    """The model with these weights, which are known to fit, in their dtype; in eval mode."""
    # By way of the skeleton, nothing is drawn that is overwritten at once, and the random state stays as it was. It
    # gets memory as by to_empty(), but for an empty_like() that, of what has no memory yet, imports sympy: a second.
    dtype = state_dict["model.norm.weight"].dtype
    model = _skeleton(config)._apply(lambda weight: torch.empty(weight.shape, dtype=dtype, device=device))
    model.load_state_dict(state_dict)
    return model.eval()


_DAMAGED = "the {} is damaged: its contents do not match its sha256 (changed, or cut short); restore it from a copy"


def _sha256(start: bytes, file: BinaryIO, size: int) -> bytes:
    """Hexadecimal digest of ``start`` and the next ``size`` bytes of ``file``."""
    digest = hashlib.sha256(start)
    while chunk := file.read(min(size, 2**20)):
        digest.update(chunk)
        size -= len(chunk)
    return digest.hexdigest().encode()


def _check_format(found: object) -> None:
    if found != FORMAT:
        raise ValueError(f"has format {found!r}, and this version of diymodel reads {FORMAT}")


@contextlib.contextmanager
def _naming(path: _StrPath) -> Iterator[None]:
    """Put the path before what is wrong with it."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error
