"""The documentation is correct: its marked examples run, its links and paths exist, its English follows the list."""

import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "RELEASING.md"]
PAGES += sorted(ROOT.glob("docs/*.md"))
BLOCK = re.compile(r"^<!-- test -->\n```(sh|python|yaml|jsonl)(?: title=(\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def blocks(page: Path) -> list[tuple[str, str | None, str]]:
    """Language, file name and text of every marked block, in the order of the page."""
    return [match.groups() for match in BLOCK.finditer(page.read_text(encoding="utf-8"))]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """What the examples of the pages need: a model directory `my-model` and a file `rows.jsonl`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    import tt_ckpt
    import tt_models

    monkeypatch.chdir(tmp_path)
    colours = ["red", "green", "blue", "white", "black", "amber"]
    rows = [
        {"messages": [{"role": "user", "content": f"Say {a} after {b}."}, {"role": "assistant", "content": f"{b} {a}"}]}
        for a in colours
        for b in colours
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "my-model"
    folder.mkdir()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([json.dumps(row) for row in rows], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | {"chat_template": TEMPLATE}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "pad_token_id": 0}))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "hidden_act": "silu", "tie_word_embeddings": True, "eos_token_id": 2, "bos_token_id": None,
    }  # fmt: skip
    model = tt_models.build(tt_models.config_from_hf(config))
    tt_ckpt.save_hf(model, folder, config=config, overwrite=True)
    return tmp_path


def run_shell(text: str, where: Path) -> None:
    """Run a block as a reader would. If it has only `tt` commands, it runs in this process, where torch is loaded."""
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    if all(re.match(r"tt [^|&;<>$`]+$", line.partition("  #")[0]) for line in lines):
        from tt_cli.main import main

        for line in lines:
            assert main(shlex.split(line, comments=True)[1:]) == 0, line
        return
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "NO_COLOR": "1"}
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", text], cwd=where, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{text}\n--- stdout\n{done.stdout[-2000:]}\n--- stderr\n{done.stderr[-4000:]}"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_the_marked_blocks_of_a_page_run(page, workplace):
    names: dict[str, object] = {"__name__": "docs"}
    for language, title, text in blocks(page):
        if language == "sh":
            run_shell(text, workplace)
        elif language == "python" and title is None:
            exec(compile(textwrap.dedent(text), f"{page.name}, marked block", "exec"), names)
        else:
            assert title, f"{page.name}: a marked {language} block needs a title, the name of the file that it is"
            (workplace / title).write_text(text)


def test_enough_is_marked():
    """At least 60 % of the shell and Python blocks run; the others need a GPU or the network."""
    texts = [page.read_text() for page in PAGES]
    every = sum(len(re.findall(r"^```(?:sh|python)\b", text, re.MULTILINE)) for text in texts)
    marked = sum(len(blocks(page)) for page in PAGES)
    assert marked >= every * 0.6


@pytest.mark.parametrize(
    "page", [*PAGES, *sorted(ROOT.glob("packages/*/README.md"))], ids=lambda page: str(page.relative_to(ROOT))
)
def test_links_between_pages_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page.name}: {target}"
        if anchor:
            heads = re.findall(r"^#+ (.+)$", found.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}, target


def test_the_two_commands_of_the_readme_are_the_ones_that_ci_runs():
    readme = (ROOT / "README.md").read_text()
    part = re.search(r"^## Quickstart\n(.*?)^## ", readme, re.MULTILINE | re.DOTALL).group(1)
    commands = [
        line for block in re.findall(r"```sh\n(.*?)```", part, re.DOTALL) for line in block.splitlines() if line
    ]
    assert [command.partition("#")[0].strip() for command in commands] == [
        "pip install nox && nox -s quickstart",
        "pip install nox && nox",
    ]
    assert "\n    pip install nox && nox\n" in (ROOT / ".ci" / "run").read_text()


def test_every_session_that_a_page_names_exists():
    noxfile = (ROOT / "noxfile.py").read_text()
    for page in PAGES:
        for name in re.findall(r"nox -s (\w+)", page.read_text()):
            assert re.search(rf"def {name}\(session", noxfile), f"{page.name} names the session {name}"


def test_the_lengths_of_the_recipe_that_pages_give_are_right():
    lines = len((ROOT / "packages/tt-train/src/tt_train/recipes/sft.py").read_text().splitlines())
    given = [
        (page.name, int(number))
        for page in [*PAGES, *ROOT.glob("packages/*/README.md")]
        for number in re.findall(r"about (\d+) lines", page.read_text(encoding="utf-8"))
    ]
    assert given
    assert [(name, number) for name, number in given if abs(number - lines) > 10] == []


def test_every_source_file_that_contributing_names_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:tt_\w+|tests|benchmarks|docs|packages)/[\w./-]*)`", text)
    assert len(named) > 20
    assert [name for name in named if not [*ROOT.glob(name), *ROOT.glob(f"packages/*/src/{name}")]] == []


TRANSLATED = [  # what a native speaker would not write: the list of the house style, as far as a pattern finds it
    r"(?<!there )\b(is|are) no (?!longer)", r"\bgo(es)? on\b", r"\bfor ever\b", r"\ban other\b", r"\bso many\b",
    r"\bwhat is trained\b", r"\b(is|are) told\b", r"\bwhere there is\b", r"\bof one's own\b", r"\band their like\b",
    r"\b(lies|lie|stands) (in|beside|under|behind)\b", r"\bwherever\b", r"\bmend\b", r"\bheld by a test\b",
    r"\bas if nothing\b", r"\bfor itself\b",
]  # fmt: skip


@pytest.mark.parametrize(
    "page",
    [*PAGES, *sorted(ROOT.glob("packages/*/*.md")), *sorted(ROOT.glob("benchmarks/*.md"))],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_pages_use_none_of_the_turns_of_phrase_that_read_as_translated(page):
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    found = [match.group() for pattern in TRANSLATED for match in re.finditer(pattern, text, re.IGNORECASE)]
    assert found == []
