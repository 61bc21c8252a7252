"""``tt cp``: DEST is what the user typed."""

import os

import pytest

from tt_train.settings import registry


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def source():
    return registry.recipe_path("sft").read_bytes()


def test_a_recipe_goes_to_the_file_that_is_named_and_the_file_is_printed(tt, tmp_path, source):
    answer = tt("cp", "sft", "mine.py")
    assert (answer.code, answer.out, answer.err) == (0, "mine.py\n", "")
    assert (tmp_path / "mine.py").read_bytes() == source


def test_a_folder_receives_the_file_under_its_own_name(tt, tmp_path, source):
    (tmp_path / "d").mkdir()
    assert tt("cp", "sft", "d").out == "d/sft.py\n"
    assert (tmp_path / "d" / "sft.py").read_bytes() == source


def test_a_suffix_of_ones_own_is_kept_and_a_missing_one_is_added(tt, tmp_path):
    assert tt("cp", "sft", "my.custom").out == "my.custom\n"
    assert tt("cp", "sft", "plain").out == "plain.py\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my.custom", "plain.py"]


def test_a_config_is_copied_with_its_suffix(tt, tmp_path):
    name = registry.config_names()[0]
    assert tt("cp", name, "mine").out == "mine.yaml\n"
    assert (tmp_path / "mine.yaml").read_bytes() == registry.named_config(name).encode()


def test_a_torchtune_name_is_copied_as_ours(tt, tmp_path, source):
    assert tt("cp", "lora_finetune_single_device", "mine.py").code == 0
    assert (tmp_path / "mine.py").read_bytes() == source


def test_no_clobber_leaves_what_exists_and_says_so(tt, tmp_path):
    (tmp_path / "mine.py").write_text("edited")
    answer = tt("cp", "sft", "mine.py", "-n")
    assert (answer.code, answer.out) == (0, "")
    assert "mine.py exists" in answer.err
    assert (tmp_path / "mine.py").read_text() == "edited"


@pytest.mark.parametrize("typed", ["mine.py", "mine", "."])
def test_a_file_that_exists_is_replaced_only_when_asked(tt, tmp_path, source, typed):
    file = tmp_path / ("sft.py" if typed == "." else "mine.py")
    file.write_text("a day of work")
    answer = tt("cp", "sft", typed)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err == (f"error: {file.name} exists; name another file, or replace it: tt cp -f sft {typed}\n")
    assert file.read_text() == "a day of work"
    assert tt("cp", "-f", "sft", typed).code == 0
    assert file.read_bytes() == source
    assert "give only one of them" in tt("cp", "-f", "-n", "sft", typed).err


def test_no_clobber_also_sees_a_dangling_link(tt, tmp_path):
    (tmp_path / "mine.py").symlink_to("elsewhere.py")
    tt("cp", "sft", "mine.py", "-n")
    assert tt("cp", "sft", "mine.py").code == 2
    assert not (tmp_path / "elsewhere.py").exists()


def test_missing_folders_are_made_only_when_asked(tt, tmp_path):
    answer = tt("cp", "sft", "a/b/mine.py")
    assert answer.code == 2
    assert answer.err == "error: no folder a/b to copy sft to; --make-parents creates it\n"
    assert tt("cp", "sft", "a/b/mine.py", "--make-parents").code == 0
    assert tt("cp", "sft", "c/d/", "--make-parents").out == "c/d/sft.py\n"
    assert (tmp_path / "c" / "d" / "sft.py").is_file()


def test_a_file_in_the_way_of_a_folder_is_named(tt, tmp_path):
    (tmp_path / "a").write_text("")
    answer = tt("cp", "sft", "a/mine.py", "--make-parents")
    assert answer.code == 2
    assert answer.err.startswith("error: a")
    assert answer.err.count("\n") == 1


def test_the_copy_has_the_mode_of_a_new_file(tt, tmp_path):
    old = os.umask(0o027)
    try:
        tt("cp", "sft", "mine.py")
    finally:
        os.umask(old)
    assert (tmp_path / "mine.py").stat().st_mode & 0o777 == 0o640


def test_an_unknown_name_is_answered_with_the_nearest(tt, tmp_path):
    answer = tt("cp", "lora_finetune_singel_device", "x.py")
    assert answer.code == 2
    assert "did you mean 'lora_finetune_single_device'?" in answer.err
    assert not list(tmp_path.iterdir())


def test_a_missing_destination_is_wrong_use(tt):
    answer = tt("cp", "sft")
    assert (answer.code, answer.err) == (2, "error: missing argument 'DESTINATION' (see tt cp --help)\n")
