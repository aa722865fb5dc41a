"""Describe the machine and the versions for a record. As a program: print one JSON object.

torch and pdd_fast are imported inside functions, so that this module works before either is
installed.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]


def said(*command: str) -> str:
    """Return a command's output; an empty string if the command is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else ""


def commit() -> str:
    """Return the commit of these sources.

    The environment variable PDD_FAST_COMMIT has precedence; it serves copies without .git. If the
    package was installed from a folder, the commit is that folder's current one, which may be later
    than the installation; the text says so. Without any of these the result is "unknown".
    """
    given = os.environ.get("PDD_FAST_COMMIT")
    if given:
        return given
    described = describe(ROOT)
    if described:
        return described
    origin = installed_from()
    if "vcs_info" in origin:
        return str(origin["vcs_info"]["commit_id"])
    address = urlsplit(origin.get("url", ""))
    described = describe(Path(unquote(address.path))) if address.scheme == "file" else ""
    return f"{described} (the folder that was installed from, now)" if described else "unknown"


def describe(folder: Path) -> str:
    """Return the commit of a repository; an empty string if ``folder`` is not its top level."""
    # A copy may lie inside another repository, whose commit would be wrong.
    top = said("git", "-C", str(folder), "rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() != folder.resolve():
        return ""
    return said("git", "-C", str(folder), "describe", "--always", "--dirty")


def installed_from() -> dict[str, Any]:
    """Return pip's record of the origin of the installed package."""
    try:
        found: dict[str, Any] = json.loads(
            metadata.distribution("pdd-fast").read_text("direct_url.json") or "{}"
        )
    except (metadata.PackageNotFoundError, ValueError):
        return {}
    return found


def cpu() -> str:
    """Return the name of the processor."""
    information = Path("/proc/cpuinfo")
    text = information.read_text(encoding="utf-8") if information.is_file() else ""
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found[1].strip() if found else platform.processor() or platform.machine()


def module(name: str) -> Any:
    """Return the module, or None if it is not installed or does not load for any reason."""
    try:
        return importlib.import_module(name)
    except Exception:
        return None


def gpu(torch: Any) -> dict[str, Any]:
    """Return the name, memory, architecture and driver of the first GPU."""
    properties = torch.cuda.get_device_properties(0)
    driver = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[
        0
    ]
    return {
        "gpu": properties.name,
        "gpu_memory": properties.total_memory,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "driver": driver or "unknown",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def machine(with_gpu: bool) -> dict[str, Any]:
    """Return processor, versions and commit; with ``with_gpu`` also torch's first GPU."""
    torch, pdd_fast, native = module("torch"), module("pdd_fast"), module("pdd_fast.ops._native")
    host, library = module("pdd_fast.runtime.host_memory"), native.load("cpu") if native else None
    facts: dict[str, Any] = {
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "memory": host.total() if host else None,
        "instruction_set": library.capabilities()["instruction set"] if library else "none",
        "threads": torch.get_num_threads() if torch else None,
        "torch": torch.__version__ if torch else None,
        "python": platform.python_version(),
        "pdd_fast": pdd_fast.__version__ if pdd_fast else None,
        "commit": commit(),
    }
    return facts | (gpu(torch) if with_gpu and torch and torch.cuda.is_available() else {})


def ask(with_gpu: bool, threads: int = 0) -> dict[str, Any]:
    """Return :func:`machine` as computed by a separate process.

    A process that has queried a GPU holds 0.5 GB of its memory until it ends.
    """
    command = [sys.executable, "-P", __file__, *(["--gpu"] if with_gpu else [])]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found | ({"threads": threads} if threads else {})


if __name__ == "__main__":
    print(json.dumps(machine("--gpu" in sys.argv)))
