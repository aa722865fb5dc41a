"""What a run is asked to do: every setting with its default, recipes, overrides, checks."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from importlib import resources
from pathlib import PurePath
from typing import Any, TypeVar, get_type_hints

from pdd_fast.runtime import paths
from pdd_fast.runtime.errors import UsageError, nearest

N = TypeVar("N", int, float)


@dataclass(frozen=True)
class Config:
    """Settings of a run. Defaults are those of PDD on trajectory matching for CIFAR-10 at 10 images
    per class.
    """

    # what is asked for
    dataset: str = "digits"  # a name of pdd_fast.data.NAMES or imagefolder:DIR
    data_dir: str = "data"  # where torchvision finds its datasets
    method: str = "mtt"  # the method that a stage uses
    stages: int = 5
    ipc: int = 10  # images per class, all stages together
    stage_ipc: str = ""  # of these, what each stage adds, as in 4,2,2,1,1; "": as even as can be
    conditioning: str = (
        "on"  # on: a stage goes on from the earlier ones; off: each is made as the first is
    )
    seed: int = 0

    # data
    validation_fraction: float = 0.1  # of the training images, for the validation split
    normalization: str = (
        "fitted"  # of images that are not whitened: by constants fitted to them, or published ones
    )
    whitening: str = "none"  # of all images' pixels in [0, 1], before anything else: none, or zca
    whitening_epsilon: float = 0.1  # zca: added to every eigenvalue of the covariance
    selection_split: str = (
        "validation"  # what the best images are chosen by: validation, or test (the papers' choice)
    )
    augment: str = "color_crop_cutout_flip_scale_rotate"  # DSA strategy, or none
    augment_mode: str = "single"

    # which real examples a stage is made from all; by how often the experts forget them
    # (forgetting); or those that not every transition got right (learned)
    filter: str = "none"
    # of forgetting's scores; stage s takes those from (s - 1) of it to s of it, the last all from
    # there on
    filter_band: float = 10.0

    # network
    width: int = 128
    depth: int = 3

    # experts
    num_experts: int = 100
    experts_from: str = (
        ""  # a run, or a folder with trajectories or MTT's replay_buffer_*.pt; "": they are trained
    )
    expert_train_epochs: int = 50
    expert_lr: float = 0.01
    expert_momentum: float = 0.0
    expert_batch: int = 256

    # matching
    iterations: int = 5000  # of a stage
    inner_steps: int = 50  # N, the unrolled SGD steps
    expert_epochs: int = 2  # how far ahead of the start the target lies
    max_start_epoch: int = 5
    inner_batch: int = 0  # images of an inner step; 0: as many as the stage makes
    trajectories_per_step: int = 1  # of an iteration, whose mean gradient is taken
    lr_img: float = 1000.0
    stage_lr_img: str = ""  # lr_img of each stage, as in 1000,500,500; "": lr_img in all
    lr_lr: float = 1e-7
    labels: str = (
        "hard"  # classes; or probabilities: soft (what the experts say), or learned (from there on)
    )
    lr_label: float = 10.0  # of learned labels, which are the softmax of what is learned
    inner_lr: float = 0.01  # where the learned rate starts in every stage
    momentum: float = 0.5  # of images and rate
    max_grad_norm: float = (
        0.0  # largest norm of the images' gradient, to which longer ones are scaled down; 0: any
    )
    # the stage gives an average of its images over iterations, of which so much stays in each; 0:
    # the last
    ema_decay: float = 0.0
    # how often a stage is set back, its steps halved, where images or rate left the range, before
    # it fails
    max_rollbacks: int = 5
    factor: int = (
        1  # idc, dm: each stored image holds so many smaller ones a side, enlarged for training
    )
    distance: str = "squared"  # idc: of gradients; squared, or cosine (layer by layer)
    real_batch: int = 64  # idc, dm: real images of a class that synthetic ones are matched to
    synthetic_batch: int = (
        128  # idc, dm: synthetic images of a class, of the whole union and enlarged, at most
    )
    inner_loops: int = (
        100  # idc: updates of the images in an iteration, each followed by one of its network
    )
    network_images: int = (
        2000  # idc: real images that the network is trained on after each, in steps of union_batch
    )
    start_networks: int = (
        0  # idc, dm: networks of a stage, taken in turn; 0: a new one for every iteration
    )
    cutmix: float = 0.5  # idc, dm: how often a step of those networks' training mixes its images
    engine: str = "auto"
    # activations of inner steps: recompute, cache (keep all), or auto (keep up to a limit)
    memory: str = "recompute"
    memory_limit: float = (
        0.0  # of memory=auto, gigabytes (10^9 bytes); 0: half of the device's memory
    )

    # selection, transition, evaluation: SGD on the synthetic images
    eval_every: int = 100  # iterations; 0: only at the end of the stage
    eval_networks: int = 5
    eval_epochs: int = 1000
    transition_epochs: int = 1000
    union_epochs: int = 500  # epochs on each union when it is judged
    union_batch: int = 256
    union_momentum: float = 0.9
    union_weight_decay: float = 5e-4
    repeats: int = 5  # fresh networks in the final evaluation

    # running
    device: str = "auto"
    # of convolutions: float32, tf32 or bfloat16; auto: tf32 on a GPU, float32 on the CPU
    precision: str = "auto"
    convolution: str = (
        "auto"  # of the fused engine on the CPU: direct, winograd (faster, rounds more), or auto
    )
    side_by_side: int = (
        0  # networks trained at once; 0: 1 on the CPU, up to 16 on a GPU. Others round differently
    )
    # whether a GPU replays captured graphs of launches: auto, or off. The bits are the same
    graph: str = "auto"
    threads: int = 0  # of the CPU; 0: as many as torch takes. Another number may round differently
    checkpoint_seconds: float = 30.0  # how often unfinished work is saved

    @property
    def ipc_by_stage(self) -> tuple[int, ...]:
        """Images per class that each stage adds; the earlier stages take what does not divide
        evenly.
        """
        if self.stage_ipc:
            return _split(self.stage_ipc)
        share, extra = divmod(self.ipc, self.stages)
        return tuple(share + (stage < extra) for stage in range(self.stages))

    @property
    def real_by_stage(self) -> tuple[int, ...]:
        """Real images per class that each stage's images start from: one for each that a stored
        image holds.
        """
        return tuple(images * self.factor**2 for images in self.ipc_by_stage)

    @property
    def lr_img_by_stage(self) -> tuple[float, ...]:
        """The images' learning rate of each stage."""
        return _numbers(self.stage_lr_img) if self.stage_lr_img else (self.lr_img,) * self.stages

    @property
    def transition_real_epochs(self) -> int:
        """Real epochs that are recorded after a transition (published code: one more than matching
        can reach).
        """
        return self.max_start_epoch + self.expert_epochs + 1

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


