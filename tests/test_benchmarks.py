"""The benchmarks' baselines compute what they claim to, and the benchmarks report what they measure. No timing is held
to anything here."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cases import relative_error
from plain import unroll
from torch import Tensor

import pdd_fast
from pdd_fast.augmentation import augment_adjoint

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks"
if not FOLDER.is_dir():
    pytest.skip("the benchmarks are not beside the tests", allow_module_level=True)
sys.path.append(str(FOLDER))  # scripts in one folder, which import each other by name


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


baselines, contenders, measure, present = map(module, ("baselines", "contenders", "measure", "present"))
TINY = ["--width=4", "--size=8", "--depth=2", "--rounds=1", "--threads=1", "--device=cpu"]


def problem(device: torch.device, **changes: Any) -> Any:
    """Six images, five steps; a rate at which what is left out of an approximation shows."""
    found = baselines.Problem.draw(6, 5, 8, 5, 2, device, torch.float64, **changes)
    found.rate = found.rate * 20
    return found


def by_autograd(p: Any, end: Any) -> tuple[Tensor, Tensor]:
    """Gradients of the matching loss at ``end(images, rate)``."""
    images, rate = p.images.clone().requires_grad_(), p.rate.clone().requires_grad_()
    images_grad, rate_grad = torch.autograd.grad(p.matching_loss(end(images, rate)), [images, rate])
    return images_grad, rate_grad


def textbook(p: Any) -> tuple[Tensor, Tensor]:
    """What the package's own tests are held to."""
    theta = p.start.clone().requires_grad_()
    return by_autograd(p, lambda images, rate: unroll(p.net, theta, images, p.labels, rate, p.index, p.draws))


# ---- the baselines --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["color", "crop", "cutout", "flip", "scale", "rotate", "all"])
def test_plain_dsa_is_the_packages(operation: str, device: torch.device) -> None:
    strategy = "color_crop_cutout_flip_scale_rotate" if operation == "all" else operation
    draw = pdd_fast.DSA(strategy, mode="multiple").sample(5, (9, 12))
    images, grad = (torch.randn(5, 3, 9, 12, dtype=torch.float64).to(device) for _ in range(2))
    images.requires_grad_()
    found = module("plain_dsa").PlainAugment(draw, device, torch.float64)(images)
    assert relative_error(found, pdd_fast.augment(images.detach(), draw)) < 1e-12
    (found_adjoint,) = torch.autograd.grad(found, images, grad)
    assert relative_error(found_adjoint, augment_adjoint(grad, draw)) < 1e-12


