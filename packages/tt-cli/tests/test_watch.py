"""``tt watch`` follows a run that another process makes: through its end, its stop, its crash and its resume."""

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tt_cli.console import Terminal
from tt_cli.screen import Screen
from tt_cli.verbs import watch
from tt_train.run.follow import Follower
from tt_train.run.lock import RunLock


class LiveRun:
    """A run directory as a run writes it, step by step."""

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True)
        self.path, self.lock = path, RunLock(path)
        (path / "config.yaml").write_text("recipe: sft\n")
        self.manifest = {"recipe": "sft", "method": "lora", "base_model": "org/tiny", "steps_total": 9}
        self.set("running")

    def set(self, state: str, **more: object) -> None:
        if state == "running":
            self.lock = RunLock(self.path)
            self.lock.acquire()
        else:
            self.lock.release()
        new = self.path / "new"
        new.write_text(json.dumps({**self.manifest, "state": state, **more}))
        new.rename(self.path / "manifest.json")

    def steps(self, *steps: int) -> None:
        with (self.path / "metrics.jsonl").open("a") as file:
            for step in steps:
                row = {
                    "step": step,
                    "loss": 1 / step,
                    "lr": 1e-3,
                    "tokens_per_s": 100.0,
                    "token_stream": "ab",
                    "eta_s": 5,
                }
                file.write(json.dumps({**row, **({"eval_loss": 2.0 / step} if step % 2 else {})}) + "\n")

    def keep_until(self, step: int) -> None:
        """As a run that resumes: a new file takes the place of the old one."""
        lines = (self.path / "metrics.jsonl").read_text().splitlines(keepends=True)
        (self.path / "new").write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
        (self.path / "new").rename(self.path / "metrics.jsonl")


@pytest.fixture
def run(tmp_path, monkeypatch) -> Iterator[LiveRun]:
    monkeypatch.setattr(watch, "POLL_S", 0.01)
    live = LiveRun(tmp_path / "runs" / "live")
    yield live
    live.lock.release()


def in_background(*actions: Callable[[], object]) -> threading.Thread:
    def work() -> None:
        for action in actions:
            time.sleep(0.15)
            action()

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_a_run_is_followed_to_its_end(tt, run):
    run.steps(1, 2)
    thread = in_background(lambda: run.steps(3), lambda: run.steps(4, 5), lambda: run.set("finished"))
    answer = tt("watch", str(run.path))
    thread.join()
    assert (answer.code, answer.err) == (0, "")
    lines = answer.out.splitlines()
    assert [line.split()[1] for line in lines[:-1]] == ["1", "2", "3", "4", "5"]
    assert lines[2] == "step 3 loss 0.3333 lr 1.00e-03 tokens/s 100 eta 5s eval_loss 0.6667"
    assert lines[-1] == f"finished after step 5; tt report {run.path} shows it"


def test_a_run_is_followed_through_a_crash_and_its_resume(tt, run):
    run.steps(1, 2, 3)
    thread = in_background(
        lambda: run.lock.release(),  # killed: the manifest still says that it runs
        lambda: run.set("running"),
        lambda: run.keep_until(2),
        lambda: run.steps(3, 4),
        lambda: run.set("finished"),
    )
    answer = tt("watch", str(run.path), "--wait", "20")
    thread.join()
    assert answer.code == 0
    gone, resumed, *rest = [line for line in answer.out.splitlines() if not line.startswith(("step 1", "step 2"))][1:]
    assert gone.startswith("the process of the run is gone after step 3; tt run ")
    assert gone.endswith("--resume auto continues it; waiting 20 s for a resume")
    assert resumed == "resumed after step 2"
    assert [line.split()[:2] for line in rest[:-1]] == [["step", "3"], ["step", "4"]]


@pytest.mark.parametrize(("state", "said"), [
    ("stopped", "stopped after step 2; tt run"),
    ("failed", "failed after step 2: ValueError: the loss is nan; tt run"),
])  # fmt: skip
def test_a_run_that_ends_otherwise_is_exit_1_with_the_reason(tt, run, state, said):
    run.steps(1, 2)
    (run.path / "train.log").write_text(
        "INFO: x\nTraceback (most recent call last):\n  File\nValueError: the loss is nan\n"
    )
    thread = in_background(lambda: run.set(state))
    answer = tt("watch", str(run.path), "--wait", "0")
    thread.join()
    assert answer.code == 1
    assert answer.out.splitlines()[-1].startswith(said)
    again = tt("watch", str(run.path))  # long ended: nothing to wait for
    assert (again.code, again.out.splitlines()[-1]) == (1, answer.out.splitlines()[-1])


def test_a_run_that_has_ended_already_is_waited_for_if_that_is_asked(tt, run):
    run.steps(1, 2)
    run.set("stopped")
    thread = in_background(lambda: run.set("running"), lambda: run.steps(3), lambda: run.set("finished"))
    answer = tt("watch", str(run.path), "--wait", "20")
    thread.join()
    assert answer.code == 0
    stopped, third, finished = answer.out.splitlines()[2:]
    assert stopped.endswith("--resume auto continues it; waiting 20 s for a resume")
    assert (third.split()[:2], finished.split()[0]) == (["step", "3"], "finished")


