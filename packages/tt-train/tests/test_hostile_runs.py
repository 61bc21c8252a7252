"""A run directory that somebody else made: nothing outside it is read or written, nothing hangs, faults are named."""

import json
import os
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from tt_ckpt import commit
from tt_train import ConfigError, compose, load
from tt_train.models.merge import merge_run
from tt_train.models.prompt_form import trained_on
from tt_train.models.verify import verify
from tt_train.recipes import sft
from tt_train.records.run_files import read_json, read_manifest, read_rows
from tt_train.report import write_report
from tt_train.report.page import page
from tt_train.report.read import read_runs
from tt_train.run.console import Console
from tt_train.run.dir import RunDir
from tt_train.run.listing import figures_of, list_runs
from tt_train.run.lock import RunLock, writer_of
from tt_train.run.resume import new_path, probe_writable

SECRET = "KEEP\n"


class Quiet(Console):
    def note(self, text):
        pass

    warn = note

    def step(self, row):
        pass


@pytest.fixture(autouse=True)
def never_for_long():
    """A pipe that is opened waits forever: the test fails instead."""

    def late(*_):
        raise AssertionError("still waiting")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_dir, rows_file):
    """A finished run of one step, with a report."""
    path = tmp_path_factory.mktemp("hostile") / "run"
    train(path, model_dir, rows_file)
    return path


def train(path, model_dir, rows_file, *more, resume=None):
    words = [f"model.path={model_dir}", f"data.train={rows_file}", "model.dtype=fp32", "batch_size=8", "max_steps=1"]
    words += ["adapter.rank=2", "samples.num=1", "samples.max_new_tokens=2", "device=cpu", f"output_dir={path}", *more]
    return sft.main(compose("sft", overrides=words), console=Quiet(), resume=resume)


@pytest.fixture
def evil(finished, tmp_path):
    """A copy of the run, to be spoilt, beside a home with a secret."""
    shutil.copytree(finished, tmp_path / "evil")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "secret").write_text(SECRET)
    return tmp_path / "evil"


def everything(folder):
    return {path: path.read_text() if path.is_file() else None for path in sorted(folder.rglob("*"))}


FILES = [
    "config.yaml", "manifest.json", "metrics.jsonl", "samples.jsonl", "train.log", "README.md", "report.html",
    "report.png", "run.lock", "chat_template.jinja", ".manifest.json.part", ".metrics.jsonl.part", ".README.md.part",
    ".samples.jsonl.part", ".probe", "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
]  # fmt: skip
FOLDERS = ["adapter", "checkpoints", ".adapter.part", ".adapter.old", ".tmp-adapter-0123", "tb", "wandb"]


def spoil(path, kind, home):
    path.parent.mkdir(exist_ok=True)
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"file": home / "secret", "folder": home, "nothing": home / "new", "device": "/dev/zero"}[kind])


SPOILT = [(name, "file") for name in FILES] + [(name, "pipe") for name in FILES[:5] + FILES[8:10]]
SPOILT += [(name, "folder") for name in FOLDERS] + [("metrics.jsonl", "device"), ("train.log", "nothing")]


@pytest.mark.parametrize(("name", "kind"), SPOILT)
def test_a_link_or_pipe_in_a_run_is_never_followed(evil, tmp_path, model_dir, rows_file, name, kind):
    home = tmp_path / "home"
    spoil(evil / name, kind, home)
    before, said = everything(home), []
    for action in (
        lambda: train(evil, model_dir, rows_file, "max_steps=2", resume="auto"),
        lambda: page(read_runs([evil])),
        lambda: list_runs(tmp_path),
        lambda: trained_on(evil),
    ):
        try:
            action()
        except (ValueError, FileNotFoundError, IsADirectoryError) as error:
            said.append(str(error))
    assert everything(home) == before
    assert not [line for line in said if "\n" in line or "KEEP" in line]


