"""`pdd-fast env`: what it says was built and found, and what it advises where something is
missing."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pdd_fast import __version__
from pdd_fast.cli import env
from pdd_fast.cli.main import run
from pdd_fast.ops import _native

Facts = dict[str, Any]
RECORD = {
    "cpu": {"compiler": "g++ 12.2.0", "levels": ["baseline", "avx2", "avx512"]},
    "cuda": {"nvcc": "13.0", "archs": ["80", "86", "90"]},
    "cuda_reason": "nvcc found",
}


@pytest.fixture
def facts(capsys: pytest.CaptureFixture[str]) -> Callable[[], Facts]:
    """Call `pdd-fast env --json`."""

    def ask() -> Facts:
        assert run(["env", "--json"]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        assert out.count("\n") == 1
        return json.loads(out)

    return ask


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[object], None]:
    """Puts another record in the place of the build's."""
    monkeypatch.setattr(env, "resources", SimpleNamespace(files=lambda package: tmp_path))

    def put(content: object) -> None:
        (tmp_path / "_build.json").write_text(
            content if isinstance(content, str) else json.dumps(content)
        )

    return put


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets torch find GPUs of the given capabilities; none without any."""

    def install(*capabilities: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"Accelerator {i}")

    return install


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets the named libraries load and no others; what the CUDA kernels report may be given."""

    def install(*loads: str, **reported: str) -> None:
        def capabilities(device: str) -> dict[str, str]:
            if device == "cpu":
                return {"instruction set": "made up"}
            devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
            return {"runtime": "13.0", "driver": "13.0", "devices": str(devices)} | reported

        def load(device: str) -> tuple[Any, str | None]:
            if device in loads:
                return SimpleNamespace(capabilities=lambda: capabilities(device)), None
            return (
                None,
                f"pdd_fast._{device} does not load: libmissing.so: cannot open shared object file",
            )

        monkeypatch.setattr(_native, "_load", load)

    return install


def test_it_says_what_this_machine_has(facts: Callable[[], Facts]) -> None:
    found = facts()
    stored = json.loads((Path(_native.__file__).parents[1] / "_build.json").read_text())
    assert found["pdd-fast"]["version"] == __version__
    assert found["pdd-fast"]["commit"] == stored["commit"]
    assert found["pdd-fast"]["python"] == platform.python_version()
    assert found["built"]["compiler"] == stored["cpu"]["compiler"]
    for level in stored["cpu"]["levels"]:
        assert level in found["built"]["CPU kernels"]
    assert found["torch"]["version"] == torch.__version__
    assert found["torch"]["threads"] == str(torch.get_num_threads())
    library = _native.load("cpu")
    assert library is not None
    assert found["CPU kernels"] == {"library": "loads", **library.capabilities()}
    assert found["CPU kernels"]["instruction set"] in stored["cpu"]["levels"]