EXACT = {
    "plain": lambda p: baselines.plain(p),
    "checkpointed": lambda p: baselines.checkpointed(p),
    "torch.func": lambda p: baselines.functional(p),
    "unrolled": lambda p: contenders.unrolled(p),
    "unrolled, autograd, cache": lambda p: contenders.unrolled(p, "autograd", "cache"),
    "ours": lambda p: contenders.ours(p, graph=False, precision="float32", memory="recompute"),
    "ours, cache": lambda p: contenders.ours(p, graph=False, precision="float32", memory="cache"),
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("augment", [True, False], ids=["DSA", "none"])
def test_exact_contenders_give_the_gradient_of_plain_autograd(name: str, augment: bool, device: torch.device) -> None:
    p = problem(device, augment=augment)
    for found, expected in zip(EXACT[name](p)(), textbook(p), strict=True):
        assert relative_error(found, expected) < 1e-9


@pytest.mark.parametrize("name", ["plain", "checkpointed"])  # torch 2.13 has no jvp of a channels-last group norm
def test_channels_last_changes_no_value(name: str, device: torch.device) -> None:
    p = problem(device)
    p.channels_last = True
    for found, expected in zip(EXACT[name](p)(), textbook(p), strict=True):
        assert relative_error(found, expected) < 1e-9


@pytest.mark.slow
def test_the_compiled_contender_is_exact_too(device: torch.device) -> None:
    p = problem(device)
    for found, expected in zip(baselines.functional(p, compiled=True)(), textbook(p), strict=True):
        assert relative_error(found, expected) < 1e-9


def test_frozen_weights_are_what_they_are_defined_as_and_not_the_gradient(device: torch.device) -> None:
    p = problem(device)
    path, _ = baselines.training_path(p)

    def end(images: Tensor, rate: Tensor) -> Tensor:
        theta = p.start
        for i in range(p.steps):
            held = path[i].detach().requires_grad_()
            (gradient,) = torch.autograd.grad(p.step_loss(i, held, images), held, create_graph=True)
            theta = theta - rate * gradient
        return theta

    found = baselines.frozen(p)()
    for part, defined, exact in zip(found, by_autograd(p, end), textbook(p), strict=True):
        assert relative_error(part, defined) < 1e-9
        assert relative_error(part, exact) > 1e-2


@pytest.mark.parametrize("name", ["plain", "checkpointed", "torch.func", "ours"])
def test_a_warm_up_takes_fewer_steps(name: str, device: torch.device) -> None:
    p, shorter = problem(device), problem(device)
    iterate = EXACT[name](p)
    p.steps = 2
    shorter.batches, shorter.draws = shorter.batches[:2], shorter.draws[:2]
    shorter.__post_init__()
    assert relative_error(iterate()[0], textbook(shorter)[0]) < 1e-9
    p.steps = 5
    assert relative_error(iterate()[0], textbook(p)[0]) < 1e-9


@pytest.fixture
def _flags_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark sets torch's flags for its whole process, which here is that of all tests."""
    monkeypatch.setattr(measure, "set_precision", lambda name: None)
    monkeypatch.setattr(module("floor"), "set_precision", lambda name: None)


@pytest.mark.usefixtures("_flags_stay")
def test_every_contender_of_a_device_can_be_measured(device: torch.device, tmp_path: Path) -> None:
    p = baselines.Problem.draw(4, 2, 8, 4, 2, device, torch.float64)
    contenders.write_truth(p, tmp_path / "truth.pt")
    found = contenders.contenders(device.type, "recompute")
    for name, contender in found.items():
        if "compiled" in name:  # half a minute each
            continue
        p = baselines.Problem.draw(4, 2, 8, 4, 2, device, torch.float32)
        gradient, numbers = contenders.timed(contender, p, 2)
        assert numbers["seconds"] > 0
        assert numbers["peak_bytes"] > 0
        error = contenders.error_of(gradient, tmp_path / "truth.pt")["error"]
        # On a GPU convolutions take TF32 unless a flag says otherwise.
        assert error < (0.5 if name.endswith("bfloat16") else 0.05) or name.startswith("frozen"), name
        assert contenders.reference(list(found), name).startswith("ours")


@pytest.mark.parametrize("name", ["eager PyTorch, float32", "eager PyTorch, channels-last, float32"])
def test_training_steps_of_ours_and_of_eager_pytorch_agree(name: str, device: torch.device) -> None:
    steps = module("training_step")
    ends = []
    for contender in ("ours, eager, float32", name):
        torch.manual_seed(1)
        net = pdd_fast.ConvNet(3, 10, 8, 4, 2).double().to(device)
        images = torch.randn(6, 3, 8, 8, dtype=torch.float64).to(device)
        make, parameters = steps.training(contender, net, images, (torch.arange(6) % 10).to(device))
        make()
        ends.append(parameters())
    assert relative_error(ends[1], ends[0]) < 1e-9


# ---- the floor ------------------------------------------------------------------------------------------------------


def test_the_floor_counts_operations_and_bytes() -> None:
    floor = module("floor")
    size = floor.Size(10, 5, 32, 128, 3)
    pictures = 32 * 32 * 3 * 128 + 16 * 16 * 128 * 128 + 8 * 8 * 128 * 128
    assert size.forward() == 10 * 2 * 9 * pictures
    assert size.activations() == 10 * 128 * (1024 + 256 + 64)
    found = floor.floor(size, {"convolution": {"float32": 1e9, "bfloat16": 4e9}, "copy": 1e9}, "bfloat16")
    assert found["9 F"] == pytest.approx(9 * 5 * size.forward() / 4e9)
    assert found["11 F"] == pytest.approx(found["9 F"] * 11 / 9)
    assert found["passes"] == pytest.approx(10.5 * 5 * size.activations() * 2 / 1e9)


@pytest.mark.usefixtures("_flags_stay")
def test_rates_are_measured(device: torch.device) -> None:
    found = module("floor").rates(module("floor").Size(2, 1, 8, 4, 2), contenders.PRECISIONS[device.type], device)
    assert found["copy"] > 1e6
    assert all(rate > 1e3 for rate in found["convolution"].values())


# ---- one process a measurement --------------------------------------------------------------------------------------

CHILD = """
import sys, measure
def work():
    name = sys.argv[-1]
    if name == "memory":
        import torch
        torch.empty(2**62, dtype=torch.uint8)
    if name == "kill":
        import os
        os.kill(os.getpid(), 9)
    if name == "hang":
        import time
        time.sleep(60)
    if name == "wrong":
        raise ValueError("what went wrong")
    if name == "slower":
        import warnings
        from pdd_fast.ops._native import MissingKernelsWarning
        warnings.warn("there are no kernels", MissingKernelsWarning)
    return {"seconds": 2.0, "peak_bytes": 10}
measure.child(work)
"""


@pytest.mark.parametrize(
    ("name", "failed", "why"),
    [
        ("memory", "out of memory", r"asked for 46116\d+ bytes"),
        ("kill", "out of memory", "was killed"),
        ("hang", "too slow", "took more than 1 s"),
        ("wrong", "failed", "ValueError: what went wrong"),
        ("slower", "not available", "there are no kernels"),
    ],
)
def test_what_keeps_a_contender_from_a_result_is_said(
    name: str, failed: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", "")]))
    script = tmp_path / "script.py"
    script.write_text(CHILD)
    seen: list[int] = []
    outcomes = measure.in_turn(
        script, [name], [], rounds=2, limit=1 if name == "hang" else 60, keep=lambda o: seen.append(len(o))
    )
    assert seen == [1]  # not tried again
    result = outcomes[name].result(None)
    assert result["failed"] == failed
    assert re.search(why, result["why"])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"), "asked for 2.00 GiB"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 12 bytes."), "for 12 bytes"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "did not say"),
        (MemoryError(), "did not say"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), None),
    ],
)
def test_running_out_of_memory_is_told_from_other_errors(error: Exception, said: str | None) -> None:
    found = measure.out_of_memory(error)
    assert found is None if said is None else said in found


