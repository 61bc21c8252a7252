"""Secrets: by value in every spelling, by form, and nothing else."""

import base64
import html
import json
import urllib.parse
from pathlib import Path

import pytest
import yaml

from tt_ckpt.redaction import MARK, redact, redact_data, redact_known, secret_line

VALUE = "canary/Value with+\"quotes'\\&<e"


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    for name in ("HF_TOKEN", "HF_ENDPOINT", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "WANDB_API_KEY",
        "MY_SECRET",
        "DB_PASSWORD",
        "PGPASSWD",
        "AZURE_PAT",
        "X_CREDENTIALS",
        "my_token",
        "openai_api_key",
        "PASSWORD",
        "MYSQL_PWD",
    ],
)
def test_the_value_of_a_variable_that_is_named_so_is_blanked(monkeypatch, name):
    monkeypatch.setenv(name, "ordinary-looking")
    assert redact("before ordinary-looking after") == f"before {MARK} after"
    assert redact_known("before ordinary-looking after") == f"before {MARK} after"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TOKENIZERS_PARALLELISM", "ordinary-looking"),
        ("HF_TOKEN", "short"),
        ("OLDPWD", "ordinary-looking"),
        ("SSH_AUTH_SOCK", "ordinary-looking"),
        ("SIGNING_KEY", str(Path(__file__))),
        ("A_TOKEN", "[redacted"),
    ],
)
def test_what_is_no_secret_of_the_environment_stays(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert redact(f"an ordinary-looking short {__file__} {MARK}") == f"an ordinary-looking short {__file__} {MARK}"


@pytest.mark.parametrize(
    "spelt",
    [
        VALUE,
        json.dumps(VALUE),
        json.dumps(VALUE, ensure_ascii=False),
        repr(VALUE),
        html.escape(VALUE),
        urllib.parse.quote(VALUE),
        urllib.parse.quote(VALUE, safe=""),
        urllib.parse.quote_plus(VALUE),
        urllib.parse.quote(VALUE, safe="").lower().replace("value", "Value"),
        yaml.safe_dump({"a": VALUE}, width=1000),
        base64.b64encode(VALUE.encode()).decode(),
        base64.urlsafe_b64encode(f"user:{VALUE}".encode()).decode(),
        base64.b64encode(f"xy{VALUE}tail".encode()).decode(),
        VALUE.encode().hex(),
    ],
)
def test_a_value_is_found_in_every_spelling(monkeypatch, spelt):
    monkeypatch.setenv("MY_TOKEN", VALUE)
    found = redact(spelt)
    assert MARK in found
    assert "canary" not in found
    assert len(found) < len(spelt)


def test_a_value_of_several_lines_is_found_when_its_lines_were_joined(monkeypatch):
    monkeypatch.setenv("SSH_KEY", "first line of it 123\nsecond line of it 456\n")
    assert "line of it" not in redact("failed: first line of it 123; second line of it 456")


def test_the_files_of_logins_are_secrets_and_changes_of_them_are_seen(monkeypatch, tmp_path):
    home = tmp_path / "hf"
    home.mkdir()
    (home / "token").write_text("login-file-canary\n")
    (home / "stored_tokens").write_text("[work]\nhf_token = stored-canary-1\n[other]\nhf_token=stored-canary-2\n")
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password netrc-canary\n")
    text = "login-file-canary stored-canary-1 stored-canary-2 netrc-canary work user api.wandb.ai"
    assert redact(text) == f"{MARK} {MARK} {MARK} {MARK} work user api.wandb.ai"
    (home / "token").write_text("another-file-canary-now\n")
    assert redact("another-file-canary-now") == MARK
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "elsewhere"))
    assert redact("elsewhere") == "elsewhere"


def test_a_token_file_that_is_a_pipe_or_huge_is_not_waited_for(tmp_path):
    import os

    home = tmp_path / "hf"
    home.mkdir()
    os.mkfifo(home / "token")
    (tmp_path / "netrc").write_bytes(b"\xff password " * 100_000)
    assert redact("text") == "text"