@pytest.mark.parametrize("kind", ["file", "pipe", "device"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_rows_that_cannot_be_continued_are_refused_before_anything_is_written(
    evil, tmp_path, model_dir, rows_file, name, kind
):
    spoil(evil / name, kind, tmp_path / "home")
    manifest = (evil / "manifest.json").read_text()
    with pytest.raises(ValueError, match=name):
        train(evil, model_dir, rows_file, "max_steps=2", resume="auto")
    assert (evil / "manifest.json").read_text() == manifest
    assert "Traceback" not in (evil / "train.log").read_text()


@pytest.mark.parametrize("name", ["adapter", "model"])
def test_the_result_of_a_run_is_not_read_from_elsewhere(evil, tmp_path, model_dir, name):
    for result in ("adapter", "model"):
        shutil.rmtree(evil / result, ignore_errors=True)
    shutil.copytree(model_dir, tmp_path / "home" / "model")
    (evil / name).symlink_to(tmp_path / "home" / "model")
    actions = [load, lambda path: merge_run(path, tmp_path / "merged")] + [verify] * (
        name == "model"
    )  # of an adapter it says how to merge
    for action in actions:
        with pytest.raises(ValueError, match=f"{name}: refused: a link that leaves"):
            action(evil)
    assert not (tmp_path / "merged").exists()


def test_a_run_directory_that_is_itself_a_link_is_as_good_as_any(evil, tmp_path, model_dir, rows_file):
    (tmp_path / "named").symlink_to(evil)
    train(tmp_path / "named", model_dir, rows_file, "max_steps=2", resume="auto")
    assert read_manifest(evil)["summary"]["steps"] == 2
    assert write_report([tmp_path / "named"])[0] == tmp_path / "named" / "report.html"


def test_what_a_killed_run_left_of_a_result_is_cleared_away_and_a_link_of_that_name_unlinked(evil, tmp_path):
    (evil / ".tmp-adapter-0123").mkdir()
    (evil / ".tmp-adapter-4567").symlink_to(tmp_path / "home")
    run = RunDir(evil)
    with run.replacing("adapter") as part:
        assert not part.exists()
        part.mkdir()
        (part / "new").touch()
    run.close()
    assert [path.name for path in (evil / "adapter").iterdir()] == ["new"]
    assert not list(evil.glob(".tmp-*"))
    assert (tmp_path / "home" / "secret").read_text() == SECRET


DEEP = "[" * 400 + "]" * 400
MANIFESTS = {
    "[]": "expected a JSON object, found list",
    "{": "manifest.json:1:2",
    "": "0 bytes",
    '{"a": ' + DEEP + "}": "nested too deeply",
    '{"a": ' + "[" * 100_000: "nested too deeply",
    '{"a": 1' + 5000 * "0" + "}": "thousands of digits",
    '{"state": 1}': "state: expected a text, found 1",
    '{"state": ["running"]}': "state: expected a text",
    '{"config": []}': "config: expected an object",
    '{"config": {"model": "x"}}': "config.model: expected an object, found 'x'",
    '{"config": {"model": {"path": ["/"]}}}': "config.model.path: expected a text",
    '{"config": {"adapter": 3}}': "config.adapter: expected an object",
    '{"config": {"data": {"template": {}}}}': "config.data.template: expected a text",
    '{"imports": ["os"]}': "imports: expected an object",
    '{"summary": {"steps": "many"}}': "summary.steps: expected a whole number, found 'many'",
    '{"summary": {"steps": true}}': "summary.steps: expected a whole number, found True",
    '{"data": {"report": 1}}': "data.report: expected an object",
    '{"serving": []}': "serving: expected an object",
    '{"serving": {"eos_id": "2"}}': "serving.eos_id: expected a whole number, found '2'",
    '{"wandb_id": {"$ne": 1}}': "wandb_id: expected a text",
    '{"base_model": "\\ud800"}': "surrogate",
    "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 3\n": "git-lfs pointer",
    "<!doctype html><html></html>": "a web page",
}


@pytest.mark.parametrize("text", MANIFESTS)
def test_a_manifest_that_no_run_writes_is_refused_with_the_key_and_the_cure(evil, tmp_path, text):
    (evil / "manifest.json").write_text(text)
    for action in (lambda: read_manifest(evil), lambda: trained_on(evil)):
        with pytest.raises(ValueError, match="manifest.json") as caught:
            action()
        said = str(caught.value)
        assert MANIFESTS[text] in said
        assert len(said) < 500
        assert said.isprintable()
        assert "copy" in said or "git lfs pull" in said or "download" in said
    assert [run["state"] for run in list_runs(tmp_path)] == ["damaged"]
    assert "manifest.json: left out" in page(read_runs([evil]))


def test_one_damaged_run_does_not_hide_the_others_nor_stop_resuming(evil, tmp_path, model_dir, rows_file, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    shutil.copytree(evil, tmp_path / "runs" / "good")
    shutil.move(evil, tmp_path / "runs" / "evil")
    (tmp_path / "runs" / "evil" / "manifest.json").write_text('{"config": 1}')
    (tmp_path / "runs" / "loop").symlink_to("loop")
    assert {run["path"]: run["state"] for run in list_runs()} == {"runs/good": "finished", "runs/evil": "damaged"}
    path = train(None, model_dir, rows_file, "output_dir=null", resume="auto")
    assert path.parent == (tmp_path / "runs").relative_to(tmp_path)
    assert path.name not in ("good", "evil")


ROWS = [
    "", "{", "[]", "null", '"x"', "NaN", '{"step": 1, "loss": ' + 5000 * "9" + "}", '{"step": 1, "x": ' + DEEP + "}",
    '{"loss": 1.0}', '{"step": "1", "loss": 1.0}', '{"step": -1}', '{"step": true}', '{"step": 1.5}', '{"step": [1]}',
    '{"step": 1' + 300 * "0" + "}", '{"step": null}', "[" * 100_000, "\x00" * 100, "x" * 5_000_000,
]  # fmt: skip


def test_rows_that_no_run_writes_are_left_out_and_counted(tmp_path):
    file = tmp_path / "metrics.jsonl"
    good = [{"step": step, "loss": 1.0} for step in range(3)]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in good[:1]) + "\n".join(ROWS) + "\n"
                    + "".join(f"{json.dumps(row)}\n" for row in good[1:]))  # fmt: skip
    problems = []
    assert list(read_rows(file, problems)) == good
    assert len(problems) == len(ROWS) - 1  # an empty line is nothing


def test_figures_that_are_no_numbers_are_gaps(tmp_path):
    odd = ["1.0", True, [], {}, float("nan"), float("inf"), 10**400]
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps({"step": 1, "loss": value, "eval_loss": 2.0}) + "\n" for value in odd))
    problems = []
    assert [(row["loss"], row["eval_loss"]) for row in read_rows(file, problems)] == [(None, 2.0)] * len(odd)
    assert len(problems) == len(odd)


