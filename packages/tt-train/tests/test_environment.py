"""The commit of a work tree, compared with git; nothing that a repository names is run or read."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tt_train.run.environment import collect, git_state

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is the reference, and not here")


def git(folder, *words):
    names = [
        "-c",
        "user.name=a",
        "-c",
        "user.email=a@b",
        "-c",
        "init.defaultBranch=main",
        "-c",
        "protocol.file.allow=always",
    ]
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_NOSYSTEM": "1"}
    command = ["git", *names, "-C", str(folder), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.strip()


@pytest.fixture(autouse=True)
def nothing_above(tmp_path, monkeypatch):
    """The folder of temporary files may lie in a repository itself."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "project"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "file.txt").write_text("one\n")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    return folder


def state(folder, branch="main"):
    return {"commit": git(folder, "rev-parse", "HEAD"), "branch": branch}


def test_the_commit_is_that_of_git_from_any_folder_of_the_work_tree(repository):
    (repository / "a" / "b").mkdir(parents=True)
    assert git_state(repository) == git_state(repository / "a" / "b") == state(repository)


def test_a_packed_ref_a_named_branch_and_a_detached_head_are_read(repository):
    git(repository, "checkout", "-q", "-b", "feature/x.y")
    assert git_state(repository) == state(repository, "feature/x.y")
    git(repository, "pack-refs", "--all")
    assert not (repository / ".git/refs/heads/feature").exists()
    assert git_state(repository) == state(repository, "feature/x.y")
    git(repository, "commit", "-q", "--allow-empty", "-m", "second")  # loose again: it goes before the packed one
    assert git_state(repository) == state(repository, "feature/x.y")
    git(repository, "checkout", "-q", "--detach")
    assert git_state(repository) == state(repository, None)


def test_a_linked_work_tree_has_its_own_commit(repository, tmp_path):
    git(repository, "worktree", "add", "-q", "-b", "other", str(tmp_path / "linked"))
    git(tmp_path / "linked", "commit", "-q", "--allow-empty", "-m", "second")
    assert git_state(tmp_path / "linked") == state(tmp_path / "linked", "other")
    assert git_state(tmp_path / "linked") != git_state(repository)


def test_there_is_no_state_outside_a_repository_and_none_before_the_first_commit(tmp_path, monkeypatch):
    git(tmp_path, "init", "-q", "empty")
    assert git_state(tmp_path / "empty") is None
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "empty/.git"))
    (tmp_path / "plain").mkdir()
    assert git_state(tmp_path / "plain") is None


def test_the_search_stops_below_a_ceiling_as_git_does(repository, monkeypatch):
    (repository / "a").mkdir()
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(repository))
    assert git_state(repository / "a") is None
    assert git_state(repository) == state(repository)
    with pytest.raises(subprocess.CalledProcessError):
        git(repository / "a", "rev-parse", "HEAD")


def test_the_environment_does_not_choose_the_repository(repository, tmp_path, monkeypatch):
    expected = state(repository)
    git(tmp_path, "init", "-q", "other")
    git(tmp_path / "other", "commit", "-q", "--allow-empty", "-m", "elsewhere")
    for name in ("GIT_DIR", "GIT_COMMON_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "other/.git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path / "other"))
    assert git_state(repository) == expected