_TYPES = get_type_hints(Config)
# Settings of runs from before 0.1, and what they are called now.
_RENAMED = {
    "base": "method",
    "select": "selection_split",
    "guard": "max_rollbacks",
    "clip": "max_grad_norm",
    "ema": "ema_decay",
    "experts": "num_experts",
    "trajectories": "trajectories_per_step",
}
CHOICES: dict[str, tuple[str, ...]] = {  # of settings that are one of a few names
    "method": ("mtt", "idc", "dm"),  # pdd_fast.methods.register adds to it
    "conditioning": ("on", "off"),
    "normalization": ("fitted", "published"),
    "whitening": ("none", "zca"),
    "filter": ("none", "forgetting", "learned"),
    "selection_split": ("validation", "test"),
    "augment_mode": ("single", "multiple"),
    "labels": ("hard", "soft", "learned"),
    "distance": ("squared", "cosine"),
    "engine": ("auto", "fused", "autograd"),
    "memory": ("recompute", "cache", "auto"),
    "precision": ("auto", "float32", "tf32", "bfloat16"),
    "convolution": ("auto", "direct", "winograd"),
    "graph": ("auto", "off"),
}
_AUGMENTATIONS = (
    "color",
    "crop",
    "cutout",
    "flip",
    "scale",
    "rotate",
)  # as in ops/dsa.py, which imports torch
_AT_LEAST: dict[str, float] = {
    "stages": 1,
    "ipc": 1,
    "width": 1,
    "depth": 1,
    "num_experts": 1,
    "expert_train_epochs": 1,
    "expert_batch": 1,
    "iterations": 0,
    "inner_steps": 1,
    "expert_epochs": 1,
    "max_start_epoch": 0,
    "inner_batch": 0,
    "eval_every": 0,
    "eval_networks": 1,
    "eval_epochs": 1,
    "transition_epochs": 1,
    "union_epochs": 1,
    "union_batch": 1,
    "repeats": 1,
    "seed": 0,
    "lr_img": 0,
    "lr_lr": 0,
    "lr_label": 0,
    "momentum": 0,
    "expert_momentum": 0,
    "union_momentum": 0,
    "union_weight_decay": 0,
    "checkpoint_seconds": 0,
    "threads": 0,
    "side_by_side": 0,
    "memory_limit": 0,
    "trajectories_per_step": 1,
    "max_grad_norm": 0,
    "ema_decay": 0,
    "max_rollbacks": 0,
    "factor": 1,
    "real_batch": 1,
    "synthetic_batch": 1,
    "inner_loops": 1,
    "network_images": 0,
    "start_networks": 0,
    "cutmix": 0,
}
_BELOW: dict[str, float] = {
    "validation_fraction": 1,
    "momentum": 1,
    "ema_decay": 1,
    "expert_momentum": 1,
    "union_momentum": 1,
}
# What a method leaves of other settings. Some have no experts, whose words soft labels are,
# and no transitions, which are asked what is learned; those work on pixels in [0, 1].
_ON_PIXELS: dict[str, tuple[Any, ...]] = {
    "labels": ("hard",),
    "whitening": ("none",),
    "filter": ("none", "forgetting"),
    "trajectories_per_step": (1,),
    "max_grad_norm": (0.0,),
    "ema_decay": (0.0,),
}
# What stands where neither a recipe nor anybody says otherwise: of IDC's published runs at 10
# images a class; of DM in stages none is known. A rate for trajectories would drive pixels to 0 and
# 1, where nothing says that it went wrong.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "idc": {
        "lr_img": 1e-3,
        "iterations": 2000,
        "augment": "color_crop_cutout",
        "augment_mode": "multiple",
        "eval_every": 0,
        "eval_epochs": 500,
        "transition_epochs": 200,
    },
    "dm": {"lr_img": 0.1, "iterations": 2000, "transition_epochs": 200},
}
_OF_BASE: dict[str, dict[str, tuple[Any, ...]]] = {
    "mtt": {"factor": (1,)},
    "idc": _ON_PIXELS,
    "dm": _ON_PIXELS,
}
_ABOVE: dict[str, float] = {
    "filter_band": 0,
    "expert_lr": 0,
    "inner_lr": 0,
    "validation_fraction": 0,
    "whitening_epsilon": 0,
}


