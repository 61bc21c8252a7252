"""What a hub, a listing, a name or a folder may hold that a download must not follow."""

import gzip
import json
import re
import time

import pytest

import tt_ckpt
from tt_ckpt.hub import download as hub
from tt_ckpt.hub import endpoint
from tt_ckpt.hub.names import check_repo_id, check_revision

pytest.importorskip("huggingface_hub")
REPO = "someone/some-model"
OURS = (ValueError, OSError)


def everything(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def one_line(error):
    text = str(error)
    return text.isprintable() and 0 < len(text) < 2000


def outcome(**options):
    """None for a download that works or fails with an error of ours, in one line."""
    try:
        tt_ckpt.download(REPO, **options)
    except OURS as error:
        return None if one_line(error) else error
    return None


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(hub, "FIRST_CONTACT_S", 0.2)


# ---- names that are typed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "a/../b",
        "a/b/c",
        "-o",
        "--help",
        "a\nb",
        "a\0b",
        "a b",
        "",
        "/",
        "/etc",
        "org/",
        "/name",
        "org//name",
        "a/..",
        "a\x1b[31m/b",
        "a/b.git",
        "a--b/c",
        "..",
        ".",
        "a/\u202eb",
        "a:b",
        "C:\\x",
        "x" * 200,
        "org/" + "y" * 100,
        "a/b?x=1",
        "a%2f..%2fb",
        "models--a--b",
        "~/x",
        "a/b#c",
    ],
)
def test_what_is_no_repository_id_is_refused_before_a_request(server, name):
    with pytest.raises(ValueError, match="neither a directory here nor a repository id") as caught:
        tt_ckpt.download(name)
    assert one_line(caught.value)
    with pytest.raises(ValueError, match="repository id"):
        hub.snapshot(name)
    assert server.log == []


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("https://huggingface.co/org/name", "did you mean org/name?"),
        ("https://huggingface.co/org/name/tree/main", "did you mean org/name?"),
        ("org/name@v2", "did you mean org/name --revision v2?"),
        ("org/name:refs/pr/1", "did you mean org/name --revision refs/pr/1?"),
        ("nonsense!", "give one such as Qwen/Qwen3-0.6B"),
    ],
)
def test_what_was_meant_is_said(name, cure):
    with pytest.raises(ValueError, match=f"{re.escape(cure)}$"):
        check_repo_id(name)


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen3-0.6B", "a/b_c.d-e", "org/2x"])
def test_repository_ids_are_accepted(name):
    check_repo_id(name)


@pytest.mark.parametrize(
    "revision",
    ["../../x", "a/../../b", "/etc/x", "-x", "", "a b", "a\nb", "a\0", "a//b", "a/./b", "x" * 300, "\x1b[1m"],
)
def test_a_revision_that_would_be_a_path_elsewhere_is_refused(server, revision, tmp_path):
    for action in (tt_ckpt.download, hub.snapshot):
        with pytest.raises(ValueError, match="revision: .* is not a branch, tag or commit") as caught:
            action(REPO, revision=revision)
        assert one_line(caught.value)
    assert server.log == []


@pytest.mark.parametrize("revision", ["main", "v1.0", "refs/pr/12", "c" * 40, "feature/x+y"])
def test_revisions_are_accepted(revision):
    check_revision(revision)


# ---- names that a listing gives --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../../evil.json",
        "/tmp/evil.json",
        "a/../../evil.json",
        "a\\..\\evil.json",
        "C:evil.json",
        "a\0.json",
        "a\n.json",
        "\x1b]0;x\x07.json",
        "\u202enosj.evil",
        "x" * 300 + ".json",
        "/".join(["d"] * 600) + ".json",
        ".git/hooks/x.json",
        ".GIT/config.json",
        "sub/.git/x.json",
        ".cache/huggingface/download/config.json.metadata.json",
        "a//b.json",
        "./a.json",
        "",
        "..",
        "a/",
    ],
)
@pytest.mark.parametrize("where", ["cache", "directory"])
def test_a_hostile_name_writes_nothing_and_is_named(server, repository, tmp_path, name, where):
    server.files[name] = b"{}"
    outside = everything(tmp_path)
    with pytest.raises(ValueError, match="refused the file name") as caught:
        tt_ckpt.download(REPO, output_dir=tmp_path / "here" if where == "directory" else None)
    assert one_line(caught.value)
    assert everything(tmp_path) == outside


