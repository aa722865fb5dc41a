"""Settings of a run, and how defaults, a recipe and explicit settings become one object.

A method's settings are defined beside the method and found by its name (docs/method.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, Self, TypeVar, get_args

from pydantic import ConfigDict, Field, SerializeAsAny, field_validator, model_validator

from pdd_fast import recipes
from pdd_fast.runtime import choices as names
from pdd_fast.runtime import paths
from pdd_fast.runtime.errors import UsageError, nearest
from pdd_fast.runtime.models import SettingsModel, checked, whole_number
from pdd_fast.runtime.registry import METHODS

N = TypeVar("N", int, float)

DEFAULT_METHOD = "mtt"
# First setting of each group, and the title of the group.
GROUPS = {
    "dataset": "Run",
    "validation_fraction": "Data",
    "width": "Network",
    "num_experts": "Experts",
    "iterations": "Stage",
    "eval_every": "Training on synthetic images: selection, transition, evaluation",
    "device": "Device",
}
# Names of settings before 0.1, and their names now.
_RENAMED = {
    "base": "method",
    "select": "selection_split",
    "guard": "max_rollbacks",
    "clip": "max_grad_norm",
    "ema": "ema_decay",
    "experts": "num_experts",
    "trajectories": "trajectories_per_step",
}


class MethodSettings(SettingsModel):
    """Base class of a method's own settings."""

    # Per-method defaults of the run's settings.
    run_defaults: ClassVar[Mapping[str, Any]] = {}

    name: str = Field("", description="Method that learns the images of a stage.")

    @property
    def trajectory_epochs(self) -> int:
        """Return the last epoch of a trajectory that the method reads, or 0 if it reads none."""
        return 0

    def check_run(self, run: Settings) -> None:
        """Check the run's settings against the method; :meth:`require` suffices for most checks.

        Raises:
            UsageError: The method cannot be used with these settings.
        """

    def require(self, run: Settings, **allowed: tuple[Any, ...]) -> None:
        """Require each named setting of ``run`` to have one of the values allowed for it.

        Args:
            run: Settings of the run.
            **allowed: Allowed values by the name of the setting.

        Raises:
            UsageError: A setting has another value.
        """
        for key, values in allowed.items():
            if getattr(run, key) not in values:
                raise UsageError(
                    f"{key} must be {' or '.join(map(str, values))} where method is {self.name}, "
                    f"got {getattr(run, key)}"
                )

    def own(self) -> dict[str, Any]:
        """Return the settings by name, without the method's name."""
        return self.model_dump(exclude={"name"})


class UnknownMethodSettings(MethodSettings):
    """Settings of a method that is not registered here.

    With them, a run of such a method can still be inspected.
    """

    model_config = ConfigDict(extra="allow")