def recipe_names() -> list[str]:
    """Names of the recipes in the package."""
    folder = resources.files("pdd_fast.recipes")
    return sorted(
        entry.name.removesuffix(".toml")
        for entry in folder.iterdir()
        if entry.name.endswith(".toml")
    )


def load_recipe(name: str) -> dict[str, Any]:
    """The settings of a recipe, unchecked.

    Raises:
        UsageError: there is no such recipe.
    """
    names = recipe_names()
    if name not in names:
        raise UsageError(
            f"recipe must be one of {', '.join(names)}, got {name!r}{nearest(name, names)}"
        )
    return tomllib.loads(
        (resources.files("pdd_fast.recipes") / f"{name}.toml").read_text(encoding="utf-8")
    )


def recipe_title(name: str) -> str:
    """What a recipe is for: its first line."""
    text = (resources.files("pdd_fast.recipes") / f"{name}.toml").read_text(encoding="utf-8")
    return text.partition("\n")[0].removeprefix("#").strip()


def resolve(recipe: str | None = None, **settings: Any) -> Config:
    """Defaults, then the recipe, then ``settings``; checked. Strings are converted to a setting's
    type.

    A recipe is for its method. Without ``recipe``, the one named like the dataset is taken
    where there is one, and for another method than mtt the one named like both (digits-idc).
    ``stages`` and ``ipc`` follow from ``stage_ipc`` where that is among ``settings`` and they are
    not.

    Raises:
        UsageError: an unknown setting (with the nearest name), or a value that cannot be.
    """
    dataset, method = (
        str(settings.get(key, getattr(Config, key))) for key in ("dataset", "method")
    )
    own = dataset if method == Config.method else f"{dataset}-{method}"
    if recipe is None and own in recipe_names():
        recipe = own
    of_recipe = load_recipe(recipe) if recipe is not None else {}
    for_method = str(of_recipe.get("method", Config.method))
    if recipe is not None and "method" in settings and method != for_method:
        raise UsageError(
            f"method must be {for_method} as in the recipe {recipe}, got {method}; --recipe list "
            f"shows "
            f"others"
        )
    merged = _DEFAULTS.get(str(of_recipe.get("method", method)), {}) | of_recipe | settings
    if settings.get(
        "stage_ipc"
    ):  # says how many stages and images there are, where nobody else does
        split = _split(str(settings["stage_ipc"]))
        merged |= {
            key: value
            for key, value in (("stages", len(split)), ("ipc", sum(split)))
            if key not in settings
        }
    config = replace(Config(), **{key: _convert(key, value) for key, value in merged.items()})
    _check(config)
    return config