@pytest.mark.parametrize(
    ("names", "said"),
    [(["Config.json"], "one file on a disk that ignores case"), (["config.json/x.json"], "is a file and a folder")],
)
def test_names_that_are_one_place_are_refused(server, repository, tmp_path, names, said):
    server.files |= dict.fromkeys(names, b"{}")
    with pytest.raises(ValueError, match=said):
        tt_ckpt.download(REPO, output_dir=tmp_path / "here")
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize("size", [-1, 1 << 60, "12", [], None, 1e300, True])
def test_a_size_that_cannot_be_is_an_error_of_ours(server, repository, tmp_path, size):
    describe = server.describe
    server.describe = lambda name: describe(name) | ({"size": size} if name == "config.json" else {})
    assert outcome(output_dir=tmp_path / "here", retry_s=1) is None


def api_answer(body, status=200, headers=None):
    def answer(handler, path):
        if "/api/" not in path:
            return False
        handler.reply(status, body, headers)
        return True

    return answer


@pytest.mark.parametrize(
    "body",
    [
        b"<!DOCTYPE html><title>Log in</title>",
        b"",
        b"{",
        b"[]",
        b"null",
        b"1",
        b'{"id": 1}',
        b'{"sha": null}',
        json.dumps({"id": REPO, "sha": "../../../../evil", "siblings": []}).encode(),
        json.dumps({"id": REPO, "sha": "c" * 40, "siblings": [{"rfilename": 5}]}).encode(),
        json.dumps({"id": REPO, "sha": "c" * 40, "siblings": {"a": 1}}).encode(),
        b'{"siblings": ' + b"[" * 100_000,
        b'{"sha": ' + b"9" * 10_000 + b"}",
        b"\xff\xfe\x00",
        b'{"sha": "\x1b]0;x\x07"}',
    ],
    ids=range(15),
)
def test_an_answer_that_is_no_listing_is_an_error_of_ours(server, repository, tmp_path, body):
    server.answer = api_answer(body)
    before = everything(tmp_path)
    with pytest.raises(OURS) as caught:
        tt_ckpt.download(REPO, retry_s=1)
    assert one_line(caught.value)
    assert everything(tmp_path) == before


def test_a_login_page_in_the_place_of_the_api_is_named(server):
    server.answer = api_answer(b"<!DOCTYPE html><title>Log in</title>")
    with pytest.raises(OSError, match="something that is not JSON; is HF_ENDPOINT a hub, and is there a login page"):
        tt_ckpt.download(REPO)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 409, 410, 418, 429, 451, 500, 502, 503, 599])
@pytest.mark.parametrize("what", ["/api/", "/resolve/"])
def test_every_status_is_answered_in_one_line(server, repository, monkeypatch, status, what):
    monkeypatch.setattr("time.sleep", lambda _: None)  # of the library, between its own attempts

    def answer(handler, path):
        if what not in path:
            return False
        handler.reply(status, b'{"error": "a\\nb \\u001b[31m"}')
        return True

    server.answer = answer
    with pytest.raises(OURS) as caught:
        tt_ckpt.download(REPO, retry_s=0.5)
    assert one_line(caught.value)


# ---- bodies ----------------------------------------------------------------------------------------------------------