def test_a_run_whose_rows_are_nonsense_is_listed_reported_and_continued(evil, tmp_path, model_dir, rows_file):
    text = "\n".join([*ROWS, '{"step": 1, "loss": "x", "tokens": "y", "epoch": []}', '{"step": 0, "eval_loss": {}}'])
    for name in ("metrics.jsonl", "samples.jsonl"):
        (evil / name).write_text(text + "\n")
    of_manifest = read_manifest(evil)["summary"]["loss_last"]  # the run is finished
    assert (list_runs(tmp_path)[0]["loss"], figures_of(evil, {}).loss) == (of_manifest, None)
    write_report([evil])
    train(evil, model_dir, rows_file, "max_steps=2", resume="auto")
    assert [row["step"] for row in read_rows(evil / "metrics.jsonl")] == [1, 0, 2]
    places = len(ROWS) - 1 + 4  # an empty line is nothing; four figures are none
    said = f"metrics.jsonl: not as a run writes it in {places} places, first metrics.jsonl:2: left out"
    assert said in (evil / "train.log").read_text()


def test_a_file_of_rows_without_end_is_refused(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.touch()
    os.truncate(file, 1 << 40)
    with pytest.raises(ValueError, match="which no run writes"):
        list(read_rows(file))


def lock_text(**facts):
    return json.dumps({"pid": os.getpid(), "host": HERE, "born": None} | facts)


HERE = os.uname().nodename
LOCKS = {
    "junk": "junk", "empty": "", "a list": "[1]", "deep": DEEP, "a huge number": lock_text(pid=10**30),
    "a negative number": lock_text(pid=-1), "true": lock_text(pid=True),
    "a text": lock_text(pid="1"), "large": " " * 10_000 + "{}",
}  # fmt: skip


@pytest.mark.parametrize("kind", LOCKS)
def test_a_lock_that_no_run_writes_is_taken_over(tmp_path, kind):
    (tmp_path / "run.lock").write_text(LOCKS[kind])
    assert writer_of(tmp_path) is None
    lock = RunLock(tmp_path)
    lock.acquire()
    assert writer_of(tmp_path)["pid"] == os.getpid()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_of_a_time_to_come_is_stale_and_one_with_escapes_is_spelt_out(tmp_path):
    (tmp_path / "run.lock").write_text(lock_text(host="\x1b]0;x\x07"))
    with pytest.raises(ConfigError, match="remove run.lock") as caught:
        RunLock(tmp_path).acquire()
    assert str(caught.value).isprintable()
    os.utime(tmp_path / "run.lock", (time.time() + 1e6,) * 2)
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.release()


def test_a_folder_in_the_place_of_the_lock_is_refused_and_stays(tmp_path):
    (tmp_path / "run.lock" / "mine").mkdir(parents=True)
    with pytest.raises(ConfigError, match="is a folder, not a lock; remove it"):
        RunLock(tmp_path).acquire()
    assert (tmp_path / "run.lock" / "mine").is_dir()


def test_an_output_that_cannot_be_a_folder_is_refused_in_one_line(tmp_path, finished):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "\x1b[31m").touch()
    for path, said in {
        tmp_path / "file": "is not a directory", tmp_path / "file" / "x": "cannot be written|is not a directory",
        tmp_path / ("x" * 300): "name too long", tmp_path / "a\nb": "unprintable", tmp_path / "a\0b": "unprintable",
        tmp_path / "full": "not empty", "/proc/x": "cannot be written", "/dev/null": "not a directory",
        tmp_path / "dangling": "cannot be|link",
    }.items():  # fmt: skip
        with pytest.raises(ConfigError, match=said) as caught:
            probe_writable(new_path(str(path), "m", "lora"))
        assert str(caught.value).isprintable()
        assert "choose another -o" in str(caught.value)


