"""Settings of the run: defaults, rules that link two settings, and what follows from them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from settings_support import CHOICES, FIELDS, IDS, SMALL, value

from pdd_fast.augmentation.dsa import DSA
from pdd_fast.ops.dsa import OPERATIONS
from pdd_fast.runtime.errors import UsageError
from pdd_fast.settings import Settings, choices, from_dict, method_settings, resolve


def test_the_defaults_stand_where_nothing_else_is_asked_for() -> None:
    assert resolve(dataset="cifar-like") == Settings(dataset="cifar-like")
    assert from_dict({}) == Settings()
    assert Settings().method == method_settings("mtt")(name="mtt")


@pytest.mark.parametrize(("method", "name"), FIELDS, ids=IDS)
def test_every_setting_says_in_a_sentence_what_it_does(method: str, name: str) -> None:
    description = FIELDS[method, name].description
    assert description is not None
    assert re.fullmatch(r"[A-Z].*[^.]\.", description)


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