class Settings(SettingsModel):
    """Settings of a run.

    Defaults are those of PDD with trajectory matching for CIFAR-10 at 10 images per class.
    """

    dataset: str = Field(
        "digits",
        description="Dataset: digits, cifar10, cifar100, mnist, fashionmnist, svhn or "
        "imagefolder:DIR.",
    )
    data_dir: str = Field("data", description="Folder of torchvision's datasets.")
    stages: int = Field(5, ge=1, description="Number of stages.")
    ipc: int = Field(10, ge=1, description="Images per class, all stages together.")
    stage_ipc: str = Field(
        "",
        description="Images per class that each stage adds, as in 4,2,2,1,1; empty: split evenly.",
    )
    conditioning: Literal["on", "off"] = Field(
        "on",
        description="Whether a stage builds on the earlier ones (on), or each is made as the "
        "first is (off).",
    )
    seed: int = Field(0, ge=0, description="Seed of all random values.")

    validation_fraction: float = Field(
        0.1, gt=0, lt=1, description="Fraction of the training images in the validation split."
    )
    normalization: names.Normalization = Field(
        "fitted",
        description="Constants that normalize images without whitening: fitted to the data, or "
        "published ones.",
    )
    whitening: names.Whitening = Field(
        "none", description="Whitening of the pixels, before anything else: none or zca."
    )
    whitening_epsilon: float = Field(
        0.1, gt=0, description="Number that zca adds to every eigenvalue of the covariance."
    )
    selection_split: Literal["validation", "test"] = Field(
        "validation",
        description="Split that the best images are chosen by: validation, or test as in the "
        "papers.",
    )
    augment: str = Field(
        "color_crop_cutout_flip_scale_rotate",
        description="DSA strategy: names of operations joined by '_', or none.",
    )
    augment_mode: Literal["single", "multiple"] = Field(
        "single",
        description="Whether an image gets one of the strategy's operations (single) or all of "
        "them (multiple).",
    )
    filter: Literal["none", "forgetting", "learned"] = Field(
        "none",
        description="Real examples of a stage: all (none), by how often experts forget them "
        "(forgetting), or those that not every transition got right (learned).",
    )
    filter_band: float = Field(
        10.0,
        gt=0,
        description="Width of a stage's band of forgetting scores; stage s uses scores in "
        "[(s - 1) * band, s * band), the last stage all above.",
    )
    labels: names.Labels = Field(
        "hard",
        description="Labels: classes (hard), the experts' predictions (soft), or learned from "
        "there on (learned).",
    )
    factor: int = Field(
        1, ge=1, description="Smaller images on each side of a stored one, enlarged for training."
    )

    width: int = Field(128, ge=1, description="Channels of the ConvNet's blocks.")
    depth: int = Field(3, ge=1, description="Blocks of the ConvNet.")

    num_experts: int = Field(100, ge=1, description="Number of experts.")
    experts_from: str = Field(
        "",
        description="Run or folder with trajectories, or with MTT's replay_buffer_*.pt, to take "
        "experts from; empty: train them.",
    )
    expert_train_epochs: int = Field(50, ge=1, description="Epochs that an expert is trained.")
    expert_lr: float = Field(0.01, gt=0, description="Learning rate of experts.")
    expert_momentum: float = Field(0.0, ge=0, lt=1, description="Momentum of experts.")
    expert_batch: int = Field(256, ge=1, description="Batch size of experts, images.")

    iterations: int = Field(5000, ge=0, description="Iterations of a stage.")
    inner_lr: float = Field(
        0.01, gt=0, description="Learning rate on synthetic images; where it is learned, its start."
    )
    engine: names.EngineName = Field(
        "auto", description="Engine of the network's gradients; auto: fused where it can be."
    )

    eval_every: int = Field(
        100, ge=0, description="Iterations between selections; 0: only at the end of a stage."
    )
    eval_networks: int = Field(5, ge=1, description="Networks that a selection trains.")
    eval_epochs: int = Field(1000, ge=1, description="Epochs on each union in a selection.")
    transition_epochs: int = Field(
        1000, ge=1, description="Epochs on the union in a transition to the next stage."
    )
    union_epochs: int = Field(500, ge=1, description="Epochs on each union in the evaluation.")
    union_batch: int = Field(256, ge=1, description="Batch size on synthetic images.")
    union_momentum: float = Field(0.9, ge=0, lt=1, description="Momentum on synthetic images.")
    union_weight_decay: float = Field(5e-4, ge=0, description="Weight decay on synthetic images.")
    repeats: int = Field(5, ge=1, description="Fresh networks in the evaluation.")

    device: str = Field("auto", description="Device: auto, cpu, cuda or cuda:N.")
    precision: names.PrecisionSetting = Field(
        "auto", description="Precision of convolutions; auto: tf32 on a GPU, float32 on the CPU."
    )
    convolution: names.Convolution = Field(
        "auto",
        description="Convolution of the fused engine on the CPU; winograd is faster and rounds "
        "more; auto chooses per layer.",
    )
    side_by_side: int = Field(
        0,
        ge=0,
        description="Networks trained at once; 0: 1 on the CPU, up to 16 on a GPU. Results "
        "differ in rounding.",
    )
    graph: Literal["auto", "off"] = Field(
        "auto", description="Whether a GPU replays captured graphs of launches; the bits are equal."
    )
    threads: int = Field(
        0, ge=0, description="CPU threads; 0: torch's number. Results differ in rounding."
    )
    checkpoint_seconds: float = Field(
        30.0, ge=0, description="Seconds between checkpoints of unfinished work."
    )

    method: SerializeAsAny[MethodSettings] = Field(
        default_factory=lambda: method_settings(DEFAULT_METHOD)(name=DEFAULT_METHOD),
        description="Method that learns the images of a stage, and its own settings.",
    )

    @field_validator("augment")
    @classmethod
    def _check_augment(cls, augment: str) -> str:
        found = [] if augment.lower() in ("", "none") else augment.split("_")
        if not set(found) <= set(names.AUGMENTATIONS) or len(set(found)) < len(found):
            raise UsageError(
                f"augment must join names of {', '.join(names.AUGMENTATIONS)} by '_', each once "
                f"at most, or be none, got {augment!r}"
            )
        return augment

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.factor > 1 and self.labels != "hard":
            # Experts predict one label for the whole image, which does not fit the images in it.
            raise UsageError(f"factor must be 1 where labels are {self.labels}, got {self.factor}")
        self.method.check_run(self)
        shares = self.ipc_by_stage
        if self.stage_ipc and (len(shares), sum(shares)) != (self.stages, self.ipc):
            raise UsageError(
                f"stage_ipc must hold a number for each of the stages ({self.stages}) and add up "
                f"to ipc ({self.ipc}), got {self.stage_ipc}"
            )
        if self.filter == "learned" and self.conditioning == "off":
            raise UsageError(
                "conditioning must be on where filter is learned, got off: the filter asks "
                "networks that were trained on the earlier stages"
            )
        if self.stages > self.ipc:
            raise UsageError(
                f"stages must be at most ipc ({self.ipc}), got {self.stages}: a stage adds an "
                "image a class"
            )
        return self

    @property
    def ipc_by_stage(self) -> tuple[int, ...]:
        """Return the images per class that each stage adds.

        Without ``stage_ipc`` they are split evenly, and the earlier stages take the remainder.
        """
        if self.stage_ipc:
            return _split(self.stage_ipc)
        share, extra = divmod(self.ipc, self.stages)
        return tuple(share + (stage < extra) for stage in range(self.stages))

    @property
    def real_by_stage(self) -> tuple[int, ...]:
        """Return the real images per class that each stage's images start from.

        A stored image starts from ``factor``² real ones.
        """
        return tuple(images * self.factor**2 for images in self.ipc_by_stage)

    @property
    def transition_real_epochs(self) -> int:
        """Return the number of real epochs that are recorded after a transition.

        As in the published code, it is one more than matching can reach.
        """
        return self.method.trajectory_epochs + 1

    def to_dict(self) -> dict[str, Any]:
        """Return all settings in the form that :func:`from_dict` reads."""
        return self.model_dump()

    def flat(self) -> dict[str, Any]:
        """Return all settings by their flat names; ``method`` is the method's name."""
        return self.to_dict() | {"method": self.method.name} | self.method.own()

    def changed(self, **changes: Any) -> Settings:
        """Return a checked copy of these settings with ``changes``, by flat names.

        Raises:
            UsageError: A setting is unknown, or a value is not allowed.
        """
        return _build(self.flat() | changes, any_method=True)