def test_a_probe_of_the_output_writes_through_no_link(tmp_path):
    (tmp_path / "secret").write_text(SECRET)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".probe").symlink_to("../secret")
    probe_writable(tmp_path / "out")
    assert (tmp_path / "secret").read_text() == SECRET


def test_json_of_a_run_is_read_with_its_line(tmp_path):
    (tmp_path / "x.json").write_text('{\n"a": 1,\n}')
    with pytest.raises(ValueError, match=r"x\.json:3:1: not valid JSON"):
        read_json(tmp_path / "x.json")


# ---- a checkpoint whose manifest is right, and whose contents are not ----------------------------------------------


def rewritten(run, change):
    """Change the newest checkpoint of a run, and its manifest with it, as somebody who means harm would."""
    folder = max((run / "checkpoints").glob("step-*"))
    manifest = commit.read_manifest(folder)
    (folder / commit.MANIFEST_NAME).unlink()
    change(folder)
    commit.write_manifest(folder, {key: manifest[key] for key in manifest if key not in ("files", "sha256")})


STATES = {
    "step": [2, -1, "1", True, 1.5, None, 10**400], "tokens": ["x", None, -5], "elapsed_s": ["1", -1.0, None, []],
    "best": [1, [], {}, {"step": "1", "eval_loss": 1.0}, {"step": 1, "eval_loss": "low"}], "judged": [{}, -1],
    "row": [[], 3, {"loss": "x"}, {"step": [1]}], "evaluations_since_best": ["many", None], "data": [None, 3],
    "steps_total": ["1", -1],
}  # fmt: skip