def from_dict(stored: dict[str, Any]) -> Config:
    """A configuration as :meth:`Config.to_dict` gave it, checked again; ``method`` may be a method
    that is not registered here, because looking at a run needs none.
    """
    named = {_RENAMED.get(key, key): value for key, value in stored.items()}
    config = replace(Config(), **{key: _convert(key, value) for key, value in named.items()})
    _check(config, any_method=True)
    return config


def absolute(config: Config) -> Config:
    """``config`` with paths that hold from any working directory, so that a run can be continued
    from another one.
    """
    changes: dict[str, Any] = {"dataset": paths.absolute_dataset(config.dataset)}
    if config.experts_from:
        changes["experts_from"] = paths.absolute(config.experts_from)
    if config.dataset != Config.dataset and not config.dataset.startswith(
        paths.FOLDER
    ):  # torchvision's
        changes["data_dir"] = paths.absolute(config.data_dir)
    return replace(config, **changes)


def listed(text: str, read: Callable[[str], N]) -> tuple[N, ...]:
    """Numbers joined by commas; none where ``read`` refuses one of them."""
    try:
        return tuple(read(part.strip()) for part in text.split(","))
    except (ValueError, OverflowError):
        return ()


def _split(text: str) -> tuple[int, ...]:
    """The numbers of ``stage_ipc``."""
    found = listed(text, _whole)
    if not found or min(found) < 1:
        raise UsageError(
            f"stage_ipc must be whole numbers from 1 on, joined by commas, as in 4,2,2,1,1, got "
            f"{text!r}"
        )
    return found


def _numbers(text: str) -> tuple[float, ...]:
    """The numbers of ``stage_lr_img``."""
    found = listed(text, float)
    if not found or not all(math.isfinite(number) and number >= 0 for number in found):
        raise UsageError(
            f"stage_lr_img must be numbers from 0 on, joined by commas, as in 1000,500,500, got "
            f"{text!r}"
        )
    return found


def _convert(key: str, value: Any) -> Any:
    if key in _RENAMED:
        raise UsageError(f"unknown setting {key!r}; it is called {_RENAMED[key]!r}")
    if key not in _TYPES:
        raise UsageError(f"unknown setting {key!r}{nearest(key, list(_TYPES))}")
    wanted = _TYPES[key]
    try:
        if wanted is int and not isinstance(value, bool):
            return _whole(value)
        if wanted is float and not isinstance(value, bool):
            return float(value)
        if wanted is str and isinstance(value, str | PurePath):
            return str(value)
    except (TypeError, ValueError, OverflowError):
        pass
    name = {int: "a whole number", float: "a number", str: "text"}[wanted]
    raise UsageError(f"{key} must be {name}, got {value!r}")


