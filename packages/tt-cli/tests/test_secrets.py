"""S9: no verb, stream or file shows a secret of this machine, whatever it is asked."""

import json
import os
import shutil
from pathlib import Path
from urllib.parse import quote

import pytest

SECRETS = {
    "hf": "Canary/of+the env'ironment\"1",
    "key": "canaryOfWeightsAndBiases2",
    "file": "hf_canaryOfTheLoginFile33",
    "stored": "hf_canaryOfStoredTokens44",
    "netrc": "canaryOfNetrcValue55",
    "password": "canary:p@ss/66",
}
ALL = " ".join(SECRETS.values())
KEY = SECRETS["key"]


def found_in(text: str) -> list[str]:
    """The names of the secrets that are in ``text``, in one of their spellings."""
    spellings = {
        name: {s, quote(s), quote(s, safe=""), json.dumps(s)[1:-1], repr(s)[1:-1]} for name, s in SECRETS.items()
    }
    return [name for name, forms in spellings.items() if any(form in text for form in forms)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder on a machine with a secret in each place where there can be one."""
    from huggingface_hub import constants

    home = tmp_path / "home"
    home.mkdir()
    (home / "token").write_text(SECRETS["file"] + "\n")
    (home / "stored_tokens").write_text(f"[work]\nhf_token = {SECRETS['stored']}\n")
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai\n login user\n password {SECRETS['netrc']}\n")
    endpoint = f"https://joe:{quote(SECRETS['password'], safe='')}@127.0.0.1:9"
    values = {
        "HF_HOME": home,
        "NETRC": tmp_path / "netrc",
        "WANDB_API_KEY": KEY,
        "MY_TOKEN": SECRETS["hf"],
        "HF_ENDPOINT": endpoint,
        "HF_TOKEN": SECRETS["file"],
    }
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("tt_ckpt.hub.download.FIRST_CONTACT_S", 0.0)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


def files_with_secrets(folder: Path) -> list[str]:
    held = {
        file.relative_to(folder).as_posix(): file.read_text("utf-8", "replace")
        for file in folder.rglob("*")
        if file.is_file()
    }
    return [f"{name}: {found_in(text)}" for name, text in held.items() if found_in(text)]


QUESTIONS = [
    ["--help"],
    ["--version"],
    ["env"],
    ["env", "--json"],
    ["ls"],
    ["ls", "runs"],
    [f"bogus{KEY}"],
    [KEY],
    ["cat", "sft", f"model.path={ALL}"],
    ["cat", "sft", "--json", f"model.path={ALL}"],
    ["cat", "sft", f"x.{KEY}=1"],
    ["cat", ALL],
    ["cat", "sft", f"seed={KEY}"],
    ["cat", "sft", "model.path=https://joe:hunter2@host/x"],
    ["cp", "sft", f"{KEY}.py"],
    ["cp", KEY],
    ["run", "sft", f"--{KEY}"],
    ["run", "sft", f"model.path={ALL}"],
    ["run", "sft", "-v", f"model.path={ALL}", f"data.train={KEY}"],
    ["run", KEY],
    ["run", "sft", "--resume", KEY],
    ["run", "sft", "--resume", KEY, "--json"],
    ["validate", KEY],
    ["validate", "sft", f"model.path=org/{KEY}"],
    ["plan", "sft", f"model.path=org/{KEY}", f"data.train={KEY}"],
    ["plan", "sft", f"--{KEY}"],
    ["migrate", KEY],
    ["migrate", ALL, "--json"],
    ["data", "show", KEY, "--tokenizer", KEY],
    ["data", "show", f"org/{KEY}", "--tokenizer", KEY],
    ["download", f"org/{KEY}"],
    ["download", ALL],
    ["download", "org/x", "--revision", KEY],
    ["download", "org/x", "-o", KEY],
    ["upload", KEY, f"org/{KEY}"],
    ["upload", ".", ALL],
    ["merge", KEY],
    ["export", KEY, "-o", KEY],
    ["report", KEY],
    ["generate", KEY, ALL],
    ["chat", KEY],
    ["verify", KEY],
    ["eval", KEY],
    ["eval", KEY, "--data", KEY],
    ["quantize", KEY, "-o", KEY, "--to", KEY],
    ["watch", KEY],
    ["rm-checkpoints", KEY],
    ["completion", KEY],
    ["convert", KEY, KEY],
    ["data", KEY],
    ["quickstart", f"--{KEY}"],
]


@pytest.mark.parametrize("words", QUESTIONS, ids=lambda words: " ".join(words)[:30].replace("/", "-"))
def test_no_answer_of_a_verb_shows_a_secret(tt, folder, words):
    answer = tt(*words)
    assert found_in(answer.out + answer.err) == []
    assert "hunter2" not in answer.out + answer.err
    assert answer.out + answer.err


def test_every_verb_is_asked():
    from tt_cli.main import cli

    assert {words[0] for words in QUESTIONS} >= set(cli.table)


def test_a_run_and_everything_made_from_it_contain_no_secret(tt, folder, model_dir, rows_file):
    shutil.copytree(model_dir, folder / "model")
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    rows = [
        row | {"output": f"{row['output']} {KEY}", "instruction": f"{SECRETS['hf']} {row['instruction']}"}
        for row in rows
    ]
    data = folder.parent / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    old = [
        "model: {_component_: torchtune.models.qwen2.qwen2_0_5b}",
        "dataset: {_component_: torchtune.datasets.alpaca_dataset}",
        "optimizer: {_component_: torch.optim.AdamW, lr: 3e-4}",
        f"metric_logger: {{_component_: torchtune.training.metric_logging.WandBLogger, api_key: {KEY}, {KEY}: 1}}",
    ]
    (folder.parent / "old.yaml").write_text("\n".join(old))
    words = [
        "model.path=model",
        f"data.train={data}",
        "model.dtype=fp32",
        "adapter.rank=2",
        "batch_size=4",
        "max_steps=2",
        "data.max_seq_len=128",
        "samples.max_new_tokens=4",
        "save_every=1",
        "data.eval=0.25",
        "eval_every=1",
    ]
    said = ""
    for command in (
        ["validate", "sft", *words],
        ["plan", "sft", *words],
        ["migrate", "../old.yaml"],
        ["migrate", "../old.yaml", "--json"],
        ["migrate", "../old.yaml", "-o", "new.yaml"],
        ["data", "show", str(data), "--tokenizer", "model"],
        ["data", "show", str(data), "--tokenizer", "model", "--json"],
        ["run", "sft", *words, "-o", "runs/one"],
        ["run", "sft", *words, "max_steps=3", "-o", "runs/one", "--resume", "auto"],
        ["ls", "runs", "--json"],
        ["report", "runs/one"],
        ["generate", "runs/one", f"say {KEY}"],
        ["merge", "runs/one", "-o", "merged"],
        ["export", "runs/one", "-o", "exported"],
        ["upload", "runs/one", "org/x", "--dry-run"],
        ["upload", "runs/one", "org/x"],
    ):
        answer = tt(*command)
        assert answer.code == 0 or command == ["upload", "runs/one", "org/x"], answer.err
        assert found_in(answer.out + answer.err) == [], command
        said += answer.out + answer.err
    assert "[redacted]" in said
    assert (folder / "runs" / "one" / "manifest.json").is_file()
    assert (folder / "merged").is_dir()
    assert files_with_secrets(folder) == []


def test_nothing_of_an_ordinary_run_is_taken_for_a_secret(tt, lora_run, tmp_path):
    from tt_ckpt.redaction import redact, redact_data

    assert tt("report", str(lora_run)).code == 0
    texts = {file: file.read_text("utf-8", "replace") for file in lora_run.rglob("*") if file.is_file()}
    assert {"config.yaml", "metrics.jsonl", "manifest.json", "README.md", "report.html"} <= {
        file.name for file in texts
    }
    assert [file.name for file, text in texts.items() if redact(text) != text] == []
    for name in ("manifest.json", "adapter/adapter_config.json"):
        data = json.loads((lora_run / name).read_text())
        assert redact_data(data) == data
    assert not any("[redacted]" in text for text in texts.values())


def test_rows_about_passwords_are_shown_as_the_model_sees_them(tt, folder, model_dir, monkeypatch):
    question, secret = "the password: correct-horse, and Basic arithmetic2operations", "hf_" + "Ab1" * 9
    row = {"prompt": question, "completion": f'set api_key = "sk12345678X" or {secret}'}
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    words = ["data", "show", "rows.jsonl", "--tokenizer", str(model_dir)]
    said = [tt(*words).out, tt(*words, "--json").out]
    monkeypatch.setenv("FORCE_COLOR", "1")
    said.append(tt(*words).out)
    assert "\x1b[32m" in said[2]
    for text in said:
        assert question in text
        assert "sk12345678X" in text
        assert secret not in text
    shown = json.loads(said[1])["shown"][0]["documents"][0]["pieces"]
    assert any('api_key = "sk12345678X"' in piece["text"] for piece in shown)


def test_the_adapter_of_a_run_that_is_a_link_is_not_sent(tt, folder, lora_run):
    shutil.copytree(lora_run, folder / "run")
    shutil.move(folder / "run" / "adapter", folder.parent / "elsewhere")
    (folder / "run" / "adapter").symlink_to(folder.parent / "elsewhere")
    answer = tt("upload", "run", "org/x", "--dry-run")
    assert answer.code == 2, answer.err
    assert "adapter" in answer.err


def test_what_libraries_log_at_their_loudest_shows_no_secret(tt_process, folder, monkeypatch):
    loud = {"HF_DEBUG": "1", "HF_HUB_VERBOSITY": "debug", "HF_HUB_OFFLINE": "0"}
    answer = tt_process("download", "org/x", "-v", env={**os.environ, **loud})
    assert "org/x" in answer.err
    assert found_in(answer.out + answer.err) == []
