"""-q leaves results, warnings and errors; -v adds tracebacks; both may come before the verb or after it."""

import warnings

import click
import pytest

from tt_cli import errors
from tt_cli.console import WarningConsole, byte_progress, console_here
from tt_cli.group import Verb
from tt_cli.main import cli
from tt_cli.terminal import guarded, hush, say, tell
from tt_train.inputs import encoding

NAMES = list(cli.table)


@pytest.mark.parametrize("words", [["-q", "validate"], ["validate", "-q"], ["validate", "--quiet"]])
def test_quiet_leaves_the_result_alone(tt, model_dir, rows_file, words):
    config = ["sft", f"model.path={model_dir}", f"data.train={rows_file}", "adapter.rank=2"]
    assert "8 alpaca rows" in tt("validate", *config).err
    answer = tt(*words, *config)
    assert (answer.code, answer.err, answer.out) == (0, "", "sft: no mistakes found\n")


def test_quiet_keeps_what_may_be_wrong(tt, model_dir, rows_file):
    answer = tt("validate", "-q", "sft", f"model.path={model_dir}", f"data.train={rows_file}", "data.max_seq_len=4",
                "adapter.rank=2", "model.dtype=fp32")  # fmt: skip
    assert answer.code == 2
    assert "no trainable token at max_seq_len 4" in answer.err


def test_quiet_training_says_nothing_but_the_run(tt, model_dir, rows_file, tmp_path):
    words = [f"model.path={model_dir}", f"data.train={rows_file}", "adapter.rank=2", "max_steps=1"]
    words += ["samples.max_new_tokens=2", "model.dtype=fp32"]
    answer = tt("run", "sft", *words, "-q", "-o", str(tmp_path / "run"))
    assert (answer.code, answer.out, answer.err) == (0, f"{tmp_path / 'run'}\n", "")
    assert "step 1" in (tmp_path / "run" / "train.log").read_text()


def test_quiet_keeps_warnings_and_drops_notes_and_bars(capsys):
    tqdm = pytest.importorskip("tqdm")
    with guarded():
        hush()
        tell("a note")
        for _ in tqdm.tqdm(range(2), desc="a bar"):
            pass
        say("an error", err=True)
        console = console_here()
        console.note("a step")
        console.warn("a loss")
        assert isinstance(console, WarningConsole)
        with byte_progress("bytes") as progress:
            assert progress is None
    assert capsys.readouterr().err.splitlines() == ["an error", "warning: a loss"]


def test_quiet_says_nothing_of_rows_that_are_encoded(capsys, monkeypatch):
    monkeypatch.setattr(encoding, "AFTER_S", 0.0)
    with guarded():
        hush()
        with encoding.Encoding(lambda: "a hint") as progress:
            for read in (512, 1024):
                progress(read, lambda: 2000)
        assert progress.said
    assert capsys.readouterr() == ("", "")


def test_a_later_command_of_the_same_process_is_not_quiet(tt, capfd):
    assert tt("-q", "ls").code == 0
    with guarded():
        tell("heard")
    assert capfd.readouterr().err == "heard\n"


def test_a_warning_of_a_library_is_heard(capsys):
    @click.command("verb", cls=Verb)
    def verb() -> None:
        warnings.warn("old file", stacklevel=1)
        tell("a note")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert errors.run(verb, ["-q"]) == 0
    assert capsys.readouterr().err == "warning: old file\n"


@pytest.mark.parametrize("verb", NAMES)
def test_every_verb_takes_quiet_and_verbose(tt, verb):
    page = tt(verb, "--help").out
    assert "-q, --quiet" in page
    assert "-v, --verbose" in page


def test_verbose_before_the_verb_shows_the_traceback(tt, tmp_path):
    assert "Traceback" in tt("-v", "chat", str(tmp_path)).err
    assert "Traceback" not in tt("chat", str(tmp_path)).err
