"""The command ``pdd-fast env``."""

from __future__ import annotations

import json
import platform
from importlib import resources
from typing import Any

import click

from pdd_fast._version import __version__, commit
from pdd_fast.cli import output
from pdd_fast.runtime.errors import first_line

_REBUILD = (
    "install again with `pip install --force-reinstall --no-deps --verbose .` and "
    "read what the build prints"
)
# First release of NVIDIA's Linux driver that serves a major release of CUDA.
_DRIVERS = {"12": "525", "13": "580"}


@click.command(name="env")
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on stdout instead of text."
)
def command(as_json: bool) -> None:
    """Show build and environment details and suggest fixes."""
    facts: dict[str, dict[str, str]] = {}
    advice: list[str] = []
    facts["pdd-fast"] = {
        "version": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    facts["built"] = _built(advice)
    torch = _torch(facts, advice)
    if torch is not None:
        _kernels(torch, facts, advice)
    _torchvision(facts, advice)
    if as_json:
        output.print_json(facts | {"advice": advice})
        return
    output.print_facts(facts)
    print("to do" if advice else "nothing is missing")
    for sentence in advice:
        print(f"  {sentence}")


def _record() -> Any:
    """Return the record that the build wrote."""
    return json.loads((resources.files("pdd_fast") / "_build.json").read_text(encoding="utf-8"))


def _built(advice: list[str]) -> dict[str, str]:
    """Return the details of the build; add to ``advice`` what to fix, as the functions below do."""
    try:
        record = _record()
        cpu, cuda = record["cpu"], record["cuda"]
        built = {
            "compiler": cpu["compiler"],
            "CPU kernels": ", ".join(cpu["levels"]),
            "CUDA kernels": f"nvcc {cuda['nvcc']}, sm_" + ", sm_".join(cuda["archs"]) + " and PTX"
            if cuda
            else "none",
        }
        if not cuda:
            built["why no CUDA"] = record["cuda_reason"]
        if record.get("nvcc_error"):
            advice.append(
                f"nvcc was found but does not compile ({record['nvcc_error']}): install a gcc "
                f"that it supports and set NVCC_CCBIN to it, then {_REBUILD}; if no CUDA kernels "
                "are wanted, install with PDD_FAST_CUDA=0 set"
            )
    except (OSError, ValueError, KeyError, TypeError):
        advice.append(f"the record of the build is missing: {_REBUILD}")
        return {"record": "missing"}
    return built


def _fails(error: Exception) -> str:
    """Return the first line of a failed import's error.

    Incompatible releases raise errors of many types, not ImportError alone.
    """
    return f"fails: {first_line(error)}"


def _torch(facts: dict[str, dict[str, str]], advice: list[str]) -> Any:
    """Add the details of torch and of the GPUs to ``facts``; return torch, or None."""
    try:
        import torch
    except Exception as error:
        facts["torch"] = {"import": _fails(error)}
        advice.append("torch does not import: install it with `pip install torch`")
        return None
    found = {"version": torch.__version__, "threads": str(torch.get_num_threads())}
    found["built for CUDA"] = str(torch.version.cuda or "no")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            found[f"GPU {i}"] = f"{torch.cuda.get_device_name(i)}, sm_{major}{minor}"
    else:
        found["GPU"] = "none found"
    facts["torch"] = found
    return torch


def _kernels(torch: Any, facts: dict[str, dict[str, str]], advice: list[str]) -> None:
    """Add to ``facts`` whether the compiled kernels load and what they can do."""
    from pdd_fast.ops import _native

    for device in ("cpu", "cuda"):
        library = _native.load(device)
        if library is not None:
            capabilities = library.capabilities()
            facts[f"{device.upper()} kernels"] = {"library": "loads", **capabilities}
            if device == "cuda" and _driver_serves(torch, capabilities, advice):
                _architectures(torch, advice)
            continue
        facts[f"{device.upper()} kernels"] = {"library": str(_native.load_error(device))}
        if device == "cpu":
            advice.append(
                "the CPU kernels are missing and the slower reference runs in their place: "
                f"{_REBUILD}"
            )
        elif torch.cuda.is_available() and not any(
            sentence.startswith("nvcc was found") for sentence in advice
        ):
            advice.append(
                "a GPU is there but the CUDA kernels are missing: put nvcc on PATH, then "
                f"{_REBUILD}"
            )


def _driver_serves(torch: Any, capabilities: dict[str, str], advice: list[str]) -> bool:
    """Return whether the kernels find the GPUs that torch finds; if not, advise what helps.

    A driver serves programs of its own major release of CUDA and of earlier ones. torch may be
    built for an earlier release than the kernels, and then finds GPUs on which the kernels fail.

    Args:
        torch: The module.
        capabilities: What the CUDA kernels' library reports.
        advice: Receives the advice.
    """
    runtime, driver = capabilities["runtime"], capabilities["driver"]
    major = runtime.partition(".")[0]
    if driver != "none" and int(driver.partition(".")[0]) < int(major):
        newer = f" (release {_DRIVERS[major]} or later)" if major in _DRIVERS else ""
        advice.append(
            f"the driver serves CUDA {driver}, and the CUDA kernels were built with CUDA "
            f"{runtime}: install a driver for CUDA {major}{newer}, or set CUDA_HOME to a toolkit "
            f"of CUDA {driver} or earlier and {_REBUILD}"
        )
        return False
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found != int(capabilities["devices"]):
        advice.append(
            f"torch finds {found} GPUs and the CUDA kernels find {capabilities['devices']}: "
            "install the torch that is built for the driver's CUDA, and set CUDA_VISIBLE_DEVICES "
            "before Python starts"
        )
        return False
    return found > 0


def _architectures(torch: Any, advice: list[str]) -> None:
    """Advise a rebuild for every GPU that the CUDA kernels do not run on.

    A GPU runs machine code of its own major version, and PTX, if they are not newer than the GPU.
    The build makes PTX for its newest architecture.
    """
    try:
        built = _record()["cuda"]["archs"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    codes = [divmod(int(arch.rstrip("af")), 10) for arch in built]
    for i in range(torch.cuda.device_count()):
        gpu = tuple(torch.cuda.get_device_capability(i))
        if not any(code[0] == gpu[0] and code <= gpu for code in codes) and not max(codes) <= gpu:
            number = f"{gpu[0]}{gpu[1]}"
            advice.append(
                f"GPU {i} is an sm_{number}, which the CUDA kernels were not built for: with "
                f"PDD_FAST_CUDA_ARCHS={number} set, {_REBUILD}"
            )


def _torchvision(facts: dict[str, dict[str, str]], advice: list[str]) -> None:
    """Add the version of torchvision to ``facts``."""
    try:
        import torchvision

        facts["torchvision"] = {"version": torchvision.__version__}
    except ModuleNotFoundError:
        facts["torchvision"] = {"import": "not installed"}
        advice.append(
            "cifar10, cifar100, mnist, fashionmnist and svhn need torchvision: `pip install "
            "torchvision`"
        )
    except Exception as error:
        facts["torchvision"] = {"import": _fails(error)}
        advice.append(
            "torchvision does not import: install the release that belongs to the installed torch"
        )
