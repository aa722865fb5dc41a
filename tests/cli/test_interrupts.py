"""The command line: what it prints where, its exit statuses, one sentence for every error,
interrupts and resuming."""

from __future__ import annotations

import asyncio
import errno
import io
import itertools
import json
import os
import select
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import tiny
from cli_support import ITERATIONS, Finished, contents
from command import Outcome, call, call_main, process
from PIL import Image

from pdd_fast import load_distilled
from pdd_fast.cli import main as cli


def interrupt_after(
    monkeypatch: pytest.MonkeyPatch, function: str, calls: int, number: signal.Signals
) -> None:
    """This process gets signal ``number`` when ``function`` has been called ``calls`` times."""
    original = resolve_name(function)
    count = 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        value = original(*arguments, **options)
        count += 1
        if count == calls:
            signal.raise_signal(number)
        return value

    monkeypatch.setattr(function, counted)


def continuation(outcome: Outcome) -> list[str]:
    """The arguments of the command that an interrupted one says to continue with."""
    said, _, command = outcome.err.splitlines()[-1].partition("; continue with: ")
    assert said == "pdd-fast: interrupted"
    program, *arguments = shlex.split(command)
    assert program == "pdd-fast"
    return arguments


# ---- interrupts ----


@pytest.mark.parametrize("calls", [1, 3, ITERATIONS + 8])
def test_ctrl_c_leaves_a_run_that_goes_on_with_the_same_bits(
    calls: int, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "it's a run; with $all"
    interrupt_after(monkeypatch, "pdd_fast.storage.run.Metrics.append", calls, signal.SIGINT)
    outcome = call("distill", *tiny.flags(), "--run-dir", path)
    assert (outcome.status, outcome.out) == (130, "")
    assert not (path / "distilled.safetensors").exists()
    arguments = continuation(outcome)
    assert arguments == ["distill", "--resume", "--run-dir", str(path)]
    assert call(*arguments).status == 0
    expected = contents(finished.path)
    for name, found in contents(path).items():
        if name != "metrics.jsonl":  # it holds seconds
            assert found == expected[name], name
    rows = [
        [
            (row["stage"], row["iteration"], row.get("loss"))
            for row in map(json.loads, text.splitlines())
        ]
        for text in ((path / "metrics.jsonl").read_text(), expected["metrics.jsonl"].decode())
    ]
    assert rows[0] == rows[1]


def test_ctrl_c_before_anything_was_made_leaves_a_run_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_after(monkeypatch, "sklearn.datasets.load_digits", 1, signal.SIGINT)
    outcome = call("experts", *tiny.flags(), "--run-dir", tmp_path / "run")
    assert outcome.status == 130
    arguments = continuation(outcome)
    assert arguments[0] == "experts"
    assert call(*arguments).status == 0


def test_the_continuation_of_a_continuation_keeps_its_place_to_work(
    only_experts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_after(monkeypatch, "pdd_fast.storage.run.Metrics.append", 2, signal.SIGINT)
    outcome = call(
        "distill", "--resume", "--run-dir", only_experts, "--device", "auto", "--set", "seed=0"
    )
    assert outcome.status == 130
    expected = ["distill", "--resume", "--run-dir", str(only_experts), "--set", "device=auto"]
    assert continuation(outcome) == expected
    assert call(*expected).status == 0


def test_ctrl_c_while_evaluating_says_no_more_than_that(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(run)
    interrupt_after(monkeypatch, "pdd_fast.evaluation.schedule.accuracies", 2, signal.SIGINT)
    outcome = call("evaluate", run)
    assert (outcome.status, outcome.out) == (130, "")
    assert outcome.err.splitlines()[-1] == "pdd-fast: interrupted"
    assert contents(run) == before


@pytest.mark.parametrize("entry", [call, call_main])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_terminated_command_exits_with_its_signal_and_can_be_continued(
    number: signal.Signals,
    status: int,
    entry: Callable[..., Outcome],
    finished: Finished,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "run"
    interrupt_after(
        monkeypatch, "pathlib.Path.replace", 3, number
    )  # config.json, its data, an expert
    outcome = entry("experts", *tiny.flags(), "--run-dir", path)
    assert (outcome.status, outcome.out) == (status, "")
    assert [p.name for p in (path / "experts").iterdir()] == ["trajectory-000.safetensors"]
    assert call(*continuation(outcome)).status == 0
    for name, found in contents(path / "experts").items():
        assert found == (finished.path / "experts" / name).read_bytes()


SIGNALS = (signal.SIGTERM, signal.SIGHUP)


@pytest.fixture
def handlers() -> Iterator[None]:
    """Puts handlers back that a test has set."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("arguments", [("--version",), ("nope",), ("show", "nowhere")])
@pytest.mark.parametrize("entry", [call, call_main])
def test_the_callers_signal_handlers_are_put_back(
    entry: Callable[..., Outcome], arguments: tuple[str, ...]
) -> None:
    def theirs(*_: object) -> None:
        """A server's."""

    for number in SIGNALS:
        signal.signal(number, theirs)
    entry(*arguments)
    assert [signal.getsignal(number) for number in SIGNALS] == [theirs, theirs]


@pytest.mark.usefixtures("handlers")
def test_signals_that_the_caller_ignores_stay_ignored(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    path = tmp_path / "run"
    interrupt_after(monkeypatch, "pathlib.Path.replace", 2, signal.SIGHUP)
    assert call("experts", *tiny.flags(), "--run-dir", path).status == 0
    assert contents(path / "experts") == contents(finished.path / "experts")


def test_commands_run_in_threads_of_a_program_with_an_event_loop(
    finished: Finished, tmp_path: Path
) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]

    async def serve() -> list[int]:
        jobs = [
            asyncio.to_thread(
                cli.run, ["distill", *tiny.flags(), "--run-dir", str(tmp_path / f"run {k}")]
            )
            for k in range(2)
        ]
        here = cli.run(["show", str(finished.path), "--json"])  # on the loop's own thread
        return [here, *await asyncio.gather(*jobs)]

    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()):
        assert asyncio.run(serve()) == [0, 0, 0]
    assert out.getvalue().count("Test accuracy on digits") == 2
    assert [signal.getsignal(number) for number in SIGNALS] == before
    for k in range(2):
        found = (tmp_path / f"run {k}" / "distilled.safetensors").read_bytes()
        assert found == (finished.path / "distilled.safetensors").read_bytes()


def test_the_entry_point_ends_a_thread_with_the_status() -> None:
    seen: list[object] = []

    def work() -> None:
        try:
            cli.main(["nope"])
        except SystemExit as error:
            seen.append(error.code)

    with redirect_stderr(io.StringIO()) as err:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert seen == [2]
    assert "no such command 'nope'" in err.getvalue()


@pytest.mark.parametrize("command", ["distill", "evaluate", "show"])
def test_a_picture_that_fails_does_not_fail_the_work(
    command: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("no font")

    for name in ("images.png", "accuracy.png"):
        (run / name).unlink()
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    arguments = {
        "distill": ["--resume", "--run-dir", run],
        "evaluate": [run, "--repeats", "1"],
        "show": [run],
    }[command]
    outcome = call(command, *arguments)
    assert outcome.status == (1 if command == "show" else 0)  # drawing is what show is for
    assert "Test accuracy on digits" in outcome.out
    assert f"pdd-fast: warning: {run / 'images.png'} could not be drawn: no font\n" in outcome.err
    assert f"pdd-fast: warning: {run / 'accuracy.png'} could not be drawn: no font\n" in outcome.err
    assert "images.png" not in outcome.out
    if command == "show":
        assert outcome.err.splitlines()[-1].startswith(
            "pdd-fast: images.png and accuracy.png could not be drawn"
        )


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' file names are Unicode")
def test_class_folders_that_are_no_utf_8_go_through_a_whole_run(tmp_path: Path, here: Path) -> None:
    root = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9s"))
    colors = itertools.count(1)
    for part, count in (("train", 6), ("test", 3)):
        for name in (b"caf\xe8", b"caf\xe9"):
            folder = root / part / os.fsdecode(name)
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("L", (8, 8), next(colors) * 7).save(folder / f"{i}.png")
    path = here / "run"
    outcome = call_main("distill", *tiny.flags(dataset=f"imagefolder:{root}"), "--run-dir", path)
    assert outcome.status == 0, outcome.err
    assert r"Test accuracy on imagefolder:caf\xe9s" in outcome.out
    assert load_distilled(path).metadata["classes"] == [r"caf\xe8", r"caf\xe9"]
    assert (path / "images.png").stat().st_size > 0
    assert "warning" not in outcome.err
    assert call_main("evaluate", path, "--repeats", "1").status == 0
    assert call_main("distill", "--resume", "--run-dir", path).status == 0
    assert call_main("export", path, "--output", here / "out").status == 0


def test_the_entry_point_exits_with_the_status() -> None:
    assert call_main("--version") == call("--version")
    assert call_main("nope").status == 2


def test_a_terminal_without_the_tables_characters_gets_others(run: Path) -> None:
    outcome = call_main("show", run, encoding="ascii")
    assert (outcome.status, outcome.err) == (0, "")
    assert "| stage | " in outcome.out
    assert "mean ? std" in outcome.out


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_closed_stream_is_no_error(
    closed: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = {"stdout": io.StringIO(), "stderr": io.StringIO()} | {closed: None}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    with pytest.raises(SystemExit, match="0"):
        cli.main(["evaluate", str(run), "--repeats", "1"])
    getattr(sys, closed).close()
    monkeypatch.undo()
    for name, stream in streams.items():
        if stream is not None:
            assert ("Test accuracy" if name == "stdout" else "evaluation: 3/3") in stream.getvalue()


# ---- in a process of its own ----


@pytest.mark.parametrize("ignored", [False, True], ids=["hangup", "nohup"])
def test_a_terminal_that_is_closed_leaves_a_run_to_continue(ignored: bool, tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")
    path = tmp_path / "run"
    flags = tiny.flags(
        iterations=60 if ignored else 100_000,
        eval_every=0,
        ipc=1,
        stages=1,
        checkpoint_seconds=1000,
    )
    program = "from pdd_fast.cli.main import main; main()"
    arguments = [sys.executable, "-P", "-c", program, "distill", *flags, "--run-dir", str(path)]
    # A session of its own, whose terminal this is.
    leader = "import os, pty, signal, sys; ignored = sys.argv.pop(1) == 'True'"
    leader += (
        "; signal.signal(signal.SIGHUP, signal.SIG_IGN) if ignored else None; "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    child, terminal = pty.fork()
    if child == 0:
        os.environ["OMP_NUM_THREADS"] = "1"
        os.execv(sys.executable, [sys.executable, "-c", leader, str(ignored), *arguments])
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (path / "metrics.jsonl").exists() and (path / "metrics.jsonl").read_text().count(
            "loss"
        ) >= 5:
            break
        if select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 4096)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    if ignored:
        # Results cannot be written to the terminal, which is a failure; the work is done.
        assert os.waitstatus_to_exitcode(status) != 129
        assert (path / "evaluation.json").exists()
        return
    assert os.waitstatus_to_exitcode(status) == 129
    assert (path / "stage-1" / "checkpoint.safetensors").exists()
    assert not (path / "distilled.safetensors").exists()


def test_the_printed_command_continues_an_interrupted_process(tmp_path: Path) -> None:
    path = tmp_path / "a run"
    # The stage takes minutes: the signal comes while it goes on.
    child = process(
        "distill", *tiny.flags(iterations=100_000, eval_every=0, ipc=1, stages=1), "--run-dir", path
    )
    deadline = time.monotonic() + 60
    while child.poll() is None and time.monotonic() < deadline:
        if (path / "metrics.jsonl").exists() and (path / "metrics.jsonl").read_text().count(
            "loss"
        ) >= 5:
            break
        time.sleep(0.05)
    for _ in range(
        6
    ):  # Python drops an interrupt that comes within a destructor; people press again
        child.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            out, err = child.communicate(timeout=10)
            break
    assert (child.returncode, out) == (130, "")
    assert "Traceback" not in err or "Exception ignored" in err
    done = (path / "metrics.jsonl").read_text().count("loss")
    assert 5 <= done < 100_000
    arguments = continuation(Outcome(130, out, err))
    command = err.splitlines()[-1].partition("continue with: ")[2]

    # Near the end, so that the test is short: what a shell makes of the command is the question.
    config = json.loads((path / "config.json").read_text())
    config["settings"]["iterations"] = done + 3
    (path / "config.json").write_text(json.dumps(config))
    program = Path(sys.executable).with_name("pdd-fast")
    if not program.exists():
        pytest.skip("the entry point was installed elsewhere")
    environment = os.environ | {
        "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    again = subprocess.run(
        command, shell=True, env=environment, capture_output=True, text=True, timeout=120
    )
    assert again.returncode == 0, again.stderr
    assert f"stage 1/1: {done + 3}/{done + 3} iterations" in again.stderr
    assert (path / "distilled.safetensors").exists()
    assert arguments == ["distill", "--resume", "--run-dir", str(path)]
    losses = [
        row
        for row in map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
        if "loss" in row
    ]
    assert [row["iteration"] for row in losses] == list(range(1, done + 4))


class FullDisk(io.StringIO):
    """A stream that nothing more can be written to."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_results_that_cannot_be_written_fail_the_command(flags: list[str], run: Path) -> None:
    with redirect_stdout(FullDisk()), redirect_stderr(io.StringIO()) as err:
        status = cli.run(["show", str(run), *flags])
    assert (status, err.getvalue()) == (1, f"pdd-fast: {os.strerror(errno.ENOSPC)}\n")
