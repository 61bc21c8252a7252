"""``tt rm-checkpoints`` frees space, and never what cannot be made again."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tt_cli.main import main


@pytest.fixture(scope="module")
def made(tmp_path_factory, model_dir, rows_file):
    """A finished run with four checkpoints, of which the best is the second."""
    run = tmp_path_factory.mktemp("space") / "runs" / "one"
    words = [f"model.path={model_dir}", f"data.train={rows_file}", "model.dtype=fp32", "adapter.rank=4", "max_steps=4"]
    words += ["save_every=1", "keep_last=9", "data.eval=0.25", "eval_every=1", "samples.max_new_tokens=2"]
    assert main(["run", "sft", *words, "batch_size=4", "-o", str(run)]) == 0
    manifest = json.loads((run / "manifest.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row["eval_loss"] = {0: 0.1, 1: 3.0, 2: 1.0, 3: 2.0, 4: 2.0}[row["step"]]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest["best"] = {"step": 2, "eval_loss": 1.0, "checkpoint": "checkpoints/step-000002"}
    (run / "manifest.json").write_text(json.dumps(manifest))
    return run


@pytest.fixture
def run(made, tmp_path):
    place = tmp_path / "runs" / "one"
    shutil.copytree(made, place)
    return place


def left(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").iterdir())


def tree(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file() and "step-" not in str(p)}


@pytest.mark.parametrize(("words", "kept"), [
    ([], []),
    (["--keep-last", "1"], [4]),
    (["--keep-last", "3"], [2, 3, 4]),
    (["--keep-last", "9"], [1, 2, 3, 4]),
    (["--keep-best"], [2]),
    (["--keep-best", "--keep-last", "1"], [2, 4]),
])  # fmt: skip
def test_checkpoints_are_removed_and_nothing_else(tt, run, words, kept):
    before, size = tree(run), sum(f.stat().st_size for f in (run / "checkpoints").rglob("*"))
    rehearsed = tt("rm-checkpoints", str(run), *words, "--dry-run", "--json").json
    assert left(run) == [1, 2, 3, 4]
    answer = tt("rm-checkpoints", str(run), *words, "--json")
    assert answer.code == 0
    assert left(run) == kept
    assert answer.json == {**rehearsed, "dry_run": False}
    assert sorted(answer.json["kept"]) == [f"step-{step:06d}" for step in kept]
    assert (answer.json["bytes"] == 0) == (len(kept) == 4)
    assert answer.json["bytes"] < size
    after = tree(run)
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == (set() if 2 in kept else {"manifest.json"})
    best = json.loads((run / "manifest.json").read_text())["best"]
    assert best["checkpoint"] == ("checkpoints/step-000002" if 2 in kept else None)


def test_a_dry_run_says_what_would_be_freed_and_removes_nothing(tt, run):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    answer = tt("rm-checkpoints", str(run), "--keep-last", "1", "--dry-run")
    assert answer.code == 0
    assert answer.err.startswith("would free ")
    assert "3 checkpoints; kept: step-000004" in answer.err
    assert answer.out.splitlines() == [f"{run}/checkpoints/step-00000{step}" for step in (1, 2, 3)]
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_run_without_its_checkpoints_is_still_used_and_is_not_newer(tt, run):
    when = (run / "manifest.json").stat().st_mtime_ns
    assert tt("rm-checkpoints", str(run)).code == 0
    assert (run / "manifest.json").stat().st_mtime_ns == when
    assert tt("generate", str(run), "red", "--max-new-tokens", "2").code == 0
    assert tt("rm-checkpoints", str(run), "--json").json["removed"] == {}


@pytest.mark.parametrize(("change", "said"), [
    ({"state": "stopped"}, "is stopped: its newest checkpoint is all that is left of 4 steps; keep it with"),
    ({"extension": "failed"}, "is failed: its newest checkpoint"),
    ({"adapter": None}, "has no result: its newest checkpoint"),
])  # fmt: skip
def test_the_last_checkpoint_of_a_run_without_a_result_stays(tt, run, change, said):
    if "adapter" in change:
        shutil.rmtree(run / "adapter")
    else:
        manifest = json.loads((run / "manifest.json").read_text()) | change
        (run / "manifest.json").write_text(json.dumps(manifest))
    answer = tt("rm-checkpoints", str(run))
    assert (answer.code, answer.out, answer.err.count("\n")) == (2, "", 1)
    assert said in answer.err
    assert left(run) == [1, 2, 3, 4]
    assert tt("rm-checkpoints", str(run), "--keep-last", "1").code == 0
    assert left(run) == [4]


def test_a_damaged_newest_checkpoint_does_not_count_as_kept(tt, run):
    next((run / "checkpoints" / "step-000004").glob("*.safetensors")).write_bytes(b"")
    assert tt("rm-checkpoints", str(run), "--keep-last", "1").code == 0
    assert left(run) == [3, 4]


def test_a_run_that_is_being_written_is_refused(tt, run):
    script = (
        "import sys, pathlib; from tt_train.run.lock import RunLock; RunLock(pathlib.Path(sys.argv[1])).acquire();"
        "print('locked', flush=True); sys.stdin.read()"
    )
    writer = subprocess.Popen([sys.executable, "-c", script, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert writer.stdin is not None
    assert writer.stdout is not None
    writer.stdout.readline()
    try:
        for words in ([], ["--dry-run"]):
            answer = tt("rm-checkpoints", str(run), *words)
            assert answer.code == 2
            assert f"is being written by process {writer.pid}; wait for its end" in answer.err
    finally:
        writer.stdin.close()
        writer.wait(timeout=20)
    assert left(run) == [1, 2, 3, 4]


def test_no_best_step_and_no_run_are_one_line(tt, run, tmp_path):
    shutil.rmtree(run / "checkpoints" / "step-000002")
    assert (
        "has no checkpoint of its best step, 2; use --keep-last N" in tt("rm-checkpoints", str(run), "--keep-best").err
    )
    (run / "metrics.jsonl").write_text("")
    manifest = json.loads((run / "manifest.json").read_text()) | {"best": None}
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert "has no held-out loss" in tt("rm-checkpoints", str(run), "--keep-best").err
    assert tt("rm-checkpoints", str(tmp_path / "nowhere")).code == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may remove everything")
def test_a_checkpoint_that_cannot_be_removed_is_an_error(tt, run):
    (run / "checkpoints").chmod(0o555)
    try:
        answer = tt("rm-checkpoints", str(run))
    finally:
        (run / "checkpoints").chmod(0o755)
    assert answer.code == 2
    assert "cannot be removed" in answer.err


def test_checkpoints_behind_a_link_are_not_touched(tt, run, tmp_path):
    (run / "checkpoints").rename(tmp_path / "elsewhere")
    (run / "checkpoints").symlink_to(tmp_path / "elsewhere")
    assert tt("rm-checkpoints", str(run)).code == 2
    assert len(list((tmp_path / "elsewhere").iterdir())) == 4
