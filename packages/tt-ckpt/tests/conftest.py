"""Small models with Hugging Face names, as plain modules, and the directories they are saved in."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

torch.set_num_threads(1)  # tests fork: a child would wait for ever for threads that it does not have


def pytest_addoption(parser):
    group = parser.getgroup("tt-ckpt")
    group.addoption("--crashes", type=int, default=6, help="SIGKILLs during saves (200 keeps the promise)")


class Attention(nn.Module):
    def __init__(self, d: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(d, d, bias=False)
        self.k_proj = nn.Linear(d, d // heads * kv_heads, bias=False)
        self.v_proj = nn.Linear(d, d // heads * kv_heads, bias=False)
        self.o_proj = nn.Linear(d, d, bias=False)


class MLP(nn.Module):
    def __init__(self, d: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d, inner, bias=False)
        self.up_proj = nn.Linear(d, inner, bias=False)
        self.down_proj = nn.Linear(inner, d, bias=False)


class Norm(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))


class Layer(nn.Module):
    def __init__(self, c: SimpleNamespace) -> None:
        super().__init__()
        self.self_attn = Attention(c.hidden_size, c.num_attention_heads, c.num_key_value_heads)
        self.mlp = MLP(c.hidden_size, c.intermediate_size)
        self.input_layernorm = Norm(c.hidden_size)
        self.post_attention_layernorm = Norm(c.hidden_size)


class Tiny(nn.Module):
    """A Llama in names and shapes only. Tied: there is no lm_head parameter."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.config = config
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.model.norm = Norm(config.hidden_size)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": 65,
}


@pytest.fixture
def tiny():
    """tiny(seed=0, device=None, dtype=None, **config fields) -> module"""

    def make(seed=0, *, device=None, dtype=None, **fields):
        torch.manual_seed(seed)
        with torch.device(device or "cpu"):
            model = Tiny(SimpleNamespace(**{**CONFIG, **fields}))
        return model.to(dtype) if dtype else model

    return make


@pytest.fixture
def config():
    """config(**fields) -> dict, as config.json holds it"""
    return lambda **fields: {**CONFIG, **fields}


@pytest.fixture
def model_dir(tmp_path, tiny):
    """model_dir(name="source", seed=1, dtype=None, **fields) -> a directory as the safetensors library writes it"""

    def make(name="source", *, seed=1, dtype=None, **fields) -> Path:
        path = tmp_path / name
        path.mkdir()
        save_file(tiny(seed, dtype=dtype, **fields).state_dict(), path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps({**CONFIG, **fields}, indent=2, sort_keys=True) + "\n")
        (path / "tokenizer.json").write_text("{}")
        (path / "generation_config.json").write_text('{"eos_token_id": 2}\n')
        return path

    return make


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.fixture
def equal_models():
    return same


@pytest.fixture
def equal_dirs():
    """equal_dirs(a, b) -> the names that are not in both with the same bytes"""

    def compare(a: Path, b: Path) -> list[str]:
        names = {p.relative_to(root).as_posix() for root in (a, b) for p in root.rglob("*") if p.is_file()}
        return sorted(
            name
            for name in names
            if not (
                (a / name).is_file() and (b / name).is_file() and (a / name).read_bytes() == (b / name).read_bytes()
            )
        )

    return compare


# ---- a hub of our own, which can truncate, flip, fail and demand a token --------------------------------------------

CANARY = "hf_CANARYcanaryCANARYcanary123"
REPO = "someone/some-model"
LARGE = 2_000  # bytes from which a file is "LFS"