def endless(handler, path):
    """An answer without an end; it stops when the reader leaves."""
    handler.send_response(200)
    handler.send_header("ETag", f'"{"e" * 40}"')
    handler.send_header("X-Repo-Commit", "c" * 40)
    handler.send_header("Connection", "close")
    handler.end_headers()
    handler.close_connection = True
    if handler.command != "HEAD":
        try:
            while True:
                handler.wfile.write(b" " * (1 << 20))
        except OSError:
            pass
    return True


def test_a_listing_without_an_end_is_given_up(server, monkeypatch):
    monkeypatch.setattr(endpoint, "_ANSWER_BYTES", 3_000_000)
    server.answer = endless
    with pytest.raises(OSError, match="sent more than 3000000 bytes, which cannot be right; stopped"):
        tt_ckpt.download(REPO)


def test_a_file_without_an_end_is_given_up_and_not_kept(server, repository, tmp_path):
    server.answer = lambda handler, path: (
        "/resolve/" in path and path.endswith("config.json") and endless(handler, path)
    )
    with pytest.raises(OSError, match="sent more than .* bytes, which cannot be right; stopped"):
        tt_ckpt.download(REPO, output_dir=tmp_path / "here", retry_s=1)
    assert not (tmp_path / "here" / "config.json").exists()
    assert not list((tmp_path / "here").rglob("*.incomplete"))


def test_an_answer_that_is_small_only_while_compressed_is_given_up(server, monkeypatch):
    monkeypatch.setattr(endpoint, "_PACKED_BYTES", 10_000)
    bomb = gzip.compress(b" " * 50_000_000)
    assert len(bomb) > 10_000
    server.answer = api_answer(bomb, headers={"Content-Encoding": "gzip"})
    with pytest.raises(OSError, match="sent more than 10000 bytes"):
        tt_ckpt.download(REPO)


def test_no_compression_is_asked_for(server, repository):
    tt_ckpt.download(REPO)
    asked = {
        value for _, _, headers in server.log for name, value in headers.items() if name.lower() == "accept-encoding"
    }
    assert asked == {"identity"}


def test_a_hub_that_is_silent_is_given_up(server, monkeypatch):
    monkeypatch.setattr(endpoint, "_SILENCE_S", 0.3)

    def answer(handler, path):
        time.sleep(3)
        return False

    server.answer = answer
    with pytest.raises(ConnectionError, match=REPO) as caught:
        tt_ckpt.download(REPO, retry_s=0.5)
    assert one_line(caught.value)


def test_an_answer_that_drips_is_given_up(server, monkeypatch):
    monkeypatch.setattr(endpoint, "_ANSWER_S", 0.5)

    def answer(handler, path):
        handler.send_response(200)
        handler.end_headers()
        handler.close_connection = True
        try:
            for _ in range(100):
                handler.wfile.write(b" ")
                handler.wfile.flush()
                time.sleep(0.1)
        except OSError:
            pass
        return True

    server.answer = answer
    with pytest.raises(OSError, match=r"its response had not ended after .* stopped"):
        tt_ckpt.download(REPO, retry_s=0.5)


@pytest.mark.parametrize("header", ["ETag", "X-Linked-ETag", "X-Repo-Commit"])
@pytest.mark.parametrize(
    "value", ['"../../../../evil"', '"/etc/evil"', '"..\\evil"', '".."', '"' + "x" * 300 + '"', '""', "a b"]
)
def test_a_header_that_would_become_a_path_is_refused(server, repository, tmp_path, header, value):
    def answer(handler, path):
        if "/resolve/" not in path:
            return False
        headers = {"ETag": f'"{"e" * 40}"', "X-Repo-Commit": server.commit, header: value}
        handler.reply(200, b"{}", headers)
        return True

    server.answer = answer
    with pytest.raises(OSError, match=f"refused its answer: {header.lower()} .* is not a plain word"):
        tt_ckpt.download(REPO, retry_s=1)
    assert not [path for path in tmp_path.rglob("*") if "evil" in path.name]