def test_of_the_past_of_a_long_run_only_what_is_shown_is_kept(run):
    run.steps(*range(1, 2000))
    follower = Follower(run.path, past=3)
    assert [row["step"] for row in follower.look().new] == [1997, 1998, 1999]
    assert (len(follower.rows), follower.rows[2], follower.last["lr"]) == (1999, {"step": 2, "loss": 0.5}, 1e-3)
    run.steps(*range(2000, 2010))
    assert len(follower.look().new) == 10


def test_only_the_last_steps_of_the_past_are_printed(tt, run):
    run.steps(*range(1, 10))
    run.set("finished")
    lines = tt("watch", str(run.path), "-n", "2").out.splitlines()
    assert [line.split()[1] for line in lines[:-1]] == ["8", "9"]
    assert len(tt("watch", str(run.path), "-n", "0").out.splitlines()) == 1


def test_json_says_where_the_run_is_and_does_not_follow_it(tt, run):
    run.steps(1, 2, 3)
    assert tt("watch", str(run.path), "--json").json == {
        "ok": True, "run": str(run.path), "state": "running", "step": 3, "steps_total": 9, "eta_s": 5.0,
        "best_eval_loss": 2 / 3, "best_step": 3,
        "figures": {"step": 3, "loss": 1 / 3, "lr": 1e-3, "tokens_per_s": 100.0, "eta_s": 5.0, "eval_loss": 2 / 3},
    }  # fmt: skip


def test_a_line_that_is_being_written_is_read_when_it_is_whole(run):
    follower = Follower(run.path)
    assert follower.look().new == []
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "lo')
        file.flush()
        assert follower.look().new == []
        file.write('ss": 1}\nnot json\n{"step": -1}\n{"step": 2, "loss": 1e999}\n')
    assert follower.look().new == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": None}]
    assert follower.look().new == []


def test_a_run_that_is_not_there_or_goes_away_is_one_line(tt, run, tmp_path):
    assert tt("watch", str(tmp_path / "nowhere")).code == 2
    run.steps(1)
    thread = in_background(lambda: (run.path / "manifest.json").unlink())
    answer = tt("watch", str(run.path))
    thread.join()
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert "manifest.json" in answer.err


def test_names_in_a_run_cannot_steer_the_terminal(tt, run):
    run.manifest["base_model"] = "\x1b[2Jevil"
    run.set("finished")
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 1, "loss": 1.0, "acc\x1b[2J": 0.5}) + "\n")
    assert "\x1b" not in tt("watch", str(run.path)).out
    _, text = drawn(run, width=80)
    assert "\x1b[2J" not in text
    assert "\\x1b[2Jevil" in text


def drawn(run: LiveRun, *, width: int, encoding: str = "utf-8") -> tuple[Screen, str]:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="backslashreplace")
    screen = Screen(Terminal(stream, width=width, force_terminal=True))
    follower = Follower(run.path)
    look = follower.look()
    with screen:
        screen.show(follower, look)
        screen.note("a note")
    stream.flush()
    return screen, stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_screen_shows_the_run_in_every_width(run, width, encoding):
    assert "none yet" in drawn(run, width=width)[1]
    run.steps(*range(1, 9))
    _, text = drawn(run, width=width, encoding=encoding)
    for part in ("8/9", "5s left", "0.1250", "lowest", "0.2857 at step 7", "a note", "1.00e-03", "running"):
        assert part in text


def test_ctrl_c_on_a_terminal_is_exit_130_and_gives_screen_and_cursor_back(run):
    run.steps(1)
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-m", "tt_cli", "watch", str(run.path)], stdin=theirs, stdout=theirs,
                               stderr=theirs, env={**os.environ, "TERM": "xterm"}, start_new_session=True)  # fmt: skip
    os.close(theirs)
    shown = b""
    sent = False
    until = time.monotonic() + 60
    while time.monotonic() < until and select.select([ours], [], [], 30)[0]:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # closed at the other end
            break
        shown += piece
        if b"1/9" in shown and not sent:
            process.send_signal(signal.SIGINT)
            sent = True
    assert process.wait(timeout=30) == 130, shown
    assert shown.rindex(b"\x1b[?25h") > shown.rindex(b"\x1b[?25l")  # the cursor
    opened, left = shown.index(b"\x1b[?1049h"), shown.rindex(b"\x1b[?1049l")  # the other screen, which none can tear
    assert opened < shown.index(b"1/9") < left < shown.rindex(b"1/9")  # and the last state below what was there
    assert b"Traceback" not in shown


def test_watching_loads_no_torch(tt_process, run):
    run.set("finished")
    answer = tt_process("watch", str(run.path), python=["-X", "importtime"])
    assert answer.code == 0
    assert "torch._C" not in answer.err
