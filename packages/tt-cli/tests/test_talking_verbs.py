"""``tt chat``, ``tt generate``, ``tt merge`` and ``tt report`` on a run and on a model, with no config."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

import tt_train


@pytest.fixture
def beside_the_run(lora_run, monkeypatch) -> Path:
    """The working directory is where ``runs/`` lies."""
    monkeypatch.chdir(lora_run.parents[1])
    return Path("runs/one")


def pipe(monkeypatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))


def generate(tt, *words: str) -> dict:
    answer = tt("generate", *words, "--json", "--max-new-tokens", "12")
    assert answer.code == 0, answer.err
    return {name: value for name, value in answer.json.items() if name not in ("stats", "sampling")}


def test_generate_answers_on_stdout_alone(tt, lora_run):
    answer = tt("generate", str(lora_run), "-p", "Repeat the word red.", "--max-new-tokens", "5")
    assert answer.code == 0
    assert answer.out.endswith("\n")
    assert answer.err in ("", "(cut after 5 tokens)\n")


def test_the_prompt_may_be_the_word_behind_the_run(tt, lora_run):
    assert generate(tt, str(lora_run), "Repeat red.") == generate(tt, str(lora_run), "-p", "Repeat red.")


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_a_device_can_be_chosen_and_one_that_is_not_there_is_refused_before_weights_load(
    tt, lora_run, monkeypatch, verb
):
    chosen = []
    original = tt_train.load
    monkeypatch.setattr("tt_train.load", lambda *words, **how: chosen.append(how["device"]) or original(*words, **how))
    pipe(monkeypatch, "red")
    assert tt(verb, str(lora_run), "--device", "cpu", "--max-new-tokens", "1").code == 0
    assert chosen == [torch.device("cpu")]
    pipe(monkeypatch, "red")
    answer = tt(verb, str(lora_run), "--device", "gpu")
    assert answer.code == 2
    assert "did you mean 'cuda'?" in answer.err
    assert len(chosen) == 1


def test_a_prompt_alone_is_for_the_newest_run(tt, beside_the_run):
    answer = generate(tt, "Repeat the word red.")
    assert (answer["model"], answer["prompt"]) == (str(beside_the_run), "Repeat the word red.")


def never_ending(model, prompts, *, max_new_tokens, **_):
    """``tt_models.stream_rows`` of a model that says F forever."""
    return ((row, 70) for row, most in enumerate(max_new_tokens) for _ in range(most))


def test_an_answer_that_is_cut_says_so(tt, lora_run, monkeypatch):
    from tt_cli.talk import Speaker

    monkeypatch.setattr("tt_models.stream_rows", never_ending)
    answer = generate(tt, str(lora_run), "red")
    assert (answer["cut"], answer["finish"], answer["tokens"]) == (True, "length", 12)
    assert tt("generate", str(lora_run), "red", "--max-new-tokens", "3").err == "(cut after 3 tokens)\n"
    assert "tokens: the model's context is full)" in tt("generate", str(lora_run), "red").err
    monkeypatch.setattr(Speaker, "prompt_ids", lambda *_: [1] * 127)
    assert "(cut after 1 token: the model's context is full)" in tt("generate", str(lora_run), "red").err
    told = tt("generate", str(lora_run), "red", "--max-new-tokens", "4").err
    assert "(the prompt has 127 tokens: 1 of the 4 new tokens fit into the model's context of 128)" in told
    end = Speaker(str(lora_run)).tokenizer.eos_id
    monkeypatch.setattr("tt_models.stream_rows", lambda *_, **__: iter([(0, end)]))
    assert tt("generate", str(lora_run), "red").err == ""
    assert generate(tt, str(lora_run), "red")["finish"] == "end"


def test_two_prompts_are_one_too_many(tt, lora_run):
    answer = tt("generate", str(lora_run), "red", "-p", "blue")
    assert answer.code == 2
    assert "two prompts, 'red' and -p 'blue'; give only one of them" in answer.err


def test_without_a_prompt_the_ways_to_give_one_are_named(tt, lora_run, monkeypatch):
    pipe(monkeypatch)
    answer = tt("generate", str(lora_run))
    assert answer.code == 2
    assert f'no prompt: tt generate {lora_run} "TEXT", or -p TEXT, or pipe it in' in answer.err


@pytest.mark.parametrize("verb", ["chat", "generate", "merge", "export"])
def test_a_base_that_moved_can_be_given(tt, lora_run, model_dir, tmp_path, monkeypatch, verb):
    adapter, words = tmp_path / "adapter", {"generate": ["red"], "chat": []}.get(verb, [str(tmp_path / "out")])
    shutil.copytree(lora_run / "adapter", adapter)
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": "/gone/base"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    pipe(monkeypatch, "red")
    refused = tt(verb, str(adapter), *words)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "adapter_config.json: names the base model /gone/base" in refused.err
    assert "--base DIR" in refused.err
    pipe(monkeypatch, "red")
    answer = tt(verb, str(adapter), *words, "--base", str(model_dir))
    assert answer.code == 0, answer.err


def test_after_qlora_chat_generate_and_merge_say_which_base_they_use(
    tt, train_run, model_dir, rows_file, tmp_path, monkeypatch
):
    run = train_run(tmp_path / "run", model_dir, rows_file, "adapter.quantize_base=true")
    pipe(monkeypatch, "red")
    assert "base: 4 bits (NF4), as in training" in tt("chat", str(run), "--max-new-tokens", "2").err
    assert "(--base nf4)" in tt("generate", str(run), "red", "--base", "dense", "--max-new-tokens", "2").err
    assert "base: 4 bits (NF4)" in tt("merge", str(run), str(tmp_path / "out")).err


def test_generate_reads_the_prompt_from_a_pipe(tt, lora_run, monkeypatch):
    pipe(monkeypatch, "Repeat the word", "red.")
    assert generate(tt, str(lora_run))["prompt"] == "Repeat the word\nred."


def test_the_newest_run_answers_where_none_is_named(tt, beside_the_run):
    assert generate(tt, "-p", "red")["model"] == str(beside_the_run)


def test_greedy_is_the_default_and_repeats_itself(tt, lora_run):
    first, again = (generate(tt, str(lora_run), "-p", "red") for _ in range(2))
    assert first == again


def test_a_seed_repeats_itself_and_another_does_not(tt, lora_run):
    drawn = [generate(tt, str(lora_run), "-p", "red", "--temperature", "3", "--seed", seed)["text"] for seed in "112"]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("words", [("--top-k", "1"), ("--top-p", "1e-6")])
def test_the_narrowest_draw_is_greedy(tt, lora_run, words):
    greedy = generate(tt, str(lora_run), "-p", "red")
    assert generate(tt, str(lora_run), "-p", "red", "--temperature", "3", "--seed", "1", *words) == greedy


def test_max_new_tokens_bounds_the_answer(tt, lora_run):
    texts = [tt("generate", str(lora_run), "-p", "red", "--max-new-tokens", number).out for number in ("1", "12")]
    assert len(texts[0]) < len(texts[1])


@pytest.mark.parametrize("words", [("--raw",), ("--system", "Be brief."), ("--no-adapter",)])
def test_raw_system_and_no_adapter_change_the_answer(tt, lora_run, words):
    assert generate(tt, str(lora_run), "-p", "red", *words)["text"] != generate(tt, str(lora_run), "-p", "red")["text"]


def test_without_its_adapter_a_run_answers_like_its_base(tt, lora_run, model_dir):
    base = generate(tt, str(model_dir), "-p", "red")["text"]
    assert generate(tt, str(lora_run), "-p", "red", "--no-adapter")["text"] == base


def test_raw_and_system_exclude_each_other(tt, lora_run):
    answer = tt("generate", str(lora_run), "-p", "red", "--raw", "--system", "Be brief.")
    assert answer.code == 2
    assert "give only one of them" in answer.err


def test_a_prompt_that_does_not_fit_is_one_line(tt, lora_run):
    answer = tt("generate", str(lora_run), "-p", "red " * 200)
    assert answer.code == 2
    assert "can read 128 with the answer" in answer.err
    assert answer.err.count("\n") == 1


@pytest.mark.parametrize("verb", [("chat",), ("generate", "-p", "red"), ("merge", "-o", "out"), ("report",)])
def test_a_run_that_is_not_there_is_one_line(tt, beside_the_run, verb, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    answer = tt(*verb, "runs/oen")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("error: runs/oen")
    assert answer.err.count("\n") == 1


def test_without_any_run_the_cure_is_named(tt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = tt("generate", "-p", "red")
    assert answer.code == 2
    assert "tt run" in answer.err


def test_chat_answers_every_line_of_a_pipe_and_prints_nothing_else(tt, lora_run, monkeypatch):
    alone = tt("generate", str(lora_run), "-p", "red", "--max-new-tokens", "6").out
    pipe(monkeypatch, "red", "", "blue")
    answer = tt("chat", str(lora_run), "--max-new-tokens", "6")
    assert answer.code == 0, answer.err
    assert answer.out.startswith(alone)
    assert len(answer.out) > len(alone)


def test_chat_remembers_until_reset(tt, lora_run, monkeypatch):
    options = ("chat", str(lora_run), "--max-new-tokens", "6")
    pipe(monkeypatch, "red")
    once = tt(*options).out
    pipe(monkeypatch, "red", "/reset", "red")
    assert tt(*options).out == once * 2
    pipe(monkeypatch, "red", "red")
    assert tt(*options).out != once * 2


def test_chat_takes_a_system_message_by_option_and_by_command(tt, lora_run, monkeypatch):
    options = ("chat", str(lora_run), "--max-new-tokens", "6")
    pipe(monkeypatch, "red")
    with_option = tt(*options, "--system", "Be brief.").out
    pipe(monkeypatch, "/system Be brief.", "red", "/exit", "never asked")
    assert tt(*options).out == with_option
    pipe(monkeypatch, "/system", "red")
    assert tt(*options, "--system", "Be brief.").out != with_option


def test_reset_keeps_the_system_message(tt, lora_run, monkeypatch):
    options = ("chat", str(lora_run), "--max-new-tokens", "6", "--system", "Be brief.")
    pipe(monkeypatch, "red", "/reset", "red")
    first, second = tt(*options).out, ""
    pipe(monkeypatch, "red")
    second = tt(*options).out
    assert first == second * 2


def test_merge_writes_a_model_that_answers_like_the_run(tt, lora_run, tmp_path):
    out = tmp_path / "merged"
    answer = tt("merge", str(lora_run), "-o", str(out))
    assert (answer.code, answer.out) == (0, f"{out}\n")
    assert generate(tt, str(out), "-p", "red")["text"] == generate(tt, str(lora_run), "-p", "red")["text"]
    assert (out / "tokenizer.json").is_file()


def test_merge_refuses_a_folder_that_holds_something(tt, lora_run, tmp_path):
    (tmp_path / "mine.txt").write_text("")
    answer = tt("merge", str(lora_run), "-o", str(tmp_path), "--json")
    assert answer.code == 2
    assert not answer.json["ok"]
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_merge_writes_the_dtype_that_is_asked_for(tt, lora_run, tmp_path):
    def size(dtype: str) -> int:
        assert tt("merge", str(lora_run), "-o", str(tmp_path / dtype), "--dtype", dtype).code == 0
        return (tmp_path / dtype / "model.safetensors").stat().st_size

    assert size("bf16") < 0.6 * size("fp32")


def test_report_writes_a_page_and_a_picture_and_names_them(tt, lora_run, tmp_path):
    answer = tt("report", str(lora_run), "-o", str(tmp_path / "page.html"), "--json")
    assert answer.code == 0, answer.err
    assert Path(answer.json["html"]).read_text().startswith("<!")
    assert Path(answer.json["png"]).read_bytes().startswith(b"\x89PNG")


def test_report_is_about_the_newest_run_where_none_is_named(tt, beside_the_run):
    assert tt("report").out == "runs/one/report.html\nruns/one/report.png\n"


def test_the_run_is_listed(tt, beside_the_run):
    runs = tt("ls", "runs", "--json").json["runs"]
    assert [Path(run["path"]).name for run in runs] == ["one"]
    assert runs[0]["step"] == 3
    head, line = tt("ls", "runs").out.splitlines()
    assert head.replace(" TT EVAL", "").split() == [  # another test may have evaluated it
        "PATH", "RECIPE", "METHOD", "BASE", "STATE", "STEP", "HELD-OUT", "LOSS", "SIZE", "CHANGED"
    ]  # fmt: skip
    assert line.split()[0] == "runs/one"
    assert f"{runs[0]['loss']:.4f}" in line.split()


def test_before_step_1_the_sample_is_marked_and_counts_are_told(tt, model_dir, rows_file, tmp_path):
    words = [f"model.path={model_dir}", f"data.train={rows_file}", "model.dtype=fp32", "--dry-run"]
    answer = tt("run", "sft", *words, "-o", str(tmp_path / "run"))
    assert answer.code == 0, answer.err
    assert "\u27e6red" in answer.err
    assert "parameters" in answer.err
    assert "8 alpaca rows" in answer.err


def test_env_answers_in_both_forms(tt):
    facts = tt("env", "--json").json
    assert facts["packages"]["tt-cli"] in tt("env").out
    assert json.dumps(facts["python"])[1:-1] in tt("env").out


def rows_of(path: Path, **names: str) -> Path:
    """Rows with these columns: the prompt and the answer."""
    rows = [dict(zip(names.values(), pair, strict=True)) for pair in (("say red", "red"), ("say blue", "blue"))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nred\n\n### Response:\n"
)


def test_without_a_chat_template_a_run_on_alpaca_rows_is_asked_in_alpacas_words(
    tt, train_run, write_tiny_model, tmp_path
):
    model = write_tiny_model(tmp_path / "model", chat_template=None, max_position_embeddings=512)
    run = train_run(tmp_path / "run", model, rows_of(tmp_path / "rows.jsonl", a="instruction", b="output"))
    asked = generate(tt, str(run), "-p", "red")["text"]
    assert asked == generate(tt, str(run), "-p", ALPACA, "--raw")["text"]
    assert asked != generate(tt, str(run), "-p", "red", "--raw")["text"]
    refused = tt("generate", str(run), "-p", "red", "--system", "Be brief.")
    assert (refused.code, "no chat template" in refused.err) == (2, True)


def test_a_run_on_prompts_and_completions_is_asked_in_no_words_but_the_prompts(tt, train_run, model_dir, tmp_path):
    run = train_run(tmp_path / "run", model_dir, rows_of(tmp_path / "rows.jsonl", a="prompt", b="completion"))
    assert generate(tt, str(run), "-p", "red") == generate(tt, str(run), "-p", "red", "--raw")


def test_a_run_with_a_template_of_its_own_is_asked_in_it(tt, train_run, model_dir, rows_file, tmp_path):
    run = train_run(tmp_path / "run", model_dir, rows_file, "data.template=llama2")
    assert generate(tt, str(run), "-p", "red") == generate(tt, str(run), "-p", "[INST] red [/INST]", "--raw") | {
        "prompt": "red"
    }


def test_compare_answers_with_the_adapter_and_without_it(tt, lora_run, model_dir, monkeypatch):
    with_it, without = (generate(tt, str(path), "-p", "red")["text"] for path in (lora_run, model_dir))
    options = ("chat", str(lora_run), "-q", "--max-new-tokens", "12")
    expected = f"with the adapter:\n{with_it}\nwithout the adapter:\n{without}\n"
    pipe(monkeypatch, "/compare red")
    assert tt(*options).out == expected
    pipe(monkeypatch, "red", "/compare")
    assert tt(*options).out == f"{with_it}\n{expected}"
    pipe(monkeypatch, "/compare red", "red")
    compared = tt(*options).out
    pipe(monkeypatch, "red", "red")
    assert compared == expected + tt(*options).out.removeprefix(f"{with_it}\n")
    pipe(monkeypatch, "/compare red")
    refused = tt("chat", str(model_dir))
    assert (refused.code, "has no adapter here" in refused.err) == (2, True)


def test_retry_draws_another_answer_in_the_place_of_the_first(tt, lora_run, monkeypatch, tmp_path):
    options = ("chat", str(lora_run), "-q", "--max-new-tokens", "8", "--temperature", "2", "--seed", "1")
    pipe(monkeypatch, "red")
    first = tt(*options).out
    pipe(monkeypatch, "red", "/retry", f"/save {tmp_path / 'chat.jsonl'}")
    both = tt(*options).out
    assert both.startswith(first)
    assert (second := both.removeprefix(first)) != first
    messages = json.loads((tmp_path / "chat.jsonl").read_text())["messages"]
    assert messages == [{"role": "user", "content": "red"}, {"role": "assistant", "content": second[:-1]}]
    pipe(monkeypatch, "red", "/retry")
    refused = tt("chat", str(lora_run), "-q", "--max-new-tokens", "2")
    assert (refused.code, "at temperature 0 the answer would be the same" in refused.err) == (2, True)


def test_a_saved_chat_is_a_row_to_train_on(tt, lora_run, model_dir, train_run, tmp_path, monkeypatch):
    rows = tmp_path / "chat.jsonl"
    pipe(monkeypatch, "red", f"/save {rows}", "blue", f"/save {rows}")
    done = tt("chat", str(lora_run), "--system", "Be brief.", "--max-new-tokens", "2")
    assert (done.code, done.err.count(f"1 row appended to {rows}")) == (0, 2)
    saved = [json.loads(line)["messages"] for line in rows.read_text().splitlines()]
    assert [[turn["role"] for turn in turns] for turns in saved] == [
        ["system", "user", "assistant"], ["system", "user", "assistant", "user", "assistant"],
    ]  # fmt: skip
    shown = tt("data", "show", str(rows), "--tokenizer", str(model_dir), "--stats", "--json")
    assert (shown.code, shown.json["rows"]) == (0, 2)
    for words in (f"/save {rows}", "/save x.txt"):
        pipe(monkeypatch, words)
        assert tt("chat", str(lora_run)).code == 2


def test_a_conversation_that_outgrows_the_context_says_which_messages_it_no_longer_reads(tt, lora_run, monkeypatch):
    pipe(monkeypatch, *["red red red red red red"] * 6)
    done = tt("chat", str(lora_run), "-q", "--max-new-tokens", "4")
    assert done.code == 0, done.err
    told = [line for line in done.err.splitlines() if "no longer read" in line]
    assert "can read 128 with the answer: its first 2 messages are no longer read)" in told[0]
    assert len(done.out.splitlines()) >= 6
