"""Download and upload against a hub of our own on this machine, which can truncate, flip, fail and demand a token."""

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tt_ckpt
from tt_ckpt.hub.download import FIRST_CONTACT_S
from tt_ckpt.hub.failures import explained

hub = pytest.importorskip("huggingface_hub")
CANARY = "hf_CANARYcanaryCANARYcanary123"
REPO = "someone/some-model"


def test_what_a_model_needs_is_fetched_and_verified(server, repository):
    report = tt_ckpt.download(REPO)
    names = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(report.files) == names
    assert report.revision == server.commit
    assert report.num_verified == 4
    for name in names:
        assert (repository / name).read_bytes() == (tt_ckpt.resolve(report.path) / name).read_bytes()
    assert report.num_bytes == sum((repository / name).stat().st_size for name in names)


def test_patterns_and_directory_are_the_callers(server, repository, tmp_path):
    report = tt_ckpt.download(REPO, output_dir=tmp_path / "here", allow=["*.py", "*.json"], ignore=["tokenizer*"])
    assert sorted(report.files) == ["config.json", "generation_config.json", "notes.py", "original/params.json"]
    assert (tmp_path / "here" / "notes.py").read_text() == "print()"


@pytest.mark.parametrize("changed", ["before", "since"])
def test_a_file_of_the_users_in_the_directory_is_not_replaced(server, repository, tmp_path, changed):
    here = tmp_path / "here"
    if changed == "before":
        here.mkdir()
    else:
        tt_ckpt.download(REPO, output_dir=here)
    (here / "config.json").write_text("mine")
    os.utime(here / "config.json", (4e9, 4e9))  # later than any download
    with pytest.raises(FileExistsError, match=r"config.json: not as a download left it.*remove"):
        tt_ckpt.download(REPO, output_dir=here)
    assert (here / "config.json").read_text() == "mine"
    (here / "config.json").unlink()
    tt_ckpt.download(REPO, output_dir=here)
    server.files["config.json"] += b" "  # a newer one comes over the older
    server.commit = "d" * 40
    tt_ckpt.download(REPO, output_dir=here)
    assert (here / "config.json").read_bytes() == server.files["config.json"]


def test_a_repository_id_is_a_path_everywhere(server, repository, tiny, equal_models, tmp_path):
    model = tiny(5)
    tt_ckpt.load_weights(model, REPO)
    assert equal_models(model, tiny(1))
    assert tt_ckpt.read_config(REPO)["model_type"] == "llama"
    tt_ckpt.convert(REPO, tmp_path / "meta", "meta")
    tt_ckpt.save_hf(model, tmp_path / "out", config={}, source=REPO)
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_what_is_in_the_cache_needs_no_network(server, repository, monkeypatch):
    from huggingface_hub import constants

    path = tt_ckpt.resolve(REPO)
    server.log.clear()
    assert tt_ckpt.resolve(REPO) == path
    assert server.log == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert tt_ckpt.resolve(REPO) == path
    assert tt_ckpt.download(REPO).path == str(path)
    with pytest.raises(FileNotFoundError, match=r"not completely in the cache, and HF_HUB_OFFLINE.*someone/some-model"):
        tt_ckpt.resolve("someone/some-modell")


def test_offline_nothing_is_said_to_be_in_a_directory_where_it_is_not(server, repository, monkeypatch, tmp_path):
    from huggingface_hub import constants

    tt_ckpt.download(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE is set: not fetched again; copy it from"):
        tt_ckpt.download(REPO, output_dir=tmp_path / "here")


def test_a_cut_connection_is_resumed(server, repository):
    server.cut = {"model.safetensors": 1}
    report = tt_ckpt.download(REPO)
    ranges = [headers.get("Range") for method, path, headers in server.log if method == "GET" and "safetensors" in path]
    assert any(value and value != "bytes=0-" for value in ranges)
    assert (tt_ckpt.resolve(report.path) / "model.safetensors").read_bytes() == server.files["model.safetensors"]


def test_files_that_are_there_are_not_fetched_again(server, repository):
    tt_ckpt.download(REPO)
    server.log.clear()
    tt_ckpt.download(REPO)
    assert [path for method, path, _ in server.log if method == "GET" and "/resolve/" in path] == []


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "api"])
def test_temporary_failures_are_retried(server, repository, name):
    server.fail = {name: 2}
    assert tt_ckpt.download(REPO, retry_s=30).num_verified == 4