def default(setting: str) -> Any:
    """Return the default of a setting of the run."""
    return DEFAULT_METHOD if setting == "method" else Settings.model_fields[setting].default


def choices(setting: str) -> tuple[str, ...]:
    """Return the allowed names of a setting of the run, without importing a method."""
    if setting == "method":
        return tuple(METHODS)
    return get_args(Settings.model_fields[setting].annotation)


def method_settings(name: str) -> type[MethodSettings]:
    """Return the class of the settings of method ``name``.

    Raises:
        UsageError: There is no such method here.
        ValueError: The method has a setting with the name of a run's setting.
    """
    if not METHODS:
        raise UsageError(
            "no method is installed: the entry points of the package are missing; install pdd-fast "
            "again with `pip install .`"
        )
    if name not in METHODS:
        raise UsageError(f"method must be {' or '.join(METHODS)}, got {name!r}")
    found: type[MethodSettings] = METHODS[name].Settings
    if both := sorted(set(found.model_fields) & set(Settings.model_fields)):
        raise ValueError(
            f"{found.__name__} must have settings of its own, got {' and '.join(both)}, which the "
            "run has; give another default in run_defaults"
        )
    return found


def resolve(recipe: str | None = None, **settings: Any) -> Settings:
    """Return the checked settings that follow from defaults, a recipe and explicit settings.

    Explicit settings override the recipe, and the recipe overrides the defaults. Strings are
    converted to the type of the setting. An explicit ``stage_ipc`` also sets ``stages`` and
    ``ipc``, unless they are explicit too.

    Args:
        recipe: Name from :func:`pdd_fast.recipes.names`, or a TOML file: a path that ends in .toml
            or contains a slash. A recipe is for one method. None: the recipe named after the
            dataset, or, for a method other than mtt, after both (digits-idc), if it exists.
        **settings: Explicit settings by flat names.

    Raises:
        UsageError: A setting is unknown, or a value is not allowed. The message about an unknown
            setting gives the nearest name.
    """
    dataset, method = (str(settings.get(key, default(key))) for key in ("dataset", "method"))
    own = dataset if method == DEFAULT_METHOD else f"{dataset}-{method}"
    if recipe is None and own in recipes.names():
        recipe = own
    of_recipe = _of_recipe(recipe) if recipe is not None else {"method": method}
    if "method" in settings and method != of_recipe["method"]:
        raise UsageError(
            f"method must be {of_recipe['method']} as in the recipe {recipe}, got {method}; "
            "--recipe list shows others"
        )
    merged = {**method_settings(of_recipe["method"]).run_defaults, **of_recipe, **settings}
    # The split determines the number of stages and images, unless they are explicit.
    if settings.get("stage_ipc"):
        split = _split(str(settings["stage_ipc"]))
        for key, value in (("stages", len(split)), ("ipc", sum(split))):
            if key not in settings:
                merged[key] = value
    return _build(merged)