def test_ratios_are_medians_over_rounds_and_all_iterations_make_the_spread() -> None:
    ours = measure.Outcome([{"seconds": 1.0}, {"seconds": 2.0}, {"seconds": 4.0}])
    other = measure.Outcome([{"seconds": s, "seconds_each": [s, s + 1], "error": 0.5} for s in (3.0, 4.0, 4.0)])
    result = other.result(ours)
    assert result["times_ours"] == 2.0
    assert result["seconds"] == 4.0
    assert result["seconds_all"] == [3.0, 4.0, 4.0, 5.0, 4.0, 5.0]
    assert result["error"] == 0.5
    assert other.result(measure.Outcome(failed={"failed": "failed", "why": ""}))["times_ours"] is None


# ---- the command lines ----------------------------------------------------------------------------------------------


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
    return subprocess.run(
        [sys.executable, str(FOLDER / script), *arguments], env=environment, capture_output=True, text=True, check=False
    )


def record_of(result: subprocess.CompletedProcess[str], path: Path) -> Any:
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n|") >= 2
    record = json.loads(path.read_text(encoding="utf-8"))
    assert {"cpu", "cores", "torch", "python", "pdd_fast", "commit", "threads"} <= record["machine"].keys()
    assert record["machine"]["threads"] == 1
    return record