CONFIGS = {
    "fsmonitor": "[core]\n\tfsmonitor = {run}\n",
    "hooks": "[core]\n\thooksPath = hooks\n",
    "filter": '[filter "x"]\n\tclean = {run}\n\tsmudge = {run}\n\tprocess = {run}\n\trequired = true\n',
    "diff": '[diff "x"]\n\ttextconv = {run}\n\tcommand = {run}\n[diff]\n\texternal = {run}\n',
    "pager": "[core]\n\tpager = {run}\n\teditor = {run}\n\tsshCommand = {run}\n\taskPass = {run}\n\tgitProxy = {run}\n",
    "alias": "[alias]\n\tstatus = !{run}\n\trev-parse = !{run}\n[credential]\n\thelper = !{run}\n",
    "include": "[include]\n\tpath = ../more\n",
    "worktree": "[core]\n\tworktree = {elsewhere}\n\tfsmonitor = {run}\n",
    "lazy": '[extensions]\n\tpartialClone = o\n[remote "o"]\n\turl = ext::{run}\n[protocol]\n\tallow = always\n',
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_nothing_that_the_config_of_a_repository_names_is_run(repository, tmp_path, monkeypatch, kind):
    expected, mark, started = state(repository), tmp_path / "ran", []
    script = repository / "run.sh"
    script.write_text(f"#!/bin/sh\ntouch {mark}\n")
    script.chmod(0o755)
    text = CONFIGS[kind].format(run=script, elsewhere=tmp_path)
    with (repository / ".git/config").open("a") as config:
        config.write(text)
    (repository / "more").write_text(CONFIGS["fsmonitor"].format(run=script))
    (repository / ".gitattributes").write_text("* filter=x diff=x\n")
    (repository / "file.txt").write_text("two, so that git would look into it\n")
    for name in ("post-index-change", "post-checkout", "reference-transaction"):
        for folder in (repository / "hooks", repository / ".git/hooks"):
            folder.mkdir(exist_ok=True)
            shutil.copy(script, folder / name)
    (repository / "bin").mkdir()
    for name in ("git", "uname"):
        shutil.copy(script, repository / "bin" / name)
    monkeypatch.setenv("PATH", f"{repository / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(repository)
    for name in ("Popen", "run"):
        monkeypatch.setattr(subprocess, name, lambda *words, **_: started.append(words))
    assert git_state() == expected
    collect()
    assert started == []
    assert not mark.exists()


def test_a_repository_in_plain_files_is_none(repository, tmp_path):
    bare = tmp_path / "model"
    shutil.copytree(repository / ".git", bare)
    assert git_state(bare) is None


def _linked(repository, path):
    shutil.move(path, path.with_name("moved"))
    path.symlink_to(path.with_name("moved"))


def _replaced(text):
    return lambda repository, path: path.write_text(text)


ATTACKS = {
    ".git": [_linked],
    ".git/HEAD": [
        _linked, lambda _, path: (path.unlink(), os.mkfifo(path)), lambda _, path: (path.unlink(), path.mkdir()),
        _replaced(""), _replaced("ref: refs/heads/../../../secret"), _replaced("ref: ../secret"), _replaced("ref: "),
        _replaced("ref: /etc/passwd"), _replaced("ref: refs/heads/\0"), _replaced("ref: refs/heads/\u202e"),
        _replaced("ref: refs/heads/\x1b[31m"), _replaced("ref: refs/heads/.invalid"),
        lambda _, path: path.write_bytes(b"\xff\xfe"), lambda _, path: os.truncate(path, 1 << 40),
    ],
    ".git/refs": [_linked],
    ".git/refs/heads": [_linked],
    ".git/refs/heads/main": [_linked, _replaced("not a commit"), lambda _, path: (path.unlink(), path.mkdir())],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "index"), [(name, index) for name, all in ATTACKS.items() for index in range(len(all))]
)
def test_a_link_a_pipe_or_nonsense_in_a_repository_gives_no_state(repository, name, index):
    (repository / "secret").write_text("0" * 40)
    ATTACKS[name][index](repository, repository / name)
    assert git_state(repository) is None


def test_a_git_file_that_points_at_another_repository_gives_no_state(repository, tmp_path):
    git(repository, "worktree", "add", "-q", "-b", "other", str(tmp_path / "linked"))
    for target in (repository / ".git", repository / ".git/worktrees/linked", "../project/.git", "/dev", "\0"):
        evil = tmp_path / "evil"
        evil.mkdir()
        (evil / ".git").write_text(f"gitdir: {target}\n")
        assert git_state(evil) is None
        shutil.rmtree(evil)


def test_a_work_tree_of_another_user_gives_no_state(repository, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert git_state(repository) is None


def test_the_state_of_this_very_file_is_none_or_a_commit():
    found = git_state(Path(__file__).parent)
    assert found is None or len(found["commit"] or "") in (40, 64)


@pytest.mark.parametrize("address", [
    "https://someone:pass-word@mirror.example", "https://pass-word@mirror.example", "someone:pass-word@mirror.example",
    "https://someone:pass-@-word@mirror.example", "https://someone:pass-/word@mirror.example",
    "https://mirror.example?token=pass-word", "https://mirror.example/hub#pass-word",
])  # fmt: skip
def test_a_password_in_the_address_of_the_hub_is_not_among_the_facts(monkeypatch, address):
    monkeypatch.setenv("HF_ENDPOINT", address)
    shown = collect()["variables"]["HF_ENDPOINT"]
    assert "pass-" not in shown
    assert "someone" not in shown
    assert "[redacted]" in shown
    assert "mirror.example" in shown


def test_the_address_of_the_hub_is_shown_as_it_is(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example:8443/hub")
    assert collect()["variables"]["HF_ENDPOINT"] == "https://mirror.example:8443/hub"
