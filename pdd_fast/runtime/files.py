"""Files that are either whole or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import errno
import json
import os
import pickle
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pdd_fast.runtime.errors import UsageError, first_line

_METADATA = "pdd_fast"
# Metadata keys of files written before 0.1, with their present names.
_RENAMED = {
    "normalisation": "normalization",
    "base": "method",
    "held_out_accuracy": "selection_accuracy",
}


_ZIP = b"PK\x03\x04"  # first bytes of torch's files since version 1.6
_UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces ``path`` if the block succeeds.

    If it fails, the temporary file is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    # The system applies the umask.
    handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    mode = stat.S_IMODE(os.fstat(handle).st_mode)
    os.close(handle)
    try:
        yield temporary
        with temporary.open("r+b") as file:  # Windows flushes only files open for writing
            _flush(file.fileno())
        if stat.S_IMODE(temporary.stat().st_mode) != mode:  # safetensors makes its files private
            with suppress(OSError):  # some file systems have no modes to change
                temporary.chmod(mode)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _flush(handle: int) -> None:
    """Write a file through to the disk if its file system can."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` as UTF-8, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` to ``path`` as JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        UsageError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist") from error
    except (ValueError, OSError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}") from error


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write a safetensors file whose bytes depend only on its content.

    All metadata are one JSON entry, because safetensors stores entries in a hash map whose order
    changes from process to process.

    Args:
        path: file to write.
        tensors: tensors by name.
        metadata: anything that JSON can store.
    """
    text = json.dumps(metadata, sort_keys=True)
    # Copied, because safetensors refuses tensors that share memory.
    copies = {
        name: t.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, t in tensors.items()
    }
    with atomic_path(path) as temporary:
        try:
            save_file(copies, temporary, metadata={_METADATA: text})
        # A refusal of the system, for example by a full disk, arrives as a text only.
        except SafetensorError as error:
            raise OSError(errno.EIO, str(error), str(path)) from error


@contextmanager
def open_tensors(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield the handle and the metadata of a safetensors file of ours, memory-mapped.

    Raises:
        UsageError: the file is missing, damaged, or not one of ours.
    """
    if not path.is_file():
        raise UsageError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    try:
        # safetensors otherwise makes tensors on torch's default device, whatever it is told.
        with torch.device("cpu"), safe_open(path, framework="pt") as file:
            yield file, _metadata_of(path, file)
    except (SafetensorError, OSError) as error:
        raise UsageError(
            f"{path} is damaged or is not a safetensors file: {stand_in(path) or error}"
        ) from error


def _metadata_of(path: Path, file: Any) -> dict[str, Any]:
    text = (file.metadata() or {}).get(_METADATA)
    if text is None:
        raise UsageError(f"{path} was not written by pdd-fast")
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{path} is damaged: its metadata are not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} was not written by pdd-fast: its metadata are not an object")
    return {_RENAMED.get(str(key), str(key)): value for key, value in content.items()}


def stand_in(path: Path) -> str:
    """Return what is in place of a file that was not copied or downloaded whole, and what to do.

    The cases are an empty file, a Git LFS pointer and a web page. The result is "" for other files.
    """
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError:
        return ""
    if not head:
        return "it is empty; copy or download it again"
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return "it is a Git LFS pointer, not the file itself; fetch the file with `git lfs pull`"
    if head.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
        return "it is a web page, not the file; download it again"
    return ""


def read_pickled_tensors(path: Path, mapped: bool = False) -> Any:
    """Return the content of a file written by ``torch.save``, running no code in it.

    Only tensors, lists and dictionaries are accepted.

    Args:
        path: the file.
        mapped: leave the elements in the file until they are used. Files in the format before torch
            1.6 cannot be mapped and are read whole.

    Raises:
        UsageError: the file is missing or damaged, or holds something else.
    """
    try:
        with path.open("rb") as file:
            mapped = mapped and file.read(len(_ZIP)) == _ZIP
        return torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist") from error
    except pickle.UnpicklingError as error:
        reason = stand_in(path)
        said = (
            f"cannot be read: {reason}"
            if reason
            else "is refused: it holds more than tensors, which could be code"
        )
        raise UsageError(f"{path} {said}") from error
    except Exception as error:  # the reader raises any kind of error on damaged files
        raise UsageError(f"{path} cannot be read: {stand_in(path) or first_line(error)}") from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return all tensors and the metadata of a file.

    Raises:
        UsageError: as for :func:`open_tensors`.
    """
    with open_tensors(path) as (file, metadata):
        return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