@pytest.mark.parametrize(
    "content",
    [b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 9\n", b"<!DOCTYPE html><html>"],
)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_pointer_or_page_that_the_repository_itself_has_is_recognised(server, repository, tmp_path, content, name):
    server.files[name] = content
    with pytest.raises(ValueError, match=rf"{name}: a (git-lfs pointer|web page)"):
        tt_ckpt.download(REPO, output_dir=tmp_path / "here")


# ---- folders ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def victim(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "keep.txt").write_text("KEEP")
    return home


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        ".cache",
        ".cache/huggingface",
        ".cache/huggingface/download",
        ".cache/huggingface/download/config.json.metadata",
        ".cache/huggingface/download/config.json.lock",
    ],
)
@pytest.mark.parametrize("to", ["file", "folder", "nothing"])
def test_a_link_in_the_target_is_not_followed(server, repository, tmp_path, victim, name, to):
    link = tmp_path / "here" / name
    link.parent.mkdir(parents=True)
    link.symlink_to({"file": victim / "keep.txt", "folder": victim, "nothing": victim / "new.txt"}[to])
    with pytest.raises(OURS, match="a link; what is fetched stays in") as caught:
        tt_ckpt.download(REPO, output_dir=tmp_path / "here")
    assert one_line(caught.value)
    assert everything(victim) == {"keep.txt"}
    assert (victim / "keep.txt").read_text() == "KEEP"


def test_a_folder_of_the_repository_that_is_a_link_in_the_target_is_not_followed(server, repository, tmp_path, victim):
    server.files["sub/more.json"] = b"{}"
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "sub").symlink_to(victim)
    with pytest.raises(ValueError, match="sub: a link; what is fetched stays in"):
        tt_ckpt.download(REPO, output_dir=tmp_path / "here")
    assert everything(victim) == {"keep.txt"}


def test_a_record_that_claims_a_link_was_fetched_changes_nothing(server, repository, tmp_path, victim):
    folder = tmp_path / "here"
    record = folder / ".cache/huggingface/download/config.json.metadata"
    record.parent.mkdir(parents=True)
    record.write_text(f"{server.commit}\n{'e' * 40}\n9999999999\n")
    (folder / "config.json").symlink_to(victim / "keep.txt")
    with pytest.raises(ValueError, match="config.json: a link"):
        tt_ckpt.download(REPO, output_dir=folder)
    assert (victim / "keep.txt").read_text() == "KEEP"


@pytest.mark.parametrize("damaged", [True, False])
def test_what_a_link_of_the_cache_points_to_outside_is_never_removed(server, repository, tmp_path, victim, damaged):
    path = tt_ckpt.resolve(tt_ckpt.download(REPO).path)
    for target in (victim, victim / "keep.txt"):
        link = path / "config.json"
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        server.flip = {"config.json": 10**6 if damaged else 0}
        assert outcome(retry_s=1) is None
        assert (victim / "keep.txt").read_text() == "KEEP"


def test_a_target_that_is_no_place_for_files_is_refused_before_a_request(server, repository, tmp_path):
    from pathlib import Path

    from huggingface_hub import constants

    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "none")
    places = {
        tmp_path / "file": "a file; choose another directory",
        tmp_path / "dangling": "a link to nothing",
        Path(constants.HF_HUB_CACHE): "in the hub's cache",
        Path(constants.HF_HUB_CACHE) / "models--a--b" / "x": "in the hub's cache",
    }
    for place, said in places.items():
        with pytest.raises(OURS, match=said):
            tt_ckpt.download(REPO, output_dir=place)
    assert server.log == []


def test_a_target_that_is_a_link_to_a_folder_is_the_users_choice(server, repository, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "here").symlink_to(tmp_path / "disk")
    tt_ckpt.download(REPO, output_dir=tmp_path / "here")
    assert (tmp_path / "disk" / "config.json").is_file()
