"""The content of evaluation.json as typed records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from pdd_fast.runtime.errors import UsageError
from pdd_fast.runtime.files import read_json, write_json

# Keys of files written before 0.1, and what they are called now.
_RENAMED = {"normalisation": "normalization", "selected_on": "selection_split"}


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class Protocol(_Record):
    """The conditions that all results of an evaluation share."""

    name: str
    data: str  # the dataset's name
    test_images: int
    images_per_class: list[int]  # of the union after each stage
    learning_rates: list[float]  # of each stage
    random_learning_rate: float
    epochs: int  # on each union
    batch: int
    momentum: float
    weight_decay: float
    schedule: str
    augmentation: dict[str, str]
    normalization: dict[str, Any]
    whitening: str = "none"
    whitening_epsilon: float | None = None
    selection_split: str = "validation"
    against: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _read_old_names(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        return {_RENAMED.get(key, key): value for key, value in content.items()}


class Result(_Record):
    """Test accuracies, percent, of the fresh networks of one comparison."""

    name: str  # "pdd", "random", "random-soft", "last-union", "one-stage", "against" or "subsets"
    labels: str = "hard"  # hard, soft or learned
    network: str = "ConvNet"
    seeds: list[int]  # of each repeat
    accuracy: list[list[float]]  # by repeat, after each stage
    mean: list[float]  # over repeats, after each stage
    std: list[float]  # sample standard deviation over repeats; 0 for one repeat
    ci95: list[float | None]  # half the width of the mean's 95 % interval (Student's t)

    @property
    def has_soft_labels(self) -> bool:
        """Whether labels say more than the class; such results are reported apart."""
        return self.labels != "hard"


class Pair(_Record):
    """The difference of two results' final accuracies, repeat by repeat."""

    network: str
    of: str
    to: str
    difference: float  # mean over repeats, percentage points
    ci95: float | None  # half the width of its 95 % interval; None for one repeat


class Evaluation(_Record):
    """Everything that an evaluation measured, as evaluation.json holds it."""

    protocol: Protocol
    stages: int
    steps: list[int]  # SGD steps of each stage
    results: list[Result]
    paired: list[Pair] = []  # files written before 0.1 have none

    @classmethod
    def read(cls, path: Path) -> Evaluation:
        """Read evaluation.json.

        Raises:
            UsageError: The file is missing, or it is not an evaluation.
        """
        content = read_json(path)
        try:
            return cls.model_validate(content if isinstance(content, dict) else {})
        except ValidationError as error:
            places = {".".join(map(str, each["loc"])): each for each in error.errors()}
            missing = [place for place, each in places.items() if each["type"] == "missing"]
            wrong = [f"{place}: {each['msg']}" for place, each in places.items()]
            reason = f"it lacks {', '.join(missing)}" if missing else wrong[0]
            raise UsageError(f"{path} is not an evaluation: {reason}") from error

    def write(self, path: Path) -> None:
        """Write evaluation.json."""
        write_json(path, self.model_dump())

    def final(self, name: str, network: str = "ConvNet") -> float:
        """Return the mean accuracy of result ``name`` after the last stage."""
        return next(
            each.mean[-1] for each in self.results if (each.name, each.network) == (name, network)
        )

    def comparable(self) -> list[tuple[str, list[Result]]]:
        """Group the results that may be compared: same network, and hard labels or not.

        Returns:
            For each group its title and its results. The only group has the title "".
        """
        groups: dict[tuple[str, bool], list[Result]] = {}
        for result in self.results:
            groups.setdefault((result.network, result.has_soft_labels), []).append(result)
        named = {network for network, _ in groups} != {"ConvNet"}
        mixed = any(soft for _, soft in groups)
        found = []
        for (network, soft), group in groups.items():
            words = [network] if named else []
            words += ["soft labels" if soft else "hard labels"] if mixed else []
            found.append((", ".join(words), group))
        return found