@pytest.mark.parametrize("key", STATES)
def test_a_state_that_no_run_saves_is_refused_by_its_key(evil, model_dir, rows_file, key):
    file = max((evil / "checkpoints").glob("step-*")) / "state.json"
    saved = json.loads(file.read_text())
    for value in STATES[key]:
        rewritten(evil, lambda folder, value=value: file.write_text(json.dumps(saved | {key: value})))
        with pytest.raises(ConfigError, match=rf"state\.json.*{key}|not valid JSON.*digits") as caught:
            train(evil, model_dir, rows_file, "max_steps=2", resume="auto")
        assert len(caught.value.problems) == 1
        assert caught.value.problems[0].isprintable()
    assert not json.loads((evil / "manifest.json").read_text()).get("extension")


def changed(file, **tensors):
    state = load_file(file)
    save_file({name: value for name, value in {**state, **tensors}.items() if value is not None}, file)


def test_tensors_of_another_run_are_refused_by_name_before_any_is_used(evil, model_dir, rows_file):
    def attempt(**tensors):
        shutil.copytree(evil, evil.with_name("copy"))
        rewritten(evil.with_name("copy"), lambda folder: changed(folder / file, **tensors))
        with pytest.raises(ConfigError) as caught:
            train(evil.with_name("copy"), model_dir, rows_file, "max_steps=2", resume="auto")
        shutil.rmtree(evil.with_name("copy"))
        return str(caught.value)

    file = "adapter.safetensors"
    (name, value), *_ = load_file(max((evil / "checkpoints").glob("step-*")) / file).items()
    assert f"{name} is missing" in attempt(**{name: None})
    assert f"{name} has shape [1], the run's {list(value.shape)}" in attempt(**{name: torch.zeros(1)})
    assert "is not one that the run trains" in attempt(evil=torch.zeros(1))
    file = "optimizer.safetensors"
    key = next(iter(load_file(max((evil / "checkpoints").glob("step-*")) / file)))
    assert "which this run does not train" in attempt(**{"lm_head.weight/exp_avg": torch.zeros(1)})
    assert "has shape [3] (torch.float32), not" in attempt(**{key.rpartition("/")[0] + "/exp_avg": torch.zeros(3)})


def test_a_finished_run_whose_checkpoints_are_damaged_names_its_result(evil, model_dir, rows_file):
    for folder in (evil / "checkpoints").glob("step-*"):
        (folder / "state.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"its result is in .*evil/adapter: a new run .* adapter\.path=.*adapter$"):
        train(evil, model_dir, rows_file, "max_steps=2", resume="auto")


def test_evaluations_of_a_stranger_are_escaped_and_damaged_ones_are_named(tmp_path):
    from tt_train.records.evaluations import newest

    folder = tmp_path / "evals"
    folder.mkdir()
    row = {"task": "<script>x</script>", "metric": "\x1b[31m", "filter": "none", "value": 0.5, "stderr": "soon"}
    (folder / "1-results.json").write_text(json.dumps({"results": [row, {**row, "value": "high"}, 7]}))
    (folder / "2-results.json").write_text("{")
    (folder / "3-results.json").symlink_to("/etc/passwd")
    problems: list[str] = []
    [figure] = newest(tmp_path, problems)
    assert (figure["value"], figure["stderr"]) == (0.5, None)
    assert [line.partition(":")[0] for line in problems] == ["evals/2-results.json", "evals/3-results.json"]
    from tt_train.report.read import Run
    from tt_train.report.sections import evaluations_section

    html = evaluations_section([Run(path=tmp_path, name="a", rows=[], evaluations=[figure])])
    assert "<script>" not in html
    assert "\x1b" not in html