@pytest.mark.parametrize("password", ["p@ss:w", "hunter22", "p/a#s?s", "p%40ssw", "with\"quote'"])
@pytest.mark.parametrize("name", ["HF_ENDPOINT", "HTTPS_PROXY", "PIP_INDEX_URL"])
def test_the_password_of_a_url_is_found_by_value(monkeypatch, name, password):
    monkeypatch.setenv(name, f"https://joe:{password}@host.example/api")
    for text in (f"GET https://joe:{password}@host.example/api", f"auth joe:{password}", f"{password!r}"):
        assert password not in redact(text), text
    if "%" in password:
        assert "p@ssw" not in redact("the password p@ssw")


@pytest.mark.parametrize("url", ["https://huggingface.co/a/b@main", "http://host:8080/path@1.2", "git@github.com:a/b"])
def test_a_url_without_a_password_has_no_secret(monkeypatch, url):
    monkeypatch.setenv("HF_ENDPOINT", url)
    assert redact(f"see {url}, 8080/path, a/b@main") == f"see {url}, 8080/path, a/b@main"


SECRETS = [
    "hf_" + "a1" * 15,
    "api_org_" + "Ab" * 12,
    "sk-proj-" + "a" * 40,
    "sk-ant-api03-" + "x_" * 20,
    "sk-" + "aB3" * 10,
    "ghp_" + "a1" * 18,
    "github_pat_" + "1a_" * 20,
    "glpat-" + "a1" * 10,
    "xoxb-1234567890-abcdef",
    "AKIAIOSFODNN7EXAMPLE",
    "AIza" + "a1B2c" * 7,
    "npm_" + "a" * 36,
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmNHl0w5N",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA\nabc=\n-----END RSA PRIVATE KEY-----",
    "-----BEGIN PRIVATE KEY-----\\nMIIEpAIB",
    "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXk",
]


@pytest.mark.parametrize("secret", SECRETS, ids=lambda text: text[:16])
@pytest.mark.parametrize("around", ["{}", "a {} b", '"{}"', "x={}", "\\n{}", "\x1b[31m{}", "({})", "%20{}"])
def test_text_that_looks_like_a_secret_is_removed(secret, around):
    if secret.startswith(("sk-", "eyJ", "AKIA", "AIza")) and around in ("\\n{}", "\x1b[31m{}", "%20{}"):
        pytest.skip("the letter before it may be a part of a word")
    found = redact(around.format(secret))
    assert MARK in found
    assert secret[-8:] not in found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://user:p@ss:w@host/x", "https://[redacted]@host/x"),
        ("HTTP://joe:pw@host", "HTTP://[redacted]@host"),
        (r"https:\/\/joe:pw@host", r"https:\/\/[redacted]@host"),
        ("https://" + "a1" * 12 + "@github.com/x", "https://[redacted]@github.com/x"),
        ('password: "hunter2"', 'password: "[redacted]"'),
        ("password='it is'", "password='[redacted]'"),
        ("password: hunter22", "password: [redacted]"),
        ("db_password = correcthorsebattery", "db_password = [redacted]"),
        (r'{"password": "hun\"ter2", "a": 1}', '{"password": "[redacted]", "a": 1}'),
        (r'"{\"password\": \"hunter2\"}"', r'"{\"password\": \"[redacted]\"}"'),
        ('f(api_key="abcd1234", n=2)', 'f(api_key="[redacted]", n=2)'),
        ("aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "aws_secret_access_key = [redacted]"),
        ("clientSecret=abcDEF12345&x=1", "clientSecret=[redacted]&x=1"),
        ("Authorization: Bearer abcdef12", "Authorization: Bearer [redacted]"),
        ("{'authorization': 'Basic dXNlcjpwYXNz'}", "{'authorization': 'Basic [redacted]'}"),
        ("tt --token abcdef123456 x", "tt --token [redacted] x"),
        ("token: 0123456789abcdef01234567", "token: [redacted]"),
    ],
)
def test_passwords_keys_and_headers_are_blanked_in_their_place(text, expected):
    assert redact(text) == expected
    assert redact(expected) == expected