def test_lasting_failures_end_in_one_line(server, repository):
    server.fail = {"model.safetensors": 10**6}
    with pytest.raises(ConnectionError, match="run the same command again, it resumes") as caught:
        tt_ckpt.download(REPO, retry_s=1.0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("where", ["cache", "directory"])
def test_a_flipped_bit_is_noticed_and_fetched_again(server, repository, caplog, tmp_path, name, where):
    server.flip = {name: 1}
    with caplog.at_level(logging.WARNING):
        report = tt_ckpt.download(REPO, output_dir=tmp_path / "here" if where == "directory" else None)
    assert f"{name} is damaged" in caplog.text
    assert (tt_ckpt.resolve(report.path) / name).read_bytes() == server.files[name]


def test_a_file_that_stays_damaged_is_an_error_and_is_not_kept(server, repository):
    server.flip = {"model.safetensors": 10**6}
    with pytest.raises(OSError, match=r"model.safetensors arrived damaged twice"):
        tt_ckpt.download(REPO)
    server.flip = {}
    assert tt_ckpt.download(REPO).num_verified == 4


def test_a_bit_that_flips_in_the_cache_is_found_by_downloading_again(server, repository):
    path = tt_ckpt.resolve(tt_ckpt.download(REPO).path) / "model.safetensors"
    blob = path.resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(data)
    tt_ckpt.download(REPO)
    assert path.read_bytes() == server.files["model.safetensors"]


@pytest.mark.parametrize("where", ["cache", "directory"])
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_bit_that_flips_on_the_disk_is_found_by_its_hash(server, repository, tmp_path, where, name):
    path = tt_ckpt.resolve(tt_ckpt.download(REPO, output_dir=tmp_path / "here" if where == "directory" else None).path)
    (path / "mine.txt").write_text("x")
    found = tt_ckpt.verify_files(path)
    assert found.files == ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    assert found.without_hash == ["mine.txt"]
    file = (path / name).resolve()
    data = bytearray(file.read_bytes())
    data[-1] ^= 2
    file.unlink()
    file.write_bytes(data)
    with pytest.raises(ValueError, match=f"{name}: contents changed since the download"):
        tt_ckpt.verify_files(path)


def test_a_damaged_cache_does_not_stand_in_for_a_download_into_a_directory(server, repository, tmp_path):
    blob = (Path(tt_ckpt.download(REPO).path) / "model.safetensors").resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(data)
    tt_ckpt.download(REPO, output_dir=tmp_path / "here")
    assert (tmp_path / "here" / "model.safetensors").read_bytes() == server.files["model.safetensors"]


@pytest.mark.parametrize("files", [{}, {"notes.py": b"print()", "data.csv": b"a"}])
def test_a_repository_without_a_model_is_an_error_and_not_an_empty_folder(server, files, tmp_path):
    server.files = files
    with pytest.raises(
        FileNotFoundError, match=f"{REPO}: has no file of a model; there is: (nothing|notes.py, data.csv)"
    ):
        tt_ckpt.download(REPO, output_dir=tmp_path / "here")
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize(("change", "kind", "message"), [
    ({"gated": True}, PermissionError, "gated: accept its terms at https://huggingface.co/.*with an account"),
    ({"exists": False}, FileNotFoundError, "no such repository, or private; if it is private, set HF_TOKEN"),
    ({"needs_token": True}, FileNotFoundError, "no such repository, or private; if it is private, set HF_TOKEN"),
])  # fmt: skip
def test_refusals_are_explained(server, repository, change, kind, message):
    for name, value in change.items():
        setattr(server, name, value)
    with pytest.raises(kind, match=message) as caught:
        tt_ckpt.download(REPO)
    assert "\n" not in str(caught.value)
    with pytest.raises(kind, match=message):
        tt_ckpt.resolve(REPO)


@pytest.mark.parametrize("change", [{"gated": True}, {"exists": False}])
@pytest.mark.parametrize("source", ["HF_TOKEN", "of hf auth login"])
def test_refusals_name_the_token_that_was_used_and_not_its_value(server, monkeypatch, tmp_path, change, source):
    from huggingface_hub import constants

    if source == "HF_TOKEN":
        monkeypatch.setenv("HF_TOKEN", CANARY)
    else:
        (tmp_path / "token").write_text(CANARY)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    for name, value in change.items():
        setattr(server, name, value)
    with pytest.raises(OSError, match=rf"the account of your token \({source}\)") as caught:
        tt_ckpt.download(REPO)
    assert CANARY not in str(caught.value)


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_what_is_fetched_has_the_modes_of_the_umask(server, repository, tmp_path, umask):
    before = os.umask(umask)
    try:
        tt_ckpt.download(REPO, output_dir=tmp_path / "here")
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "here").iterdir() if path.is_file()}
    assert modes == {0o666 & ~umask & 0o644 | 0o600}


