"""What ``upload`` sends: the files of a model, and nothing that was left beside them."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import save_file

import tt_ckpt

pytest.importorskip("huggingface_hub")
REPO = "someone/some-model"
STRAY = (
    "credentials.json",
    "service_account.json",
    "client_secret_1.json",
    ".env",
    "id_rsa",
    "optimizer.pt",
    "train.py",
    "optimizer.safetensors",
    "rng_state.safetensors",
    "training_args.bin",
    "trainer_state.json",
    "notes.ipynb",
    "x.gguf",
    "settings.json",
    "config.json.bak",
    "README.md~",
    "pytorch_model.bin",
    "metrics.jsonl",
    "train.log",
    "manifest.json",
    "tokenizer.json.orig",
    "config.yaml",
    "model.safetensors.part",
    "Config.json",
    "vocab.json.txt",
    "token",
)
FOLDERS = (".git", ".cache", "wandb", "checkpoints", "runs", "checkpoint-100", "additional_things", "original")


def sent(folder, **options):
    report = tt_ckpt.upload(folder, REPO, dry_run=True, **options)
    return sorted(report.files), sorted(report.left_out)


def test_only_the_files_of_a_model_are_sent_and_the_others_are_named(server, model_dir):
    source = model_dir()
    names = sorted([*(file.name for file in source.iterdir()), "README.md"])
    for name in STRAY:
        (source / name).write_text("x")
    for name in FOLDERS:
        (source / name).mkdir()
        (source / name / "config.json").write_text('{"k": 1}')
        (source / name / "model.safetensors").write_bytes(b"x")
    files, left_out = sent(source)
    assert files == names
    assert left_out == sorted([*STRAY, *(f"{name}/" for name in FOLDERS)])
    assert server.log == []
    tt_ckpt.upload(source, REPO)
    assert sorted(server.files) == names


def test_all_that_belongs_to_a_model_is_sent(server, model_dir):
    source = model_dir()
    more = [
        "README.md",
        "LICENSE",
        "NOTICE.txt",
        "USE_POLICY.md",
        "merges.txt",
        "vocab.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "a.tiktoken",
        "additional_chat_templates/tool.jinja",
        "preprocessor_config.json",
    ]
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "notes.txt").write_text("x")
    for name in more:
        (source / name).write_text("{}")
    files, left_out = sent(source)
    assert set(more) <= set(files)
    assert left_out == ["additional_chat_templates/notes.txt"]
    assert "chat_template.jinja" not in sent(source, ignore=["*.jinja"])[0]
    assert "additional_chat_templates/tool.jinja" in sent(source, ignore=["*.jinja"])[0]


def test_of_weights_those_are_sent_that_the_index_names(server, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for number in (1, 2, 3):
        save_file({f"w{number}": torch.ones(4)}, tmp_path / f"model-0000{number}-of-00002.safetensors")
    index = {"weight_map": {f"w{number}": f"model-0000{number}-of-00002.safetensors" for number in (1, 2)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    files, left_out = sent(tmp_path)
    assert [name for name in files if name.startswith("model-")] == sorted(index["weight_map"].values())
    assert left_out == ["model-00003-of-00002.safetensors"]
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="the index names files that do not exist: model-00002-of-00002.safetensors"):
        sent(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../id_rsa.safetensors"}}')
    with pytest.raises(ValueError, match=r"id_rsa|no safetensors"):
        sent(tmp_path)


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{", "[" * 5000])
def test_an_index_that_is_none_is_an_error_of_ours(server, model_dir, index):
    source = model_dir()
    (source / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match="index.json"):
        sent(source)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "README.md", "tokenizer.json", "LICENSE"])
@pytest.mark.parametrize("inside", [True, False])
def test_a_link_is_never_followed(server, model_dir, tmp_path, name, inside):
    source = model_dir()
    secret = (source if inside else tmp_path) / ("other.json" if inside else "id_rsa")
    secret.write_text("-----BEGIN")
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(secret)
    with pytest.raises(ValueError, match=f"{name}: refused: a link; copy the file there"):
        sent(source)
    assert server.log == []


def test_a_folder_of_templates_that_is_a_link_is_not_followed(server, model_dir, tmp_path):
    source = model_dir()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "x.jinja").write_text("private")
    (source / "additional_chat_templates").symlink_to(tmp_path / "home")
    with pytest.raises(ValueError, match=r"additional_chat_templates: refused: a link that leaves its folder"):
        sent(source)


@pytest.mark.parametrize("kind", ["pipe", "folder", "socket"])
def test_a_special_file_is_refused_and_not_waited_for(server, model_dir, kind, monkeypatch):
    import socket

    source = model_dir()
    (source / "tokenizer.json").unlink()
    monkeypatch.chdir(source)
    if kind == "pipe":
        os.mkfifo("tokenizer.json")
    elif kind == "folder":
        os.mkdir("tokenizer.json")
    else:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind("tokenizer.json")
    with pytest.raises(ValueError, match=f"tokenizer.json: a {kind}, not a regular file"):
        sent(source)


def test_what_is_named_as_weights_must_be_weights(server, model_dir):
    """A hard link to a key is a regular file; its contents tell."""
    source = model_dir()
    (source / "model.safetensors").write_bytes(b"-----BEGIN OPENSSH PRIVATE KEY-----\n" * 9)
    with pytest.raises(ValueError, match="model.safetensors"):
        sent(source)


def test_a_snapshot_of_the_cache_can_be_sent(server, repository):
    path = tt_ckpt.download(REPO).path
    assert "model.safetensors" in sent(path)[0]


SECRETS = {
    "token": "hf_" + "aB1" * 10,
    "key": "sk-proj-" + "a" * 40,
    "password": 'password = "hunter2"',
    "pem": "-----BEGIN PRIVATE KEY-----\nMIIE\n-----END PRIVATE KEY-----",
    "url": "https://joe:secret@host/x",
    "aws": "aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
}


@pytest.mark.parametrize("kind", SECRETS)
@pytest.mark.parametrize("name", ["README.md", "chat_template.jinja", "LICENSE", "tokenizer.model", "vocab.txt"])
def test_a_secret_in_any_file_is_named_by_file_and_line(server, model_dir, name, kind):
    source = model_dir()
    (source / name).write_text(f"one\ntwo\n{SECRETS[kind]}\n")
    with pytest.raises(ValueError, match=rf"{name}:3: a secret .*remove it before uploading") as caught:
        tt_ckpt.upload(source, REPO)
    assert not any(word in str(caught.value) for word in ("hunter2", "aB1aB1", "MIIE", "secret@", "wJalr"))
    assert server.log == []


@pytest.mark.parametrize("text", ['{"a": {"auth_token": "abcd1234"}}', r'{"k": "\u0068f_' + "aB1" * 10 + '"}'])
@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "config.json", "generation_config.json", "adapter_config.json"]
)
def test_a_secret_in_json_is_found_in_escapes_too(server, model_dir, name, text):
    source = model_dir()
    (source / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name}:1: a secret"):
        sent(source)


def test_a_secret_of_this_machine_is_found_by_its_value(server, model_dir, monkeypatch):
    source = model_dir()
    (source / "README.md").write_text("see\nplain-words-as-a-token")
    assert "README.md" in sent(source)[0]
    monkeypatch.setenv("MY_TOKEN", "plain-words-as-a-token")
    with pytest.raises(ValueError, match="README.md:2: a secret"):
        sent(source)


def test_a_secret_in_the_metadata_of_weights_is_found(server, model_dir):
    source = model_dir()
    header = {"__metadata__": {"note": "hf_" + "aB1" * 10}, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    (source / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    with pytest.raises(ValueError, match="model.safetensors: a secret in its __metadata__"):
        sent(source)


def test_a_secret_in_the_card_that_is_made_stays_here(server, model_dir):
    source = model_dir()
    config = json.loads((source / "config.json").read_text()) | {"architectures": ["x"]}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="a secret"):
        sent(source, base_model="org/hf_" + "aB1" * 10)


@pytest.mark.parametrize("name", ["../x", "a/b/c", "-o", "a\nb", "https://huggingface.co/a/b", "a b"])
def test_a_repository_id_that_is_none_is_refused_before_anything_is_read(server, model_dir, name):
    source = model_dir()
    with pytest.raises(ValueError, match="nor a repository id"):
        tt_ckpt.upload(source, name)
    with pytest.raises(ValueError, match="is not a branch"):
        tt_ckpt.upload(source, REPO, revision="../x")
    assert server.log == []


def test_what_a_config_says_is_no_markup_in_the_card(tmp_path):
    save_file({"a": torch.ones(4)}, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "<img src=x>|[a](javascript:1)\n---\nlicense: evil", "r": "8\n# x"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    card = tt_ckpt.model_card(tmp_path, REPO)
    assert "| architecture | unknown |" in card
    assert "(rank unknown)" in card
    assert not any(word in card for word in ("evil", "javascript", "<img"))