@pytest.mark.parametrize(
    "text",
    [
        "max_tokens: 512",
        "num_key_value_heads: 8",
        "key: value",
        'eos_token: "<|im_end|>"',
        '"pad_token": "[PAD]"',
        '"token": "antidisestablishmentarianism"',
        "sha256: " + "a3" * 32,
        '"password": 5032, "\u0120secret": 6011',
        'token = os.environ["HF_TOKEN"]',
        "api_key=os.getenv('X')",
        'api_key="EMPTY"',
        'api_key="YOUR_API_KEY"',
        "password: str",
        "HF_TOKEN (hf auth login)",
        "https://huggingface.co/org/name@rev",
        "ssh://git@host",
        "joe@example.com",
        "tokens: 123456789",
        "bearer instrumentation",
        "basic understanding",
        "Basic Authentication-free",
        "task-completionandmoreandmore1234",
        "the secret: use a low rate",
        "password=password_from_env",
        "HF_TOKEN=$TOKEN",
        "token=self.config.token",
        "Set HF_TOKEN=<your token>",
        "run-hf_model",
        "model_hf_convertedfromtheoriginalone",
        "eos_token_id: 128001",
        "unk_token=None",
        "special_tokens: {bos_token: <s>}",
        "secretary: someone",
        "author: Jean-Luc (bearer of news)",
        "data.revision: " + "c" * 40,
        "step-000100-1a2b3c4d",
    ],
)
def test_what_is_no_secret_stays(text):
    assert redact(text) == text
    assert secret_line(text) is None


def test_data_is_blanked_in_its_texts_and_by_its_keys(monkeypatch):
    monkeypatch.setenv("MY_KEY", "12345678")
    data = {
        "password": "abcdef",
        "n": 12345678,
        "list": ["x 12345678", ("hf_" + "a1" * 12,)],
        "12345678": None,
        "eos_token": "</s>",
        "api_key": "abcd1234",
        "token": True,
    }
    assert redact_data(data) == {
        "password": MARK,
        "n": 12345678,
        "list": [f"x {MARK}", [MARK]],
        MARK: None,
        "eos_token": "</s>",
        "api_key": MARK,
        "token": True,
    }
    assert json.loads(json.dumps(redact_data(data)))["n"] == 12345678
    assert yaml.safe_load(yaml.safe_dump(redact_data(data)))["password"] == MARK


def test_the_line_of_a_secret_is_known():
    assert secret_line("a\nb\npassword: 'abcdef'\nc") == 3
    assert secret_line("\n\nkey: " + SECRETS[0]) == 3
    assert secret_line("nothing\nhere") is None


@pytest.mark.parametrize(
    "piece",
    [
        "hf_",
        "--secretpassword",
        "sk-",
        "eyJ",
        'password:"',
        'password:\\"',
        "://a:",
        "authorization: ",
        "token:",
        "-----BEGIN PRIVATE KEY-----",
        "secret=\\\\'",
        "bearer ",
        "--token ",
        "a@:",
        "\\",
    ],
)
def test_long_texts_take_time_in_proportion(piece):
    """A second for a text whose time grew with its square would be hours."""
    redact(piece * (300_000 // len(piece)))


def test_the_package_has_one_function_of_the_name():
    import tt_ckpt.hub.upload

    assert tt_ckpt.redact is redact


@pytest.mark.parametrize(("name", "value", "secret"), [
    ("SORT_KEY", "messages", False),
    ("PARTITION_KEY", "assistant", False),
    ("SORT_KEY", "messages7", True),
    ("SERVICE_API_KEY", "messages", True),
    ("MY_TOKEN", "assistant", True),
    ("DB_PASSWORD", "completion", True),
])  # fmt: skip
def test_a_key_that_is_a_plain_word_is_the_name_of_something_and_no_secret(monkeypatch, name, value, secret):
    monkeypatch.setenv(name, value)
    assert (MARK in redact(f"train_on: {value}")) is secret
