"""Settings of a method: defaults, refusals, files from before they were its own."""

from __future__ import annotations

from typing import Any

import pytest
from settings_support import SMALL, value

from pdd_fast.runtime.errors import UsageError
from pdd_fast.runtime.registry import METHODS, Registry
from pdd_fast.settings import Settings, choices, from_dict, method_settings, resolve


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


def test_a_setting_is_the_runs_or_the_methods() -> None:
    for method in METHODS:
        own = set(method_settings(method).model_fields)
        assert not own & set(Settings.model_fields)


def test_a_method_is_one_of_those_that_are_installed() -> None:
    assert choices("method") == tuple(METHODS) == ("dm", "idc", "mtt")
    for other in ("", "other", "MTT"):
        with pytest.raises(UsageError, match=rf"^method must be dm or idc or mtt, got '{other}'$"):
            resolve(method=other)


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
    monkeypatch.setattr(
        "pdd_fast.runtime.method_settings.METHODS", Registry("pdd_fast.no_such_group")
    )
    with pytest.raises(UsageError, match=r"no method is installed: .* install pdd-fast again"):
        resolve("digits")