def from_dict(stored: Mapping[str, Any]) -> Settings:
    """Return checked settings from the result of :meth:`Settings.to_dict`.

    Files from before methods had their own settings are accepted too. The method may be one that is
    not registered here.
    """
    if isinstance(stored.get("method"), Mapping):
        own = dict(stored["method"])
        name = own.pop("name", "")
        return _build({**stored, **own, "method": name}, any_method=True)
    flat = {_RENAMED.get(key, key): value for key, value in stored.items()}
    method = flat.get("method", DEFAULT_METHOD)
    if method in METHODS:  # such files hold the settings of all methods
        known = {"method", *Settings.model_fields, *_own_names(method)}
        flat = {key: v for key, v in flat.items() if key in known or not _owners(key)}
    return _build(flat, any_method=True)


def absolute(settings: Settings) -> Settings:
    """Return ``settings`` with absolute paths.

    The run can then be continued from any working directory.
    """
    dataset = settings.dataset
    changes: dict[str, Any] = {"dataset": paths.absolute_dataset(dataset)}
    if settings.experts_from:
        changes["experts_from"] = paths.absolute(settings.experts_from)
    if dataset != default("dataset") and not dataset.startswith(paths.FOLDER):  # of torchvision
        changes["data_dir"] = paths.absolute(settings.data_dir)
    return settings.changed(**changes)


def listed(text: str, read: Callable[[str], N]) -> tuple[N, ...]:
    """Return the comma-separated numbers in ``text``, or () if ``read`` refuses one."""
    try:
        return tuple(read(part.strip()) for part in text.split(","))
    except (ValueError, OverflowError):
        return ()


def numbers(setting: str, text: str) -> tuple[float, ...]:
    """Return the comma-separated non-negative numbers in ``text``.

    Raises:
        UsageError: The text contains something else.
    """
    found = listed(text, float)
    if not found or not all(math.isfinite(number) and number >= 0 for number in found):
        raise UsageError(
            f"{setting} must be numbers from 0 on, joined by commas, as in 1000,500,500, got "
            f"{text!r}"
        )
    return found


def _split(text: str) -> tuple[int, ...]:
    """Return the numbers in ``stage_ipc``."""
    found = listed(text, whole_number)
    if not found or min(found) < 1:
        raise UsageError(
            "stage_ipc must be whole numbers from 1 on, joined by commas, as in 4,2,2,1,1, got "
            f"{text!r}"
        )
    return found


def _build(flat: Mapping[str, Any], any_method: bool = False) -> Settings:
    """Return checked settings from flat names, each of which is the run's or the method's."""
    name = str(flat.get("method", DEFAULT_METHOD))
    rest = {key: value for key, value in flat.items() if key != "method"}
    run = {key: rest.pop(key) for key in Settings.model_fields if key in rest}
    if any_method and name not in METHODS:
        return checked(Settings, run | {"method": UnknownMethodSettings(name=name, **rest)})
    model = method_settings(name)
    for key, value in rest.items():
        if key not in model.model_fields or key == "name":
            raise UsageError(_unknown(key, value, name))
    return checked(Settings, run | {"method": checked(model, rest | {"name": name})})


def _unknown(key: str, value: Any, method: str) -> str:
    if key in _RENAMED:
        return f"unknown setting {key!r}; it is called {_RENAMED[key]!r}"
    if owners := _owners(key):
        return (
            f"{key} must be left out where method is {method}, got {value}; it is a setting of "
            f"{' and '.join(owners)}"
        )
    known = ["method", *Settings.model_fields, *_own_names(method)]
    others = [own for other in METHODS for own in _own_names(other)]
    return f"unknown setting {key!r}{nearest(key, known) or nearest(key, others)}"


def _owners(setting: str) -> list[str]:
    """Return the methods that have a setting."""
    return [name for name in METHODS if setting in _own_names(name)]


def _own_names(method: str) -> list[str]:
    return [name for name in method_settings(method).model_fields if name != "name"]


def _of_recipe(recipe: str) -> dict[str, Any]:
    """Return the settings of a recipe by flat names, including ``method``.

    Raises:
        UsageError: There is no such recipe, or a setting is in the wrong table.
    """
    run = recipes.load(recipe)
    own = run.pop("method", {})
    if not isinstance(own, dict):
        raise UsageError(
            f"recipe {recipe}: method must be a table with a name, as in [method] and "
            f'name = "{own}", got {own!r}'
        )
    method = str(own.pop("name", DEFAULT_METHOD))
    known = _own_names(method) if method in METHODS else []
    for key in run:
        if key in known:
            raise UsageError(f"recipe {recipe}: {key} must be in the table [method]")
    for key in own:
        if key in Settings.model_fields:
            raise UsageError(f"recipe {recipe}: {key} must be above the table [method]")
    return {**run, **own, "method": method}