def test_a_revision_that_is_none_is_named(server, repository):
    with pytest.raises(FileNotFoundError, match="no revision nightly"):
        tt_ckpt.download(REPO, revision="nightly")
    assert tt_ckpt.download(REPO, revision="main").revision == server.commit


def test_a_word_that_is_no_repository_is_explained(server):
    with pytest.raises((ValueError, FileNotFoundError), match="no such directory|neither a directory"):
        tt_ckpt.resolve("not a repo!")


def test_file_names_that_leave_the_folder_are_refused(server, repository):
    server.files["../../escape.json"] = b"{}"
    with pytest.raises(ValueError, match="refused the file name"):
        tt_ckpt.download(REPO)


def test_too_little_space_is_told_before_the_transfer(server, repository, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(OSError, match="needs .* KB, .* has 1 byte free"):
        tt_ckpt.download(REPO)
    assert not [path for method, path, _ in server.log if "/resolve/" in path]


# ---- tokens ----------------------------------------------------------------------------------------------------------


def test_the_token_of_the_environment_is_used_and_never_shown(server, repository, monkeypatch, caplog, capfd):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    server.needs_token = True
    with caplog.at_level(logging.DEBUG):
        tt_ckpt.download(REPO)
        server.gated = True
        with pytest.raises(PermissionError) as caught:
            tt_ckpt.download(REPO, revision="main")
    assert any(headers.get("authorization") or headers.get("Authorization") for _, _, headers in server.log)
    out = capfd.readouterr()
    assert CANARY not in out.out + out.err + caplog.text + str(caught.value)


def test_a_token_sent_to_another_host_is_reported(server, repository, monkeypatch, caplog):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    with caplog.at_level(logging.WARNING):
        tt_ckpt.download(REPO)
    assert "your Hugging Face token is sent to 127.0.0.1 (HF_ENDPOINT)" in caplog.text


def test_without_a_token_nothing_is_told(server, repository, caplog):
    with caplog.at_level(logging.WARNING):
        tt_ckpt.download(REPO)
    assert "token" not in caplog.text


def test_plain_http_to_another_host_is_refused_before_a_request(server, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.example.com")
    for action in (lambda: tt_ckpt.download(REPO), lambda: tt_ckpt.upload("x", REPO)):
        with pytest.raises(ValueError, match="expected https"):
            action()
    assert server.log == []


def test_secrets_are_redacted_by_value_and_by_look(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("MY_TOKEN", "short")
    text = f"a {CANARY} b 0123456789abcdef c short d hf_{'x' * 30}"
    assert tt_ckpt.redact(text) == "a [redacted] b [redacted] c short d [redacted]"


def test_a_password_in_an_endpoint_is_redacted(server, monkeypatch):
    from huggingface_hub import constants

    text = "GET https://joe:pa55word@hub.example/api by ssh://git@host of joe@example.com"
    assert tt_ckpt.redact(text) == "GET https://[redacted]@hub.example/api by ssh://git@host of joe@example.com"
    monkeypatch.setattr(constants, "ENDPOINT", "http://joe:pa55word@hub.example")
    with pytest.raises(ValueError, match="expected https") as caught:
        tt_ckpt.download(REPO)
    assert "pa55word" not in str(caught.value)


def test_a_password_in_the_endpoint_reaches_no_report_and_no_log(server, model_dir, monkeypatch, caplog, capsys):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", server.url.replace("://", "://joe:pa55word@"))
    monkeypatch.setenv("HF_TOKEN", CANARY)
    with caplog.at_level(logging.DEBUG, logger="tt.endpoint"):
        report = tt_ckpt.upload(model_dir(), REPO)
        found = tt_ckpt.download(REPO)
    assert report.url == f"{server.url}/{REPO}"
    said = [str(record.__dict__) for record in caplog.records if record.name.startswith("tt")]
    assert "pa55word" not in "".join([*said, *capsys.readouterr(), str(report), str(found)])


def test_a_failure_of_the_library_that_quotes_the_endpoint_is_redacted(server, monkeypatch):
    class OtherError(OSError):
        """Any of the many that a library may raise."""

    failure = explained(OtherError("GET https://joe:pa55word@hub.example/api: refused"), REPO, None)
    assert str(failure) == "GET https://[redacted]@hub.example/api: refused"
    assert explained(untouched := OtherError("refused"), REPO, None) is untouched


# ---- upload ----------------------------------------------------------------------------------------------------------


def test_a_model_goes_up_with_a_card_and_comes_back(server, model_dir, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    server.needs_token = True
    source = model_dir()
    for name in ("optimizer.pt", ".env", "train.py"):
        (source / name).write_text("x")
    report = tt_ckpt.upload(source, REPO, base_model="a/base", message="hello")
    names = ["README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(server.files) == report.files == names
    assert report.num_verified == 1
    assert report.url.endswith(REPO)
    assert server.created["name"] == "some-model"
    assert server.created.get("private") is True or server.created.get("visibility") == "private"
    card = server.files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: transformers\nbase_model: a/base\n")
    assert "| parameters | 27,424 |" in card
    assert CANARY not in card
    assert tt_ckpt.download(REPO).num_verified == 5


def test_an_adapter_gets_an_adapters_card(server, tmp_path):
    save_file({"a": torch.ones(600)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "base_model_name_or_path": "a/base"}')
    tt_ckpt.upload(tmp_path, REPO, private=False)
    card = server.files["README.md"].decode()
    assert "library_name: peft\nbase_model: a/base" in card
    assert "rank 4" in card
    assert server.created.get("private") is False or server.created.get("visibility") == "public"


@pytest.mark.parametrize("base", ["/home/me/base-of-mine", "base\nlicense: evil", ["a"]])
def test_a_base_that_is_no_repository_is_not_in_the_card(tmp_path, base):
    """The hub refuses a card whose base_model is a path, and a newline would write fields of its own."""
    save_file({"a": torch.ones(600)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": base}))
    card = tt_ckpt.model_card(tmp_path, REPO)
    assert "base_model:" not in card
    assert "of-mine" not in card
    assert "evil" not in card


@pytest.mark.parametrize("config", ["[]", '{"architectures": [1]}', '{"model_type": 3}'])
def test_an_odd_config_has_a_card_or_is_our_error(tmp_path, config):
    (tmp_path / "config.json").write_text(config)
    with contextlib.suppress(ValueError):
        assert tt_ckpt.model_card(tmp_path, REPO).startswith("---")


def test_a_readme_of_ones_own_is_kept(server, model_dir):
    source = model_dir()
    (source / "README.md").write_text("mine")
    tt_ckpt.upload(source, REPO)
    assert server.files["README.md"] == b"mine"


def test_a_readme_that_the_repository_has_is_kept(server, model_dir):
    server.files["README.md"] = b"theirs"
    report = tt_ckpt.upload(model_dir(), REPO)
    assert "README.md" not in report.files
    assert server.files["README.md"] == b"theirs"


def test_a_dry_run_sends_nothing(server, model_dir):
    report = tt_ckpt.upload(model_dir(), REPO, dry_run=True)
    assert "model.safetensors" in report.files
    assert report.commit is None
    assert server.log == []


def test_files_that_hold_a_token_stay_here(server, model_dir):
    source = model_dir()
    (source / "tokenizer_config.json").write_text(json.dumps({"token": CANARY}))
    with pytest.raises(ValueError, match=r"tokenizer_config.json:1: a secret") as caught:
        tt_ckpt.upload(source, REPO)
    assert CANARY not in str(caught.value)
    assert server.log == []


@pytest.mark.parametrize("fault", ["flip", "drop"])
def test_what_does_not_arrive_whole_is_an_error(server, model_dir, fault):
    server.flip = {"upload": 1 if fault == "flip" else 0}
    server.drop_uploads = fault == "drop"
    with pytest.raises(OSError, match=r"model.safetensors (arrived damaged|did not arrive)"):
        tt_ckpt.upload(model_dir(), REPO)


def test_a_directory_without_weights_is_refused(server, tmp_path):
    with pytest.raises(ValueError, match="no safetensors files to upload"):
        tt_ckpt.upload(tmp_path, REPO)
    with pytest.raises(FileNotFoundError, match="no such directory"):
        tt_ckpt.upload(tmp_path / "none", REPO)


def test_upload_without_permission_is_explained(server, model_dir, monkeypatch):
    server.needs_token = True
    model = model_dir()
    with pytest.raises(PermissionError, match=f"{REPO}: .*run `hf auth login`, or set HF_TOKEN") as caught:
        tt_ckpt.upload(model, REPO)
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", CANARY[:-3] + "abc")
    with pytest.raises(PermissionError, match=r"127.0.0.1 does not accept your token \(HF_TOKEN; 401\)"):
        tt_ckpt.upload(model, REPO)


def test_environment_variables_rule_a_fresh_process(server, repository, tmp_path):
    code = f"import tt_ckpt, logging; logging.basicConfig(level='DEBUG'); print(tt_ckpt.download({REPO!r}).path)"
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": CANARY,
                   "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}  # fmt: skip
    server.needs_token = True
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "home") in done.stdout
    assert CANARY not in done.stdout + done.stderr
    saved = [file for file in (tmp_path / "home").rglob("*") if file.is_file() and CANARY.encode() in file.read_bytes()]
    assert saved == []
    assert load_file(tt_ckpt.resolve(done.stdout.strip()) / "model.safetensors")


def test_a_hub_that_never_answers_is_given_up_soon(monkeypatch, tmp_path):
    """A mistyped folder on a machine without network must not wait for minutes."""
    from huggingface_hub import constants

    with socket.socket() as free:  # a port that nobody listens on
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    pauses = []
    monkeypatch.setattr("tt_ckpt.hub.download.time.sleep", pauses.append)
    with pytest.raises(ConnectionError, match="no directory of that name here"):
        tt_ckpt.download("nobody/nothing", output_dir=tmp_path)
    assert all(pause <= FIRST_CONTACT_S for pause in pauses)  # a hub that has answered is waited for longer