class FakeHub(ThreadingHTTPServer):
    """The part of the hub's protocol that downloads and uploads use. Faults are switched on by attribute."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {}  # name -> bytes
        self.commit = "c" * 40
        self.objects = {}  # uploaded LFS objects
        self.log = []  # (method, path, headers)
        self.gated = self.needs_token = False
        self.exists = True
        self.fail = {}  # name -> how many times to answer 503
        self.cut = {}  # name -> how many times to close the connection halfway
        self.flip = {}  # name -> how many times to send a flipped bit
        self.drop_uploads = False
        self.upload_url = None  # another host for the objects
        self.answer = None  # answer(handler, path) -> whether it has answered, in place of the hub

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def describe(self, name):
        data = self.files[name]
        found = {"rfilename": name, "size": len(data), "blobId": git_sha1(data)}
        if len(data) >= LARGE:
            found["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return found

    def spend(self, faults, name):
        left = faults.get(name, 0)
        faults[name] = left - 1
        return left > 0


def git_sha1(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, status, body=b"", headers=None, *, send_body=True):
        body = json.dumps(body).encode() if not isinstance(body, bytes) else body
        self.send_response(status)
        for key, value in (
            {"Content-Length": str(len(body)), "Content-Type": "application/json"} | (headers or {})
        ).items():
            self.send_header(key, value)
        self.end_headers()
        if send_body and self.command != "HEAD":
            self.wfile.write(body)

    def refused(self):
        server, token = self.server, self.headers.get("Authorization", "")
        if server.needs_token and token != f"Bearer {CANARY}":
            self.reply(
                401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "no"}
            )
        elif server.gated:
            self.reply(
                403, {"error": "gated"}, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}
            )
        elif not server.exists or REPO not in self.path:
            self.reply(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        else:
            return False
        return True

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        server, path = self.server, self.path.partition("?")[0]
        server.log.append((self.command, path, dict(self.headers)))
        if (server.answer is not None and server.answer(self, path)) or self.refused():
            return
        if path.startswith("/api/models/"):
            self.get_api(path)
            return
        name = path.split("/resolve/")[1].partition("/")[2]
        data = server.files[name]
        if self.command == "GET" and server.spend(server.fail, name):
            self.reply(503, b"busy")
            return
        self.send_file(name, data)

    def get_api(self, path):
        server = self.server
        if self.server.spend(server.fail, "api"):
            self.reply(500, b"broken")
        elif "/revision/" in path and path.rpartition("/")[2] not in ("main", server.commit):
            self.reply(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        elif "/tree/" in path:
            entries = []
            for name in server.files:
                told = server.describe(name)
                entry = {"type": "file", "path": name, "size": told["size"], "oid": told["blobId"]}
                if "lfs" in told:
                    entry["lfs"] = {"oid": told["lfs"]["sha256"], "size": told["size"], "pointerSize": 134}
                entries.append(entry)
            self.reply(200, entries)
        else:
            siblings = [server.describe(name) for name in server.files]
            self.reply(200, {"id": REPO, "sha": server.commit, "siblings": siblings, "tags": [], "private": False})

    def send_file(self, name, data):
        server, told = self.server, self.server.describe(name)
        etag = told["lfs"]["sha256"] if "lfs" in told else told["blobId"]
        headers = {"X-Repo-Commit": server.commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes",
                   "Content-Type": "application/octet-stream"}  # fmt: skip
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start, status = (int(match[1]), 206) if match else (0, 200)
        if match:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = data[start:]
        if self.command == "GET" and server.spend(server.flip, name):
            body = body[:-1] + bytes([body[-1] ^ 1])
        if self.command == "GET" and server.spend(server.cut, name):
            self.reply(status, body, headers, send_body=False)
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
            return
        self.reply(status, body, headers)

    def do_POST(self):
        server, path = self.server, self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        server.log.append(("POST", path, dict(self.headers)))
        if server.needs_token and self.headers.get("Authorization") != f"Bearer {CANARY}":
            self.reply(401, {"error": "Invalid credentials"})
        elif path == "/api/repos/create":
            server.created = json.loads(body)
            self.reply(200, {"url": f"{server.url}/{REPO}"})
        elif path == "/api/validate-yaml":
            self.reply(200, {"errors": [], "warnings": []})
        elif "/preupload/" in path:
            told = json.loads(body)["files"]
            mode = lambda file: "lfs" if file["size"] >= LARGE else "regular"  # noqa: E731
            files = [{"path": file["path"], "uploadMode": mode(file), "shouldIgnore": False} for file in told]
            self.reply(200, {"files": files})
        elif path.endswith("/info/lfs/objects/batch"):
            place = server.upload_url or server.url
            told = [{"oid": o["oid"], "size": o["size"],
                     "actions": {"upload": {"href": f"{place}/upload/{o['oid']}", "header": {}}}}
                    for o in json.loads(body)["objects"]]  # fmt: skip
            self.reply(200, {"transfer": "basic", "objects": told}, {"Content-Type": "application/vnd.git-lfs+json"})
        elif "/commit/" in path:
            self.receive_commit(body)
        else:
            self.reply(404, {"error": path})

    def receive_commit(self, body):
        import base64

        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile" and not self.server.drop_uploads:
                self.server.files[value["path"]] = self.server.objects[value["oid"]]
        self.reply(
            200, {"commitOid": self.server.commit, "commitUrl": f"{self.server.url}/{REPO}/commit/c", "hookOutput": ""}
        )

    def do_PUT(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.log.append(("PUT", self.path, dict(self.headers)))
        if self.server.spend(self.server.flip, "upload"):
            data = data[:-1] + bytes([data[-1] ^ 1])
        self.server.objects[self.path.rpartition("/")[2]] = data
        self.reply(200)


@pytest.fixture
def server(tmp_path, monkeypatch):
    from huggingface_hub import constants

    fake = FakeHub()
    threading.Thread(target=fake.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", fake.url)  # read from the environment when the library is imported
    template = fake.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what has arrived is kept in such pieces
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield fake
    fake.shutdown()
    fake.server_close()


@pytest.fixture
def repository(server, model_dir):
    """The fake hub holding a model; returns its directory."""
    source = model_dir()
    server.files = {file.name: file.read_bytes() for file in source.iterdir()}
    server.files |= {"pytorch_model.bin": b"x" * 5000, "original/params.json": b"{}", "notes.py": b"print()",
                     "consolidated.safetensors": b"y" * 5000}  # fmt: skip
    return source
