"""Settings: defaults, recipes, conversion of what people type, and every bound."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdd_fast import recipes
from pdd_fast.augmentation.dsa import DSA
from pdd_fast.ops.dsa import OPERATIONS
from pdd_fast.runtime.errors import UsageError
from pdd_fast.runtime.registry import METHODS, Registry
from pdd_fast.settings import Settings, choices, default, from_dict, method_settings, resolve

# Every setting with the method that it is tried with: the run's with mtt, a method's with its own.
FIELDS = {
    (method, name): field
    for method in METHODS
    for model in (method_settings(method), *([Settings] if method == "mtt" else []))
    for name, field in model.model_fields.items()
    if name not in ("name", "method")
}
IDS = [f"{method}-{name}" for method, name in FIELDS]
TYPES = {
    key: str if get_origin(field.annotation) is Literal else field.annotation
    for key, field in FIELDS.items()
}
NUMBERS = [key for key in FIELDS if TYPES[key] is not str]


def bounds(kind: str) -> list[tuple[str, str, float]]:
    """Method, setting and limit of every bound of a kind: ge, gt, le or lt."""
    return [
        (*key, getattr(limit, kind))
        for key, field in FIELDS.items()
        for limit in field.metadata
        if hasattr(limit, kind)
    ]


CHOICES = {key: get_args(f.annotation) for key, f in FIELDS.items() if get_args(f.annotation)}
# Within every bound that links two settings, and of no recipe, so that one setting at a time can be
# tried.
RUN: dict[str, Any] = {"dataset": "mnist-like", "stages": 1, "ipc": 1, "expert_train_epochs": 1}
SMALL: dict[str, Any] = RUN | {"max_start_epoch": 0, "expert_epochs": 1}


def with_one(method: str, **changes: Any) -> Settings:
    """Small settings with ``changes``."""
    return resolve(**(SMALL if method == "mtt" else RUN | {"method": method}) | changes)


def value(settings: Settings, name: str) -> Any:
    """The value of a setting by its flat name."""
    return settings.flat()[name]


# ---- defaults and recipes ----


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_resolves_to_what_it_says(name: str) -> None:
    found, recipe = resolve(name).to_dict(), recipes.load(name)
    own = recipe.pop("method")
    assert recipe, "a recipe that sets nothing is none"
    assert {key: found[key] for key in recipe} == recipe
    assert {key: found["method"][key] for key in own} == own
    for (method, key), kind in TYPES.items():
        if key in found and method == "mtt":
            assert type(found[key]) is kind
        if key in found["method"] and method == own["name"]:
            assert type(found["method"][key]) is kind


def test_the_defaults_stand_where_nothing_else_is_asked_for() -> None:
    assert resolve(dataset="cifar-like") == Settings(dataset="cifar-like")
    assert from_dict({}) == Settings()
    assert Settings().method == method_settings("mtt")(name="mtt")


def test_the_recipe_of_the_data_set_is_taken_unless_another_is_named() -> None:
    assert resolve(dataset="digits") == resolve("digits") == resolve()
    assert resolve("digits", dataset="mnist-like").width == recipes.load("digits")["width"]
    assert resolve("digits", dataset="mnist-like").dataset == "mnist-like"
    assert resolve(dataset="mnist-like").width == default("width")


def test_settings_go_before_the_recipe() -> None:
    assert recipes.load("digits")["iterations"] != 3
    assert resolve("digits", iterations=3).iterations == 3


@pytest.mark.parametrize(
    ("name", "hint"), [("digit", "; did you mean 'digits'?"), ("", ""), ("xyzzy", "")]
)
def test_an_unknown_recipe_is_answered_with_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(
        UsageError, match=rf"recipe must be one of .*digits.*, got '{name}'{re.escape(hint)}$"
    ):
        resolve(name)


# Chen et al., ICLR 2024, as their published code has it: images a class and stage, N,
# expert_epochs, max_start_epoch, lr_img, lr_lr, images of an inner step, whitening, depth.
PUBLISHED: dict[str, tuple[Any, ...]] = {
    "cifar10-ipc10": (2, 50, 2, 5, 1000, 1e-7, 20, "zca", 3),
    "cifar10-ipc10-filter": (2, 50, 2, 5, 1000, 1e-7, 20, "zca", 3),
    "cifar10-ipc50": (10, 30, 2, 15, 1000, 1e-5, 100, "zca", 3),
    "cifar100-ipc10": (2, 20, 3, 20, 1000, 1e-5, 200, "zca", 3),
    "cifar100-ipc50": (10, 20, 2, 20, 1000, 1e-5, 512, "zca", 3),
    "tiny-ipc10": (2, 20, 2, 20, 10000, 1e-4, 64, "none", 4),
    "tiny-ipc50": (10, 20, 2, 20, 10000, 1e-4, 64, "none", 4),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_papers_recipes_are_the_papers(name: str) -> None:
    c = resolve(name)
    m: Any = c.method
    row = (
        m.inner_steps,
        m.expert_epochs,
        m.max_start_epoch,
        m.lr_img,
        m.lr_lr,
        m.inner_batch,
        c.whitening,
        c.depth,
    )
    assert (c.ipc_by_stage[0], *row) == PUBLISHED[name]
    assert c.ipc_by_stage == 5 * c.ipc_by_stage[:1]
    assert (c.num_experts, c.expert_train_epochs) == (100, 24 if name.startswith("tiny") else 50)
    assert (c.expert_lr, c.expert_momentum, c.expert_batch, c.inner_lr, m.momentum) == (
        0.01,
        0,
        256,
        0.01,
        0.5,
    )
    assert (c.iterations, c.eval_every, c.eval_networks, c.eval_epochs) == (5000, 100, 5, 1000)
    assert (c.transition_epochs, c.union_epochs, c.union_momentum, c.union_weight_decay) == (
        1000,
        500,
        0.9,
        5e-4,
    )
    assert (c.width, c.augment, c.augment_mode) == (
        128,
        "color_crop_cutout_flip_scale_rotate",
        "single",
    )
    assert (c.whitening_epsilon, c.normalization) == (0.1, "published")


def test_the_recipe_with_the_filter_is_the_one_without_but_for_the_filter() -> None:
    plain = resolve("cifar10-ipc10")
    assert plain.filter == "none"
    assert resolve("cifar10-ipc10-filter") == plain.changed(filter="forgetting", filter_band=10.0)


# The same, on IDC: images a class and stage, and the rate of the images.
IDC = {
    "cifar10-idc-ipc10": (2, 1e-3),
    "cifar10-idc-ipc50": (10, 5e-3),
    "cifar100-idc-ipc10": (2, 1e-3),
    "cifar100-idc-ipc50": (10, 5e-3),
}


@pytest.mark.parametrize("name", IDC)
def test_the_papers_recipes_on_idc_are_the_papers(name: str) -> None:
    c = resolve(name)
    m: Any = c.method
    assert (c.ipc_by_stage, m.lr_img) == (5 * (IDC[name][0],), IDC[name][1])
    assert m.lr_img == pytest.approx(5e-3 * c.ipc_by_stage[0] / 10)
    assert (m.name, c.factor, c.iterations, m.inner_loops, m.start_networks) == (
        "idc",
        2,
        2000,
        100,
        0,
    )
    assert (m.real_batch, m.synthetic_batch, m.network_images, m.distance) == (
        64,
        128,
        2000,
        "squared",
    )
    assert (c.transition_epochs, c.inner_lr, c.union_momentum, c.union_weight_decay) == (
        200,
        0.01,
        0.9,
        5e-4,
    )
    assert (m.momentum, m.cutmix, c.union_epochs) == (0.5, 0.5, 500)
    assert (c.augment, c.augment_mode) == ("color_crop_cutout", "multiple")
    assert (c.width, c.depth, c.whitening, c.dataset) == (128, 3, "none", name.partition("-")[0])
    assert c.normalization == "published"


def test_a_base_method_has_a_recipe_of_its_own() -> None:
    assert resolve(method="idc") == resolve("digits-idc")
    assert resolve(method="dm") == resolve("digits-dm")
    with pytest.raises(
        UsageError, match="method must be mtt as in the recipe digits, got idc; --recipe list"
    ):
        resolve("digits", method="idc")
    assert resolve("digits-dm", method="dm") == resolve("digits-dm")


def test_a_base_method_has_defaults_of_its_own_where_there_is_no_recipe() -> None:
    """At the rate for trajectories pixels would be driven to 0 and 1."""
    published = resolve("cifar10-idc-ipc10")
    own = resolve(dataset="mnist-like", method="idc")
    for key in (
        "lr_img",
        "iterations",
        "augment",
        "augment_mode",
        "eval_every",
        "eval_epochs",
        "transition_epochs",
    ):
        assert value(own, key) == value(published, key) != value(Settings(), key)
    assert value(resolve(dataset="mnist-like", method="dm"), "lr_img") == 0.1
    assert value(resolve(dataset="mnist-like", method="dm", lr_img=3), "lr_img") == 3
    assert resolve(dataset="mnist-like") == Settings(dataset="mnist-like")


def test_a_stored_configuration_may_have_a_base_method_that_is_not_known_here() -> None:
    method = {"name": "elsewhere", "sharpness": 2.5}
    stored = Settings().to_dict() | {"method": method}
    found = from_dict(stored)
    assert (found.method.name, found.to_dict()) == ("elsewhere", stored)
    assert found.changed(repeats=3).to_dict() == stored | {"repeats": 3}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "idc", "labels": "soft"}, "labels must be hard where method is idc, got soft"),
        (
            {"method": "dm", "labels": "learned"},
            "labels must be hard where method is dm, got learned",
        ),
        (
            {"method": "idc", "whitening": "zca"},
            "whitening must be none where method is idc, got zca",
        ),
        ({"method": "mtt", "factor": 2}, "factor must be 1 where method is mtt, got 2"),
        (
            {"method": "idc", "filter": "learned"},
            "filter must be none or forgetting where method is idc, got learned",
        ),
        (
            {"method": "idc", "max_grad_norm": 1},
            "max_grad_norm must be left out where method is idc, got 1; it is a setting of mtt$",
        ),
        (
            {"method": "dm", "ema_decay": 0.5},
            r"ema_decay must be left out where method is dm, got 0\.5; it is a setting of mtt$",
        ),
        (
            {"method": "dm", "trajectories_per_step": 2},
            "trajectories_per_step must be left out where method is dm, got 2; it is a setting of "
            "mtt$",
        ),
        (
            {"cutmix": 0.1},
            r"cutmix must be left out .* mtt, got 0\.1; it is a setting of dm and idc$",
        ),
        ({"method": "idc", "cutmix": 1.5}, r"cutmix must be at most 1, got 1\.5"),
    ],
)
def test_settings_that_a_base_method_cannot_have_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(**settings)


def test_every_recipe_is_pinned_or_ours() -> None:
    assert set(recipes.names()) == {
        *PUBLISHED,
        *IDC,
        "digits",
        "digits-idc",
        "digits-dm",
        "cifar10-small",
    }
    for name in recipes.names():
        assert recipes.title(name).endswith(".")


# ---- names and conversion ----


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("iteration", "iterations"),
        ("inner_step", "inner_steps"),
        ("lr_imgs", "lr_img"),
        ("IPC", "ipc"),
        ("wdith", "width"),
    ],
)
def test_an_unknown_setting_is_answered_with_the_nearest(key: str, nearest: str) -> None:
    settings: dict[str, Any] = {key: 1}
    message = rf"^unknown setting '{key}'; did you mean '{nearest}'\?$"
    with pytest.raises(UsageError, match=message):
        resolve(**settings)
    with pytest.raises(UsageError, match=message):
        from_dict(settings)


def test_a_setting_like_no_other_is_answered_without_a_guess() -> None:
    with pytest.raises(UsageError, match=r"unknown setting 'xyzzy'$"):
        resolve(xyzzy=1)


@pytest.mark.parametrize(("method", "name"), FIELDS, ids=IDS)
def test_what_is_typed_is_what_is_set(method: str, name: str) -> None:
    wanted = value(with_one(method), name)
    typed = value(with_one(method, **{name: str(wanted)}), name)
    assert (typed, type(typed)) == (wanted, TYPES[method, name])


@pytest.mark.parametrize(("method", "name"), FIELDS, ids=IDS)
def test_every_setting_says_in_a_sentence_what_it_does(method: str, name: str) -> None:
    description = FIELDS[method, name].description
    assert description is not None
    assert re.fullmatch(r"[A-Z].*[^.]\.", description)


def test_a_setting_is_the_runs_or_the_methods() -> None:
    for method in METHODS:
        own = set(method_settings(method).model_fields)
        assert not own & set(Settings.model_fields)


@given(st.integers(0, 10**30))
def test_whole_numbers_keep_every_digit(seed: int) -> None:
    assert (
        resolve(seed=seed).seed
        == resolve(seed=str(seed)).seed
        == resolve(seed=f" {seed} ").seed
        == seed
    )


@given(st.floats(min_value=0, allow_infinity=False))
def test_numbers_keep_every_bit(number: float) -> None:
    found = (resolve(lr_img=given).flat()["lr_img"] for given in (number, repr(number)))
    assert list(found) == [number, number]


@pytest.mark.parametrize(
    ("typed", "value"),
    [("1e3", 1000), ("20.0", 20), (20.0, 20), ("1_000", 1000), ("+7", 7), (True + 1, 2)],
)
def test_whole_numbers_may_be_written_in_other_ways(typed: Any, value: int) -> None:
    found = resolve(iterations=typed).iterations
    assert (found, type(found)) == (value, int)


@pytest.mark.parametrize(
    "value", ["1.5", 1.5, "ten", "", "inf", float("inf"), "nan", None, [1], True]
)
def test_what_is_not_a_whole_number_is_named(value: Any) -> None:
    with pytest.raises(
        UsageError, match=rf"^iterations must be a whole number, got {re.escape(repr(value))}$"
    ):
        resolve(iterations=value)


@pytest.mark.parametrize("value", ["much", "", None, [1.0], False])
def test_what_is_not_a_number_is_named(value: Any) -> None:
    with pytest.raises(
        UsageError, match=rf"^inner_lr must be a number, got {re.escape(repr(value))}$"
    ):
        resolve(inner_lr=value)


@pytest.mark.parametrize(("method", "name"), [key for key in NUMBERS if TYPES[key] is float])
@pytest.mark.parametrize("typed", ["nan", "inf", "-inf", "1e999"])
def test_numbers_must_be_finite(method: str, name: str, typed: str) -> None:
    with pytest.raises(UsageError, match=rf"^{name} must be a finite number, got (nan|inf|-inf)$"):
        resolve(**{name: typed, "method": method})


def test_text_may_be_a_path_but_nothing_else() -> None:
    assert resolve(data_dir=Path("some") / "where").data_dir == str(Path("some/where"))
    for value in (5, None, ["digits"]):
        with pytest.raises(
            UsageError, match=rf"^dataset must be text, got {re.escape(repr(value))}$"
        ):
            resolve(dataset=value)


# ---- bounds ----


def test_every_number_has_a_least_value() -> None:
    assert set(NUMBERS) == {key[:2] for key in bounds("ge") + bounds("gt")}


@pytest.mark.parametrize(("method", "name", "least"), bounds("ge"))
def test_the_least_value_is_taken_and_less_is_not(method: str, name: str, least: float) -> None:
    assert value(with_one(method, **{name: least}), name) == least
    less = least - 1 if TYPES[method, name] is int else least - sys.float_info.min
    for wrong in (less, least - 1000):
        with pytest.raises(
            UsageError, match=rf"^{name} must be at least {least:g}, got {re.escape(str(wrong))}"
        ):
            with_one(method, **{name: wrong})


@pytest.mark.parametrize(("method", "name", "bound"), bounds("lt"))
def test_a_value_must_be_below_its_bound(method: str, name: str, bound: float) -> None:
    assert value(with_one(method, **{name: bound - 1e-9}), name) < bound
    for wrong in (float(bound), bound + 1.0):
        with pytest.raises(UsageError, match=rf"^{name} must be below {bound:g}, got {wrong}$"):
            with_one(method, **{name: wrong})


@pytest.mark.parametrize(("method", "name", "bound"), bounds("gt"))
def test_a_value_must_be_above_its_bound(method: str, name: str, bound: float) -> None:
    assert value(with_one(method, **{name: bound + 1e-9}), name) > bound
    for wrong in (float(bound), bound - 1.0):
        with pytest.raises(UsageError, match=rf"^{name} must be above {bound:g}, got {wrong}$"):
            with_one(method, **{name: wrong})


LEAST_ONE = set(
    """stages ipc width depth num_experts expert_train_epochs expert_batch inner_steps expert_epochs
    eval_networks eval_epochs transition_epochs union_epochs union_batch repeats
    trajectories_per_step factor real_batch synthetic_batch inner_loops""".split()  # noqa: SIM905
)


# The bounds of 0.1's first settings, so that none is lost where a field is moved.
def test_the_bounds_are_these() -> None:
    below = {name for _, name, _ in bounds("lt")}
    assert below == {
        "validation_fraction",
        "momentum",
        "ema_decay",
        "expert_momentum",
        "union_momentum",
    }
    assert {limit for _, _, limit in bounds("lt")} == {1}
    assert {(name, limit) for _, name, limit in bounds("gt")} == {
        (name, 0)
        for name in (
            "filter_band",
            "expert_lr",
            "inner_lr",
            "validation_fraction",
            "whitening_epsilon",
        )
    }
    assert {(name, limit) for _, name, limit in bounds("le")} == {("cutmix", 1)}
    assert {name for _, name, limit in bounds("ge") if limit == 1} == LEAST_ONE


@pytest.mark.parametrize(("method", "name"), CHOICES)
def test_a_choice_is_one_of_its_own(method: str, name: str) -> None:
    names = CHOICES[method, name]
    for choice in names:
        assert value(with_one(method, **{name: choice}), name) == choice
    for other in ("", "other", names[0].upper()):
        with pytest.raises(
            UsageError, match=rf"^{name} must be {' or '.join(names)}, got '{other}'$"
        ):
            with_one(method, **{name: other})


def test_a_method_is_one_of_those_that_are_installed() -> None:
    assert choices("method") == tuple(METHODS) == ("dm", "idc", "mtt")
    for other in ("", "other", "MTT"):
        with pytest.raises(UsageError, match=rf"^method must be dm or idc or mtt, got '{other}'$"):
            resolve(method=other)


STRATEGY = st.lists(st.sampled_from([*OPERATIONS, "none", "", "blur", "Crop"]), max_size=4).map(
    "_".join
)


@given(STRATEGY | st.text(alphabet="_aor", max_size=6))
def test_an_augmentation_is_taken_exactly_where_dsa_takes_it(strategy: str) -> None:
    try:
        taken = DSA(strategy).operations
    except ValueError:
        with pytest.raises(
            UsageError, match=rf"^augment must join names of .*, got {re.escape(repr(strategy))}$"
        ):
            resolve(**SMALL | {"augment": strategy})
    else:
        assert DSA(resolve(**SMALL | {"augment": strategy}).augment).operations == taken


def test_there_are_no_more_stages_than_images_of_a_class() -> None:
    assert resolve(stages=3, ipc=3).ipc_by_stage == (1, 1, 1)
    with pytest.raises(UsageError, match=r"^stages must be at most ipc \(3\), got 4"):
        resolve(stages=4, ipc=3)


def test_experts_are_trained_as_far_as_matching_looks() -> None:
    assert (
        resolve(max_start_epoch=4, expert_epochs=3, expert_train_epochs=7).expert_train_epochs == 7
    )
    with pytest.raises(
        UsageError, match=r"^expert_train_epochs must be at least .* \(4 \+ 3\), got 6$"
    ):
        resolve(max_start_epoch=4, expert_epochs=3, expert_train_epochs=6)


def test_without_conditioning_no_network_has_learned_from_earlier_stages() -> None:
    assert resolve(filter="learned").conditioning == "on"
    assert resolve(filter="forgetting", conditioning="off").filter == "forgetting"
    message = r"^conditioning must be on where filter is learned, got off: [^.]*$"
    for stages in (1, 2):
        with pytest.raises(UsageError, match=message):
            resolve(filter="learned", conditioning="off", stages=stages)
    with pytest.raises(UsageError, match=message):
        from_dict(Settings().to_dict() | {"filter": "learned", "conditioning": "off"})


def test_a_limit_is_not_for_keeping_everything() -> None:
    for memory in ("auto", "recompute"):
        assert value(resolve(memory=memory, memory_limit="1.5"), "memory_limit") == 1.5
    assert value(resolve(memory="cache", memory_limit=0), "memory") == "cache"
    with pytest.raises(
        UsageError,
        match=r"^memory_limit must be 0 where memory is cache, .* got 1\.5; set memory=auto$",
    ):
        resolve(memory="cache", memory_limit=1.5)


def test_names_and_recipes_are_known_without_importing_torch() -> None:
    """A method's settings stand beside it, so only they need its import."""
    code = (
        "import sys, pdd_fast.settings as s; s.choices('method'), s.choices('labels'); "
        "s.recipes.load('digits'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- what follows from the settings ----


@given(
    st.integers(1, 60).flatmap(lambda stages: st.tuples(st.just(stages), st.integers(stages, 500)))
)
def test_the_stages_share_the_images_of_a_class(stages_and_ipc: tuple[int, int]) -> None:
    stages, ipc = stages_and_ipc
    shares = resolve(stages=stages, ipc=ipc).ipc_by_stage
    assert len(shares) == stages
    assert sum(shares) == ipc
    assert list(shares) == sorted(shares, reverse=True)
    assert min(shares) >= 1
    assert max(shares) - min(shares) <= 1


def test_stages_may_be_of_different_sizes() -> None:
    assert resolve(stage_ipc="4,2,2,1,1").ipc_by_stage == (4, 2, 2, 1, 1)
    found = resolve("cifar10-ipc10", stage_ipc=" 5, 1 ,1")
    assert (found.ipc_by_stage, found.stages, found.ipc) == ((5, 1, 1), 3, 7)
    assert resolve(stage_ipc="2,1", stages="2", ipc=3).ipc_by_stage == (2, 1)
    assert from_dict(found.to_dict()) == found


@pytest.mark.parametrize("text", ["4,2,", "a", "1,0", "2,-1", "1.5,2", ",", "1;2", "inf"])
def test_a_split_that_is_none_is_named(text: str) -> None:
    message = (
        rf"^stage_ipc must be whole numbers from 1 on, joined by commas, as in "
        rf"4,2,2,1,1, got '{re.escape(text)}'$"
    )
    with pytest.raises(UsageError, match=message):
        resolve(stage_ipc=text)
    with pytest.raises(UsageError, match=message):
        from_dict({"stage_ipc": text})


@pytest.mark.parametrize("given", [{"stages": 3}, {"ipc": 4}, {"stages": 1, "ipc": 3}])
def test_a_split_has_to_fit_the_stages_and_images_that_are_asked_for(given: dict[str, int]) -> None:
    stages, ipc = rf"\({given.get('stages', 2)}\)", rf"\({given.get('ipc', 3)}\)"
    message = (
        rf"must hold a number for each of the stages {stages} and add up to ipc {ipc}, got 2,1$"
    )
    with pytest.raises(UsageError, match=message):
        resolve(stage_ipc="2,1", **given)


def test_every_stage_may_have_its_own_rate_of_the_images() -> None:
    def lrs(settings: Settings) -> list[float]:
        method: Any = settings.method
        return [method.lr_img_at(stage) for stage in range(1, settings.stages + 1)]

    assert lrs(resolve(stages=2, lr_img=7)) == [7, 7]
    found = resolve(stages=3, stage_lr_img="1000, 5e2,0")
    assert lrs(found) == [1000, 500, 0]
    assert from_dict(found.to_dict()) == found
    message = r"^stage_lr_img must hold a number for each of the stages \(2\), got 1,2,3$"
    with pytest.raises(UsageError, match=message):
        resolve(stages=2, stage_lr_img="1,2,3")


@pytest.mark.parametrize("text", ["1,", "a", "1,-1", "inf,1", "nan", ","])
def test_rates_that_are_none_are_named(text: str) -> None:
    message = (
        rf"^stage_lr_img must be numbers from 0 on, joined by commas, as in "
        rf"1000,500,500, got '{text}'$"
    )
    with pytest.raises(UsageError, match=message):
        resolve(stages=2, stage_lr_img=text)


def test_a_transition_records_one_epoch_more_than_matching_reaches() -> None:
    assert (
        resolve(max_start_epoch=4, expert_epochs=3, expert_train_epochs=9).transition_real_epochs
        == 8
    )


VALUES: dict[str, st.SearchStrategy[Any]] = {
    "dataset": st.text(max_size=20),
    "data_dir": st.text(max_size=20),
    "stages": st.integers(1, 10),
    "ipc": st.integers(10, 100),
    "seed": st.integers(0, 2**80),
    "width": st.integers(1, 512),
    "validation_fraction": st.floats(0, 1, exclude_min=True, exclude_max=True),
    "lr_img": st.floats(0, 1e300),
    "inner_lr": st.floats(0, 10, exclude_min=True),
    "momentum": st.floats(0, 1, exclude_max=True),
    "filter": st.sampled_from(choices("filter")),
    "engine": st.sampled_from(choices("engine")),
    "memory": st.sampled_from([name for name in CHOICES["mtt", "memory"] if name != "cache"]),
    "memory_limit": st.floats(0, 1e300),
    "precision": st.sampled_from(choices("precision")),
    "side_by_side": st.integers(0, 100),
    "graph": st.sampled_from(choices("graph")),
    "checkpoint_seconds": st.floats(0, 1e9),
}


@given(st.fixed_dictionaries({}, optional=VALUES))
def test_a_stored_configuration_comes_back(settings: dict[str, Any]) -> None:
    found = from_dict(SMALL | {"stages": 1, "ipc": 10} | settings)
    assert from_dict(found.to_dict()) == found
    assert from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert {key: value(found, key) for key in settings} == settings


def test_a_stored_configuration_is_checked_again() -> None:
    stored = Settings().to_dict()
    with pytest.raises(UsageError, match="ipc must be at least 1, got 0"):
        from_dict(stored | {"ipc": 0})


def test_a_file_from_before_methods_had_settings_of_their_own_is_read() -> None:
    """Such a file holds the settings of all methods, by flat names, some of them older still."""
    others = {"real_batch": 7, "cutmix": 0.0, "lr_lr": 1e-3, "clip": 3.0, "experts": 4}
    stored = SMALL | {"base": "mtt", "lr_img": 12.0} | others
    found = from_dict(stored)
    assert found.num_experts == 4
    assert {key: value(found, key) for key in ("lr_img", "lr_lr", "max_grad_norm")} == {
        "lr_img": 12.0,
        "lr_lr": 1e-3,
        "max_grad_norm": 3.0,
    }
    idc = from_dict(stored | {"base": "idc", "momentum": 0.25})
    assert (idc.method.name, value(idc, "real_batch"), value(idc, "momentum")) == ("idc", 7, 0.25)
    elsewhere = from_dict(stored | {"base": "elsewhere"})
    assert (elsewhere.method.name, value(elsewhere, "max_grad_norm")) == ("elsewhere", 3.0)


def test_an_installation_without_entry_points_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pdd_fast.settings.METHODS", Registry("pdd_fast.no_such_group"))
    with pytest.raises(UsageError, match=r"no method is installed: .* install pdd-fast again"):
        resolve("digits")
