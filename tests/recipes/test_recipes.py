"""Recipes: what they set, and that the papers' are the papers'."""

from __future__ import annotations

import re
from typing import Any

import pytest
from settings_support import TYPES

from pdd_fast import recipes
from pdd_fast.runtime.errors import UsageError
from pdd_fast.settings import default, resolve


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
