"""What a record says about where it was made. As a program: the same as one JSON object.

torch and pdd_fast are imported where they are asked, so that this answers before either is
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
    """What a command prints; nothing where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else ""


def commit() -> str:
    """The commit of these sources, or what PDD_FAST_COMMIT says, for copies without .git; "unknown"
    without either.

    Installed from a folder, that folder's commit as it is now, which may be a later one: it says
    so.
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
    """The commit of a repository; nothing where ``folder`` is not the top of one."""
    # A copy may lie inside of another repository, whose commit would be wrong.
    top = said("git", "-C", str(folder), "rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() != folder.resolve():
        return ""
    return said("git", "-C", str(folder), "describe", "--always", "--dirty")


def installed_from() -> dict[str, Any]:
    """What pip noted of where an installed package came from."""
    try:
        found: dict[str, Any] = json.loads(
            metadata.distribution("pdd-fast").read_text("direct_url.json") or "{}"
        )
    except (metadata.PackageNotFoundError, ValueError):
        return {}
    return found


def cpu() -> str:
    information = Path("/proc/cpuinfo")
    text = information.read_text(encoding="utf-8") if information.is_file() else ""
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found[1].strip() if found else platform.processor() or platform.machine()


def module(name: str) -> Any:
    """The module, or None where it is not installed or does not load, whatever the reason."""
    try:
        return importlib.import_module(name)
    except Exception:
        return None


def gpu(torch: Any) -> dict[str, Any]:
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
    """Processor, versions and commit, and with ``with_gpu`` the first GPU that torch finds."""
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
    """:func:`machine`, from a process of its own: one that has asked a GPU holds 0.5 GB of it until
    it ends.
    """
    command = [sys.executable, "-P", __file__, *(["--gpu"] if with_gpu else [])]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found | ({"threads": threads} if threads else {})


if __name__ == "__main__":
    print(json.dumps(machine("--gpu" in sys.argv)))
