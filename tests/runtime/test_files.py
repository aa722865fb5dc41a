"""Files are whole or absent, equal content makes equal bytes, and what cannot be read is named."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from pdd_fast.runtime.errors import UsageError
from pdd_fast.runtime.files import (
    atomic_path,
    open_tensors,
    read_json,
    read_pickled_tensors,
    read_tensors,
    save_tensors,
    write_json,
    write_text,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def tensors() -> dict[str, Tensor]:
    """One of every type and layout that is stored."""
    return {
        "images": torch.randn(2, 3, 4, 5),
        "channels_last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "double": torch.tensor([float("nan"), float("inf"), -0.0, 1e-310], dtype=torch.float64),
        "half": torch.randn(7).bfloat16(),
        "transposed": torch.randn(3, 4).t(),
        "number": torch.tensor(7),
        "nothing": torch.zeros(0, 3),
        "mask": torch.tensor([True, False]),
    }


def content(folder: Path) -> dict[str, bytes]:
    """Every file in ``folder``, hidden ones too."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- whole or absent ----


@pytest.mark.parametrize("before", [{}, {"file": b"old"}], ids=["new", "replaced"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_block_that_raises_leaves_everything_as_it_was(
    tmp_path: Path, before: dict[str, bytes], error: type[BaseException]
) -> None:
    for name, old in before.items():
        (tmp_path / name).write_bytes(old)
    with pytest.raises(error), atomic_path(tmp_path / "file") as temporary:  # noqa: PT012
        temporary.write_bytes(b"half of it")
        raise error
    assert content(tmp_path) == before


def test_the_final_name_appears_when_the_block_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file"
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"content")
        assert not path.exists()
        assert temporary.parent == path.parent  # on one file system, so that the renaming is atomic
    assert content(path.parent) == {"file": b"content"}


def test_tensors_that_cannot_be_written_leave_the_old_file(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a", {"x": torch.ones(2)}, {})
    before = content(tmp_path)
    with pytest.raises(TypeError):
        save_tensors(tmp_path / "a", {"x": torch.zeros(2)}, {"not": object()})
    assert content(tmp_path) == before


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_get_the_permissions_that_open_would_give(
    tmp_path: Path, umask: int, mode: int
) -> None:
    before = os.umask(umask)
    try:
        write_text(tmp_path / "text", "a")
        save_tensors(tmp_path / "tensors", {"x": torch.ones(1)}, {})
        after = os.umask(umask)
    finally:
        os.umask(before)
    assert after == umask
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {mode}


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS])
def test_files_are_written_where_modes_cannot_be_changed(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    for name in ("chmod", "fchmod", "lchmod"):
        monkeypatch.setattr(os, name, refuse, raising=False)
    monkeypatch.setattr(Path, "chmod", refuse)
    write_text(tmp_path / "text", "a")
    save_tensors(tmp_path / "tensors", {"x": torch.ones(1)}, {})
    write_json(tmp_path / "json", 3)
    assert sorted(content(tmp_path)) == ["json", "tensors", "text"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_be_flushed_is_written_all_the_same(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    write_text(tmp_path / "text", "a")
    assert content(tmp_path) == {"text": b"a"}


def test_a_disk_that_fails_is_no_file_system_that_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(handle: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    write_text(tmp_path / "text", "old")
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        write_text(tmp_path / "text", "new")
    assert content(tmp_path) == {"text": b"old"}


# ---- equal content, equal bytes ----


def test_the_order_of_names_does_not_matter(tmp_path: Path) -> None:
    first, second = (
        {"a": torch.ones(2), "b": torch.zeros(3)},
        {"b": torch.zeros(3), "a": torch.ones(2)},
    )
    save_tensors(tmp_path / "1", first, {"x": 1, "y": {"p": 2, "q": 3}})
    save_tensors(tmp_path / "2", second, {"y": {"q": 3, "p": 2}, "x": 1})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_another_process_writes_the_same_bytes(tmp_path: Path) -> None:
    code = (
        "import sys, torch; from pathlib import Path; from pdd_fast.runtime.files import "
        "save_tensors\n"
        "save_tensors(Path(sys.argv[1]), {n: torch.arange(3) for n in 'edcba'}, {n: [n, 1] for n "
        "in 'vwxyz'})"
    )
    environment = os.environ | {"PYTHONHASHSEED": "4711"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "1")], check=True, env=environment)
    save_tensors(
        tmp_path / "2", {n: torch.arange(3) for n in "abcde"}, {n: [n, 1] for n in "zyxwv"}
    )
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


# ---- what is written can be read ----


def test_tensors_come_back_bit_by_bit(tmp_path: Path) -> None:
    expected = tensors()
    save_tensors(tmp_path / "a", expected, {"name": "×", "numbers": [1, 2.5, None]})
    found, metadata = read_tensors(tmp_path / "a")
    assert metadata == {"name": "×", "numbers": [1, 2.5, None]}
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape)
        stored, original = (
            t.contiguous().view(-1).view(torch.uint8) for t in (tensor, expected[name])
        )
        assert torch.equal(stored, original)


def test_tensors_that_share_memory_are_stored(tmp_path: Path) -> None:
    whole = torch.arange(6)
    save_tensors(tmp_path / "a", {"same": whole, "whole": whole, "part": whole[2:]}, {})
    found, _ = read_tensors(tmp_path / "a")
    assert found["same"].tolist() == found["whole"].tolist() == [0, 1, 2, 3, 4, 5]
    assert found["part"].tolist() == [2, 3, 4, 5]


def test_tensors_that_need_gradients_are_stored_and_come_back_without(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a", {"x": torch.ones(2, requires_grad=True)}, {})
    assert not read_tensors(tmp_path / "a")[0]["x"].requires_grad


def test_changing_what_was_read_leaves_the_file_alone(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a", {"x": torch.ones(5)}, {})
    read_tensors(tmp_path / "a")[0]["x"].zero_()
    assert read_tensors(tmp_path / "a")[0]["x"].tolist() == [1] * 5


def test_what_was_read_outlives_a_new_version_of_the_file(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a", {"x": torch.ones(50_000)}, {})
    before = read_tensors(tmp_path / "a")[0]["x"]
    save_tensors(tmp_path / "a", {"x": torch.zeros(50_000)}, {})
    assert before.sum() == 50_000


@settings(max_examples=15)
@given(JSON)
def test_json_comes_back(value: Any) -> None:
    with TemporaryDirectory() as folder:
        write_json(Path(folder) / "a.json", value)
        assert read_json(Path(folder) / "a.json") == value
        assert os.listdir(folder) == ["a.json"]


# ---- what cannot be read is named ----

READERS: list[Callable[[Path], Any]] = [read_json, read_tensors]


@pytest.mark.parametrize("read", READERS)
def test_a_missing_file_is_named(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    with pytest.raises(UsageError, match="gone/file does not exist"):
        read(tmp_path / "gone" / "file")


@pytest.mark.parametrize(
    ("read", "message"), [(read_json, "cannot be read as JSON"), (read_tensors, "is not a file")]
)
def test_a_folder_in_place_of_a_file_is_named(
    tmp_path: Path, read: Callable[[Path], Any], message: str
) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match=f"/folder {message}"):
        read(tmp_path / "folder")


@pytest.mark.parametrize("text", [b"", b"{", b'{"a": 1', b"\xff\xfe", b"nothing"])
def test_what_is_not_json_is_named(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(UsageError, match=r"/a\.json cannot be read as JSON: "):
        read_json(tmp_path / "a.json")


@given(st.data())
def test_a_cut_file_is_named(data: st.DataObject) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "cut.safetensors"
        save_tensors(path, {"x": torch.ones(3), "y": torch.ones(2, 2)}, {"a": 1})
        whole = path.read_bytes()
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
        with pytest.raises(
            UsageError, match=r"/cut\.safetensors is damaged or is not a safetensors file: "
        ):
            read_tensors(path)


@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_header_is_named_or_harmless(changes: list[tuple[int, int]]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "damaged.safetensors"
        save_tensors(path, {"x": torch.ones(3)}, {"a": 1})
        damaged = bytearray(path.read_bytes())
        header = 8 + int.from_bytes(damaged[:8], "little")
        for position, byte in changes:
            damaged[position % header] = byte
        path.write_bytes(damaged)
        try:
            said = str(read_tensors(path)[1].keys())
        except UsageError as error:
            said = str(error)
        assert str(path) in said or said.startswith("dict_keys")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"pdd_fast": "[1, 2]"}])
def test_a_file_of_another_program_is_named(
    tmp_path: Path, metadata: dict[str, str] | None
) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "theirs", metadata=metadata)
    with pytest.raises(UsageError, match="/theirs was not written by pdd-fast"):
        read_tensors(tmp_path / "theirs")


def test_metadata_that_are_not_json_are_named(tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "theirs", metadata={"pdd_fast": "{"})
    with pytest.raises(UsageError, match="/theirs is damaged"):
        read_tensors(tmp_path / "theirs")


def test_a_handle_reads_parts(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a", {"x": torch.arange(12).view(4, 3)}, {"of": "rows"})
    with open_tensors(tmp_path / "a") as (file, metadata):
        assert metadata == {"of": "rows"}
        assert file.get_slice("x")[2:3].tolist() == [[6, 7, 8]]


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n"


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (b"", "it is empty; copy or download it again"),
        (
            POINTER,
            "it is a Git LFS pointer, not the file itself; fetch the file with `git lfs pull`",
        ),
        (b"\n<!DOCTYPE html><html>Quota", "it is a web page, not the file; download it again"),
        (b"<HTML><head>", "it is a web page, not the file; download it again"),
    ],
    ids=["empty", "LFS", "page", "old page"],
)
@pytest.mark.parametrize(
    "read", [read_tensors, read_pickled_tensors, partial(read_pickled_tensors, mapped=True)]
)
def test_what_stands_in_for_a_file_is_named(
    found: bytes, said: str, read: Callable[[Path], Any], tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_bytes(found)
    with pytest.raises(UsageError) as caught:
        read(path)
    assert str(caught.value).endswith(f": {said}")
    assert str(caught.value).startswith(f"{path} ")


def test_the_format_before_torch_1_6_is_read_whole(tmp_path: Path) -> None:
    torch.save([torch.arange(3)], tmp_path / "old", _use_new_zipfile_serialization=False)
    (found,) = read_pickled_tensors(tmp_path / "old", mapped=True)
    assert torch.equal(found, torch.arange(3))