def test_the_text_says_the_same_as_the_json(
    facts: Callable[[], Facts], capsys: pytest.CaptureFixture[str]
) -> None:
    found = facts()
    advice = found.pop("advice")
    assert run(["env"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = [" ".join(line.split()) for line in out.splitlines()]
    for section, entries in found.items():
        assert section in lines
        for name, value in entries.items():
            assert f"{name} {value}" in lines
    assert lines[-1 - len(advice) :] == ["to do" if advice else "nothing is missing", *advice]


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="instruction sets are chosen on x86 only"
)
def test_it_says_which_instruction_set_was_asked_for() -> None:
    program = "from pdd_fast.cli.main import run; run(['env', '--json'])"
    environment = os.environ | {"PDD_FAST_CPU": "baseline", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-P",
        "-c",
        program,
    ]  # -P: the installed package, not the working directory's
    out = subprocess.run(command, env=environment, capture_output=True, check=True).stdout
    found = json.loads(out)
    assert found["CPU kernels"]["instruction set"] == "baseline"
    assert found["torch"]["threads"] == "1"


# ---- the build ----


@pytest.mark.parametrize("content", ["", "{", "[]", {}, {"cpu": {}}, {"cpu": 1, "cuda": None}])
def test_a_record_that_is_missing_or_damaged(
    content: object, record: Callable[[object], None], facts: Callable[[], Facts]
) -> None:
    if content != "":
        record(content)
    found = facts()
    assert found["built"] == {"record": "missing"}
    assert any(
        "record of the build" in sentence and "pip install" in sentence
        for sentence in found["advice"]
    )


def test_a_build_for_the_cpu_says_why_it_has_no_cuda(
    record: Callable[[object], None], facts: Callable[[], Facts]
) -> None:
    record(RECORD | {"cuda": None, "cuda_reason": "no nvcc on PATH or in CUDA_HOME"})
    assert facts()["built"] == {
        "compiler": "g++ 12.2.0",
        "CPU kernels": "baseline, avx2, avx512",
        "CUDA kernels": "none",
        "why no CUDA": "no nvcc on PATH or in CUDA_HOME",
    }


@pytest.mark.parametrize("gpu", [False, True])
def test_an_nvcc_that_does_not_compile_is_shown_with_what_to_do(
    gpu: bool,
    record: Callable[[object], None],
    facts: Callable[[], Facts],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = "host_config.h:143:2: error: #error -- unsupported GNU version!"
    record(
        RECORD
        | {"cuda": None, "cuda_reason": f"nvcc does not compile: {words}", "nvcc_error": words}
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    found = facts()
    assert found["built"]["why no CUDA"] == f"nvcc does not compile: {words}"
    about = [sentence for sentence in found["advice"] if "nvcc" in sentence]
    assert len(about) == 1  # not also that nvcc should be put on PATH
    assert words in about[0]
    for part in ("install a gcc", "NVCC_CCBIN", "pip install", "PDD_FAST_CUDA=0"):
        assert part in about[0]


def test_a_build_with_cuda_names_its_architectures(
    record: Callable[[object], None], facts: Callable[[], Facts]
) -> None:
    record(RECORD)
    built = facts()["built"]
    assert built["CUDA kernels"] == "nvcc 13.0, sm_80, sm_86, sm_90 and PTX"
    assert "why no CUDA" not in built


# ---- the environment ----


def test_without_a_gpu_nothing_is_missing(
    gpus: Callable[..., None],
    kernels: Callable[..., None],
    facts: Callable[[], Facts],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(__version__="9.8"))
    gpus()
    kernels("cpu")
    found = facts()
    assert found["torch"]["GPU"] == "none found"
    assert found["CPU kernels"] == {"library": "loads", "instruction set": "made up"}
    assert "libmissing.so" in found["CUDA kernels"]["library"]
    assert found["torchvision"] == {"version": "9.8"}
    assert found["advice"] == []


def test_missing_cpu_kernels_are_to_be_built(
    gpus: Callable[..., None], kernels: Callable[..., None], facts: Callable[[], Facts]
) -> None:
    gpus()
    kernels()
    found = facts()
    assert "libmissing.so" in found["CPU kernels"]["library"]
    (sentence,) = (s for s in found["advice"] if "CPU kernels" in s)
    assert "reference" in sentence
    assert "`pip install --force-reinstall --no-deps --verbose .`" in sentence


def test_a_gpu_without_kernels_needs_nvcc(
    gpus: Callable[..., None], kernels: Callable[..., None], facts: Callable[[], Facts]
) -> None:
    gpus((9, 0), (8, 9))
    kernels("cpu")
    found = facts()
    assert found["torch"]["GPU 0"] == "Accelerator 0, sm_90"
    assert found["torch"]["GPU 1"] == "Accelerator 1, sm_89"
    (sentence,) = (s for s in found["advice"] if "CUDA kernels" in s)
    assert "put nvcc on PATH" in sentence
    assert "`pip install --force-reinstall --no-deps --verbose .`" in sentence


@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    [
        ((9, 0), ["80", "90"], True),
        ((8, 9), ["80", "90"], True),  # machine code of sm_80 runs on sm_89
        ((8, 0), ["86", "90"], False),  # but not that of sm_86 on sm_80
        ((7, 5), ["80", "90"], False),
        ((12, 0), ["80", "90"], True),  # PTX of the newest is translated
        ((9, 0), ["86", "100"], False),  # but not that of a newer one
        ((10, 0), ["90", "100", "120"], True),
        ((9, 0), ["90a"], True),
    ],
)
def test_a_gpu_that_the_kernels_were_not_built_for(
    capability: tuple[int, int],
    archs: list[str],
    runs: bool,
    gpus: Callable[..., None],
    kernels: Callable[..., None],
    record: Callable[[object], None],
    facts: Callable[[], Facts],
) -> None:
    gpus(capability)
    kernels("cpu", "cuda")
    record(RECORD | {"cuda": {"nvcc": "13.0", "archs": archs}})
    found = facts()
    assert found["CUDA kernels"] == {
        "library": "loads",
        "runtime": "13.0",
        "driver": "13.0",
        "devices": "1",
    }
    sentences = [s for s in found["advice"] if "CUDA kernels" in s]
    assert len(sentences) == (0 if runs else 1)
    if not runs:
        number = f"{capability[0]}{capability[1]}"
        assert f"sm_{number}" in sentences[0]
        assert f"PDD_FAST_CUDA_ARCHS={number}" in sentences[0]


def test_torch_that_does_not_import(
    facts: Callable[[], Facts], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    found = facts()
    assert found["torch"]["import"].startswith("fails: ")
    assert "CPU kernels" not in found
    assert any("`pip install torch`" in sentence for sentence in found["advice"])


def test_torchvision_that_is_not_installed(
    facts: Callable[[], Facts], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    found = facts()
    assert found["torchvision"] == {"import": "not installed"}
    (sentence,) = (s for s in found["advice"] if "torchvision" in s)
    assert "`pip install torchvision`" in sentence
    assert "cifar10" in sentence


@pytest.mark.parametrize("kind", ["RuntimeError", "ImportError", "OSError", "AttributeError"])
def test_torchvision_of_another_torch(
    kind: str, facts: Callable[[], Facts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torchvision").mkdir()
    text = f"raise {kind}('operator torchvision::nms does not exist\\nand more')\n"
    (tmp_path / "torchvision" / "__init__.py").write_text(text)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    found = facts()
    assert found["torchvision"] == {"import": "fails: operator torchvision::nms does not exist"}
    (sentence,) = (s for s in found["advice"] if "torchvision" in s)
    assert "belongs to the installed torch" in sentence


def test_a_torchvision_that_fails_without_a_word(
    facts: Callable[[], Facts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torchvision.py").write_text("raise ImportError\n")
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert facts()["torchvision"]["import"] == "fails: ImportError"


# ---- the kernels' loader ----


def fresh_load(monkeypatch: pytest.MonkeyPatch, error: Exception) -> tuple[Any, str | None]:
    """The loader's result for a library whose import raises ``error``."""

    def fail(name: str) -> None:
        assert name == "pdd_fast._cuda"
        raise error

    monkeypatch.setattr(_native, "importlib", SimpleNamespace(import_module=fail))
    return _native._load.__wrapped__("cuda")


def test_the_loader_says_why_a_library_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = ModuleNotFoundError("No module named 'pdd_fast._cuda'", name="pdd_fast._cuda")
    assert fresh_load(monkeypatch, missing) == (None, "pdd_fast._cuda was not built")
    library, why = fresh_load(
        monkeypatch, ImportError("libcudart.so.13: cannot open shared object file")
    )
    assert library is None
    assert why == "pdd_fast._cuda does not load: libcudart.so.13: cannot open shared object file"
    assert _native.load("mps") is None
    assert _native.load_error("mps") == "there are no kernels for device type 'mps'"
    assert _native.load_error("cpu") is None


# ---- driver ----


@pytest.fixture
def advice_about(
    facts: Callable[[], Facts],
    record: Callable[[object], None],
    gpus: Callable[..., None],
    kernels: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., list[str]]:
    """Returns the advice where torch finds so many GPUs and the CUDA kernels report this."""
    # One that imports, so that no advice is about it.
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(__version__="9.8"))

    def ask(torch_finds: int, **reported: str) -> list[str]:
        record(RECORD)
        gpus(*[(9, 0)] * torch_finds)
        kernels("cpu", "cuda", **reported)
        return list(facts()["advice"])

    return ask


@pytest.mark.parametrize("driver", ["12.8", "11.4"])
@pytest.mark.parametrize("torch_finds", [0, 1])
def test_a_driver_older_than_the_kernels_is_named_with_what_helps(
    driver: str, torch_finds: int, advice_about: Callable[..., list[str]]
) -> None:
    assert advice_about(torch_finds, driver=driver, devices="0") == [
        f"the driver serves CUDA {driver}, and the CUDA kernels were built with CUDA 13.0: install "
        "a driver for CUDA 13 (release 580 or later), or set CUDA_HOME to a toolkit of CUDA "
        f"{driver} or earlier and {env._REBUILD}"
    ]


@pytest.mark.parametrize(("driver", "runtime"), [("13.0", "13.2"), ("13.1", "12.4")])
def test_a_driver_serves_its_own_major_release_and_earlier_ones(
    driver: str, runtime: str, advice_about: Callable[..., list[str]]
) -> None:
    assert advice_about(1, driver=driver, runtime=runtime) == []


@pytest.mark.parametrize(("torch_finds", "kernels_find"), [(1, "0"), (0, "2"), (2, "1")])
def test_gpus_that_only_torch_or_only_the_kernels_find_are_a_fault(
    torch_finds: int, kernels_find: str, advice_about: Callable[..., list[str]]
) -> None:
    (advice,) = advice_about(torch_finds, devices=kernels_find)
    assert advice.startswith(
        f"torch finds {torch_finds} GPUs and the CUDA kernels find {kernels_find}: "
    )
