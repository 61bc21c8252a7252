"""Commands as torchtune and other tools spell them are answered with ours."""

import pytest

from tt_ckpt.hub import download as hub
from tt_cli.main import cli
from tt_cli.names import ELSEWHERE

TOKEN = "hf_" + "a1B2" * 8


@pytest.fixture
def asked(monkeypatch):
    """What ``tt download`` asks of the hub."""
    given: dict = {}

    def download(repo_id: str, **options: object) -> hub.Download:
        given.update(options, repo_id=repo_id)
        return hub.Download(repo_id=repo_id, revision="0", path=str(options["output_dir"]), files=["model.safetensors"],
                            num_bytes=1, num_verified=1, seconds=0.1)  # fmt: skip

    monkeypatch.setattr(hub, "download", download)
    return given


def test_the_download_command_of_torchtune_works(tt, asked):
    answer = tt("download", "org/it", "--output-dir", "D", "--ignore-patterns", "*.safetensors",
                "--ignore-patterns", "original/*")  # fmt: skip
    assert (answer.code, answer.out) == (0, "D\n")
    assert (asked["repo_id"], str(asked["output_dir"]), asked["ignore"]) == ("org/it", "D", ("original/*",))
    assert asked["allow"] == hub.WANTED
    assert "--ignore-patterns *.safetensors: not followed, since tt reads safetensors" in answer.err


def test_our_own_ignore_is_followed_to_the_letter(tt, asked):
    assert tt("download", "org/it", "--ignore", "*.safetensors").code == 0
    assert asked["ignore"] == ("*.safetensors",)


@pytest.mark.parametrize("words", [
    ["download", "org/it", "--hf-token", TOKEN],
    ["download", "org/it", f"--hf-token={TOKEN}"],
    ["upload", "runs/one", "org/it", "--token", TOKEN],
    ["run", "sft", "--hf_token", TOKEN],
])  # fmt: skip
def test_a_token_on_the_command_line_is_refused_with_the_reason_and_never_shown(tt, words):
    answer = tt(*words)
    assert (answer.code, answer.out, answer.err.count("\n")) == (2, "", 1)
    assert "can be seen by every user of the machine (ps)" in answer.err
    assert "set HF_TOKEN, or run `hf auth login` once" in answer.err
    assert TOKEN not in answer.err


def test_a_dry_run_of_a_download_asks_for_no_file(tt, asked):
    answer = tt("download", "org/it", "--dry-run", "--json")
    assert asked["dry_run"] is True
    assert answer.json["dry_run"] is True


@pytest.mark.parametrize(("typed", "said"), [
    ("train", "did you mean 'run'?"),
    ("finetune_lora", "did you mean 'run'?"),
    ("Finetune", "did you mean 'run'?"),
    ("sft", "did you mean tt run sft?"),
    ("orpo", "did you mean tt run dpo loss.name=orpo?"),
    ("serve", "tt does not serve models; tt export RUN -o DIR prints the commands"),
    ("vllm-serve", "tt does not serve models"),
    ("pretrain", "starts from random weights: tt run sft model.name=NAME"),
    ("webui", "tt has no web page to work in"),
    ("login", "tt reads the token from HF_TOKEN"),
    ("grpo", "tt run dpo learns from preferences"),
    ("merge-lora", "did you mean 'merge'?"),
    ("convert_hf_checkpoint", "did you mean 'convert'?"),
    ("preprocess", "did you mean tt data show?"),
    ("resume", "did you mean tt run --resume auto?"),
    ("rm", "did you mean 'rm-checkpoints'?"),
    ("follow", "did you mean 'watch'?"),
    ("tarin", "did you mean 'run'?"),
    ("srve", "tt does not serve models"),
    ("stf", "did you mean tt run sft?"),
    ("xyzzy", "tt has no verb 'xyzzy' (see tt --help)"),
])  # fmt: skip
def test_the_verb_of_another_tool_is_answered_with_ours(tt, typed, said):
    answer = tt(typed, "x")
    assert (answer.code, answer.out, answer.err.count("\n")) == (2, "", 1)
    assert said in answer.err


def test_every_word_of_another_tool_leads_to_a_verb_or_a_reason():
    from tt_cli.names import runnable_names

    later = {"eval", "quantize"}  # verbs that may not be here yet
    for word, ours in ELSEWHERE.items():
        verb, _, more = ours.partition(" ")
        assert verb in cli.table or verb in later or len(more.split()) > 3, word
        assert word not in cli.table, f"{word} is a verb of ours"
        assert word not in runnable_names(), f"{word} is a recipe of ours"


def test_torchrun_options_come_before_the_recipe_as_torchtune_has_them(tt):
    answer = tt(
        "run", "--nproc_per_node", "2", "lora_finetune_distributed", "--config", "llama2/7B_lora", "model.path=absent"
    )
    assert answer.code == 2
    assert "absent" in answer.err
    assert "no option" not in answer.err
