"""Files that are either whole or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import errno
import json
import os
import pickle
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pdd_fast.errors import UsageError, first_line

_METADATA = "pdd_fast"


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends well, and vanishes when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("r+b") as file:  # Windows flushes only what may be written
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner may read; give the mode that open() would have given.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def readable(name: str) -> str:
    """A file's name as text that can be drawn and encoded: bytes that are not UTF-8 as \\xNN, so that names that differ
    still do."""
    return os.fsencode(name).decode("utf-8", errors="backslashreplace")


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Raises UsageError where the file is missing or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist") from error
    except (ValueError, OSError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}") from error


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Writes a safetensors file whose bytes depend on its content alone.

    All metadata go into one entry, as JSON: safetensors keeps entries in a hash map whose order changes from process to
    process.
    """
    text = json.dumps(metadata, sort_keys=True)
    # Copies, because safetensors refuses tensors that share memory.
    copies = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    with atomic_path(path) as temporary:
        try:
            save_file(copies, temporary, metadata={_METADATA: text})
        except SafetensorError as error:  # the system's refusal, e.g. of a full disk, in words alone
            raise OSError(errno.EIO, str(error), str(path)) from error


@contextmanager
def open_tensors(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A safetensors file of ours, memory-mapped: its handle and its metadata.

    Raises:
        UsageError: the file is missing, damaged, or not one of ours.
    """
    if not path.is_file():
        raise UsageError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    try:
        # safetensors makes tensors on torch's default device, whatever it is told.
        with torch.device("cpu"), safe_open(path, framework="pt") as file:
            yield file, _metadata_of(path, file)
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} is damaged or is not a safetensors file: {error}") from error


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
    return content


def read_pickled_tensors(path: Path, mapped: bool = False) -> Any:
    """What ``torch.save`` wrote, of tensors, lists and dictionaries alone: no code in a file is run.

    Args:
        mapped: leave the numbers in the file until they are used.

    Raises:
        UsageError: the file is missing or damaged, or holds something else.
    """
    try:
        return torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist") from error
    except pickle.UnpicklingError as error:
        raise UsageError(f"{path} is refused: it holds more than tensors, which could be code") from error
    except (RuntimeError, ValueError, EOFError, OSError) as error:
        raise UsageError(f"{path} cannot be read: {first_line(error)}") from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors and the metadata of a file; errors as :func:`open_tensors`."""
    with open_tensors(path) as (file, metadata):
        return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