def test_iteration_from_end_to_end(tmp_path: Path) -> None:
    path = tmp_path / "a" / "record.json"
    result = run("iteration.py", *TINY, "--case=4x3", "--only=ours", "--only=frozen", f"--output={path}")
    case = record_of(result, path)["cases"]["4x3"]
    ours, frozen = case["results"].values()
    assert ours["error"] < 1e-5 < frozen["error"]
    assert ours["times_ours"] == 1
    assert frozen["peak_bytes"] > 1e7
    assert set(ours["over_floor"]) == {"9 F", "11 F"}
    assert set(case["floor"]["float32"]) == {"9 F", "11 F", "passes"}


def test_unroll_from_end_to_end(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    result = run("unroll.py", *TINY, "--batch=4", "--steps=3", "--only=fused, recompute", f"--output={path}")
    record = record_of(result, path)
    assert list(record["results"]) == ["fused, recompute"]
    assert record["results"]["fused, recompute"]["error"] < 1e-5


def test_training_step_from_end_to_end(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    result = run("training_step.py", *TINY, "--batch=4", "--only=ours", f"--output={path}")
    step, alone = record_of(result, path)["results"].values()
    assert step["seconds"]["seconds"] > 0
    assert set(alone) == {f"{way}, {n} images" for way in ("forward", "adjoint") for n in (4, 20)}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--case", "20*50"], "argument --case: must be BATCHxSTEPS such as 20x50, got '20*50'"),
        (["--case", "0x5"], "argument --case: must be BATCHxSTEPS such as 20x50, got '0x5'"),
        (["--device", "gpu"], "argument --device: device must be auto, cpu, cuda or cuda:N, got 'gpu'"),
        (
            ["--device=cpu", "--only", "nobody"],
            "no contender's name contains 'nobody'; they are: ours, eager, float32; ",
        ),
        (["--device=cpu", "--skip", "float32"], "--only and --skip leave no contender"),
    ],
)
def test_a_wrong_call_is_answered_in_one_sentence(
    arguments: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["iteration.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        module("iteration").main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"iteration.py: {sentence}")
    assert error.count("\n") == 1


def test_a_name_means_its_contender_and_another_text_all_that_contain_it() -> None:
    names = ["plain", "plain, channels-last", "other"]
    choose = lambda only, skip: present.selected(names, only, skip, present.Parser(None))  # noqa: E731
    assert choose(["plain"], []) == ["plain"]
    assert choose(["pla"], []) == ["plain", "plain, channels-last"]
    assert choose([], ["plain"]) == ["plain, channels-last", "other"]


def test_the_table_shows_failures_beside_results() -> None:
    iteration, floor = module("iteration"), module("floor")
    outcomes = {
        "ours, eager, float32": measure.Outcome([{"seconds": 0.5, "peak_bytes": 1e9, "error": 1e-6}]),
        "plain autograd, float32": measure.Outcome(failed={"failed": "out of memory", "why": "asked for 2.00 GiB"}),
        "torch.func, float32": measure.Outcome([{"seconds": 1.0, "peak_bytes": 1e9, "error": None}]),
    }
    measured = {"convolution": {"float32": 1e12}, "copy": 1e11}
    found = iteration.summary(outcomes, measured, floor.Size(10, 5, 32, 128, 3))
    text = iteration.show(found)
    assert "| out of memory: asked for 2.00 GiB |" in text
    assert "not finite" in text
    assert "2.00" in text
    assert json.loads(json.dumps(found)) == found


# ---- the machine ----------------------------------------------------------------------------------------------------


def test_the_commit_is_given_found_or_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = module("machine")
    monkeypatch.setenv("PDD_FAST_COMMIT", "abc123")
    assert machine.commit() == "abc123"
    monkeypatch.delenv("PDD_FAST_COMMIT")
    inside = tmp_path / "copy"
    inside.mkdir()
    monkeypatch.setattr(machine, "ROOT", inside)
    assert machine.commit() == "unknown"
    if machine.said("git", "init", str(tmp_path)):  # of another repository
        assert machine.commit() == "unknown"
