"""The one place that states the version, and the commit that was built."""

import json
from pathlib import Path

__version__ = "0.1.0"


def commit() -> str:
    """Return the commit that was built; "unknown" where the build recorded none."""
    try:
        record = json.loads(Path(__file__).with_name("_build.json").read_text(encoding="utf-8"))
        return str(record["commit"])
    except (OSError, ValueError, LookupError, TypeError):
        return "unknown"