def _whole(value: Any) -> int:
    """Raises TypeError, ValueError or OverflowError where ``value`` is not a whole number; "1e3" is
    one.
    """
    if isinstance(value, str):
        try:
            return int(
                value
            )  # not by way of float, in which whole numbers are exact up to 2^53 only
        except ValueError:
            value = float(value)
    if value != int(value):
        raise ValueError
    return int(value)


def _check(config: Config, any_method: bool = False) -> None:
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{field.name} must be a finite number, got {value}")
    for key, choices in CHOICES.items():
        value = getattr(config, key)
        if value not in choices and not (any_method and key == "method"):
            raise UsageError(f"{key} must be {' or '.join(choices)}, got {value!r}")
    names = [] if config.augment.lower() in ("", "none") else config.augment.split("_")
    if not set(names) <= set(_AUGMENTATIONS) or len(set(names)) < len(names):
        raise UsageError(
            f"augment must join names of {', '.join(_AUGMENTATIONS)} by '_', each once at most, "
            f"or be none, got "
            f"{config.augment!r}"
        )
    for key, least in _AT_LEAST.items():
        if getattr(config, key) < least:
            raise UsageError(f"{key} must be at least {least:g}, got {getattr(config, key)}")
    for key, bound in _BELOW.items():
        if getattr(config, key) >= bound:
            raise UsageError(f"{key} must be below {bound:g}, got {getattr(config, key)}")
    for key, bound in _ABOVE.items():
        if getattr(config, key) <= bound:
            raise UsageError(f"{key} must be above {bound:g}, got {getattr(config, key)}")
    if (
        config.factor > 1 and config.labels != "hard"
    ):  # what experts say of several images in one is no label of each
        raise UsageError(f"factor must be 1 where labels are {config.labels}, got {config.factor}")
    if config.cutmix > 1:
        raise UsageError(f"cutmix must be at most 1, got {config.cutmix}")
    for key, allowed in _OF_BASE.get(config.method, {}).items():
        if getattr(config, key) not in allowed:
            wanted = " or ".join(map(str, allowed))
            raise UsageError(
                f"{key} must be {wanted} where method is {config.method}, got "
                f"{getattr(config, key)}"
            )
    if config.memory == "cache" and config.memory_limit:
        raise UsageError(
            f"memory_limit must be 0 where memory is cache, which keeps everything, got "
            f"{config.memory_limit:g}; "
            "set memory=auto"
        )
    if config.stage_ipc and (len(config.ipc_by_stage), sum(config.ipc_by_stage)) != (
        config.stages,
        config.ipc,
    ):
        raise UsageError(
            f"stage_ipc must hold a number for each of the stages ({config.stages}) and add up to "
            f"ipc ({config.ipc}), "
            f"got {config.stage_ipc}"
        )
    if config.stage_lr_img and len(config.lr_img_by_stage) != config.stages:
        raise UsageError(
            f"stage_lr_img must hold a number for each of the stages ({config.stages}), got "
            f"{config.stage_lr_img}"
        )
    if config.filter == "learned" and config.conditioning == "off":
        raise UsageError(
            "conditioning must be on where filter is learned, got off: what is learned is asked "
            "of networks that were "
            "trained on the earlier stages"
        )
    if config.stages > config.ipc:
        raise UsageError(
            f"stages must be at most ipc ({config.ipc}), got {config.stages}: a stage adds an "
            f"image a class"
        )
    if config.max_start_epoch + config.expert_epochs > config.expert_train_epochs:
        raise UsageError(
            f"expert_train_epochs must be at least max_start_epoch + expert_epochs "
            f"({config.max_start_epoch} + {config.expert_epochs}), got {config.expert_train_epochs}"
        )
