"""Settings of a run, and how defaults, a recipe and explicit settings become one object.

A method's settings are defined beside the method and found by its name (docs/method.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self, get_args

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from pdd_fast import recipes
from pdd_fast.runtime import choices as names
from pdd_fast.runtime import paths
from pdd_fast.runtime.errors import UsageError
from pdd_fast.runtime.method_settings import (
    DEFAULT_METHOD,
    MethodSettings,
    own_settings,
    settings_class,
    upgraded,
)
from pdd_fast.runtime.models import SettingsModel, checked, whole_numbers
from pdd_fast.runtime.registry import METHODS

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
        "", description="Images per class added by each stage, e.g. 4,2,2,1,1; empty: split evenly."
    )
    conditioning: Literal["on", "off"] = Field(
        "on", description="Distill a stage given the earlier ones (on), or each on its own (off)."
    )
    seed: int = Field(0, ge=0, description="Seed of all random values.")

    validation_fraction: float = Field(
        0.1, gt=0, lt=1, description="Fraction of the training images in the validation split."
    )
    normalization: names.Normalization = Field(
        "fitted",
        description="Constants that normalize unwhitened images: fitted to the data or published.",
    )
    whitening: names.Whitening = Field(
        "none", description="Whitening of the pixels, applied first: none or zca."
    )
    whitening_epsilon: float = Field(
        0.1, gt=0, description="Constant that zca adds to the covariance's eigenvalues."
    )
    selection_split: Literal["validation", "test"] = Field(
        "validation",
        description="Split that selects the best images: validation, or test as in the papers.",
    )
    augment: str = Field(
        "color_crop_cutout_flip_scale_rotate",
        description="DSA strategy: names of operations joined by '_', or none.",
    )
    augment_mode: Literal["single", "multiple"] = Field(
        "single",
        description="Operations of the strategy per image: one (single) or all (multiple).",
    )
    filter: Literal["none", "forgetting", "learned"] = Field(
        "none",
        description="Real examples of a stage: all (none), those in its band of forgetting scores "
        "(forgetting), or those that some transition has not learned (learned).",
    )
    filter_band: float = Field(
        10.0,
        gt=0,
        description="Width of a stage's band of forgetting scores; stage s uses scores in "
        "[(s - 1) * band, s * band); the last stage has no upper bound.",
    )
    labels: names.Labels = Field(
        "hard",
        description="Label type: hard, soft (expert predictions), learned (initialized from soft).",
    )
    factor: int = Field(
        1, ge=1, description="Multi-formation: a stored image holds factor x factor smaller ones."
    )

    width: int = Field(128, ge=1, description="Channels of the ConvNet's blocks.")
    depth: int = Field(3, ge=1, description="Blocks of the ConvNet.")

    num_experts: int = Field(100, ge=1, description="Number of experts.")
    experts_from: str = Field(
        "",
        description="Run or folder with experts: trajectories, or MTT's replay_buffer_*.pt; empty: "
        "train experts.",
    )
    expert_train_epochs: int = Field(50, ge=1, description="Epochs of expert training.")
    expert_lr: float = Field(0.01, gt=0, description="Learning rate of experts.")
    expert_momentum: float = Field(0.0, ge=0, lt=1, description="Momentum of experts.")
    expert_batch: int = Field(256, ge=1, description="Batch size of experts, images.")

    iterations: int = Field(5000, ge=0, description="Iterations of a stage.")
    inner_lr: float = Field(
        0.01,
        gt=0,
        description="Learning rate on synthetic images; the initial one if it is learned.",
    )
    engine: names.EngineName = Field(
        "auto", description="Engine that computes gradients; auto: fused if the network allows it."
    )

    eval_every: int = Field(
        100, ge=0, description="Iterations between selections; 0: only at the end of a stage."
    )
    eval_networks: int = Field(5, ge=1, description="Networks trained in each selection.")
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
        description="Networks to train in parallel; 0: 1 on the CPU, up to 16 on a GPU. The bits "
        "are equal.",
    )
    graph: Literal["auto", "off"] = Field(
        "auto", description="CUDA graphs on a GPU: auto or off. Both give the same bits."
    )
    threads: int = Field(
        0, ge=0, description="CPU threads; 0: torch's default. Results differ by rounding."
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
            return whole_numbers("stage_ipc", self.stage_ipc)
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
    return settings_class(name, run_names=Settings.model_fields)


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
    if recipe is None:
        recipe = recipes.named_after(dataset, method)
    of_recipe = (
        {"method": method} if recipe is None else recipes.flat(recipe, Settings.model_fields)
    )
    if "method" in settings and method != of_recipe["method"]:
        raise UsageError(
            f"method must be {of_recipe['method']} as in the recipe {recipe}, got {method}; "
            "--recipe list shows others"
        )
    counts: dict[str, int] = {}
    if settings.get("stage_ipc"):
        split = whole_numbers("stage_ipc", str(settings["stage_ipc"]))
        counts = {"stages": len(split), "ipc": sum(split)}
    of_method = method_settings(of_recipe["method"]).run_defaults
    return _build({**of_method, **of_recipe, **counts, **settings})


def from_dict(stored: Mapping[str, Any]) -> Settings:
    """Return checked settings from the result of :meth:`Settings.to_dict`.

    Files from before methods had their own settings are accepted too. The method may be one that is
    not registered here.
    """
    if isinstance(stored.get("method"), Mapping):
        own = dict(stored["method"])
        name = own.pop("name", "")
        return _build({**stored, **own, "method": name}, any_method=True)
    return _build(upgraded(stored, Settings.model_fields), any_method=True)


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


def _build(flat: Mapping[str, Any], any_method: bool = False) -> Settings:
    """Return checked settings from flat names, each of which is the run's or the method's."""
    own = dict(flat)
    name = str(own.pop("method", DEFAULT_METHOD))
    run = {key: own.pop(key) for key in Settings.model_fields if key in own}
    method = own_settings(name, own, Settings.model_fields, any_method)
    return checked(Settings, run | {"method": method})
