"""Prompts for people: the turns of a rendered conversation, whatever template rendered it."""

import json
import re

import pytest
import torch

from tt_train.evaluate import answer, prompts, split_turns


class Tokenizer:
    """A token for each control string and each character; only some of the control strings are flagged."""

    def __init__(self, text, flagged):
        self.tokens = re.findall(flagged + r"|<\|[^|]*\|>|<\uff5c[^\uff5c]*\uff5c>|.", text, flags=re.DOTALL)
        self.hidden = {index for index, token in enumerate(self.tokens) if re.fullmatch(flagged, token)}

    def decode(self, ids, *, skip_special=True):
        return "".join(self.tokens[index] for index in ids if not (skip_special and index in self.hidden))


CONVERSATION = [("system", "Be short."), ("user", "Hi\n\nyou"), ("assistant", "user\nis a word"), ("user", "2 + 2?")]


def rendered(turn, prompt, begin=""):
    return begin + "".join(turn.format(role=role, content=content) for role, content in CONVERSATION) + prompt


TEMPLATES = {
    "chatml": (rendered("<|im_start|>{role}\n{content}<|im_end|>\n", "<|im_start|>assistant\n"), r"<\|im_\w+\|>"),
    "llama3": (
        rendered(
            "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>",
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "<|begin_of_text|>",
        ),
        r"<\|\w+\|>",
    ),
    "zephyr": (rendered("<|{role}|>\n{content}</s>\n", "<|assistant|>\n"), r"</s>"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_turns_of_a_rendered_conversation_are_found(name):
    text, flagged = TEMPLATES[name]
    tokenizer = Tokenizer(text, flagged)
    turns = split_turns(range(len(tokenizer.tokens)), tokenizer)
    assert [(turn["role"], turn["content"]) for turn in turns] == CONVERSATION


@pytest.mark.parametrize(
    ("text", "flagged", "roles"),
    [
        ("<s>[INST]Hi[/INST]Hello</s>[INST]2 + 2?[/INST]", r"</?s>|\[/?INST\]", ["user", "assistant", "user"]),
        ("<b>Be short.<\uff5cUser\uff5c>Hi<\uff5cAssistant\uff5c>", r"<b>", ["system", "user"]),
        ("<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n", r"<bos>|<\w+_turn>", ["user"]),
    ],
)
def test_other_templates_name_roles_in_their_own_ways(text, flagged, roles):
    tokenizer = Tokenizer(text, flagged)
    assert [turn["role"] for turn in split_turns(range(len(tokenizer.tokens)), tokenizer)] == roles


@pytest.mark.parametrize("text", ["plain text", "user\nplain text", "<s>a document</s>", ""])
def test_a_text_without_roles_has_no_turns(text):
    tokenizer = Tokenizer(text, r"</?s>")
    assert split_turns(range(len(tokenizer.tokens)), tokenizer) == []


def test_a_prompt_has_its_turns_beside_its_text(tokenizer_dir):
    import tt_data

    tokenizer = tt_data.load_tokenizer(tokenizer_dir)
    ids = tokenizer.encode_prompt([{"role": "user", "content": "say alpha"}])
    row = {"input_ids": [*ids, 5, 6], "labels": [-100] * len(ids) + [5, 6]}
    (found,) = prompts([row], tokenizer, num=3, max_prompt=128)
    assert found["turns"] == [{"role": "user", "content": "say alpha"}]
    assert "say alpha" in found["prompt"]


def test_an_answer_is_cut_where_the_model_can_read_no_further_and_the_run_goes_on(model_dir, tokenizer_dir):
    import tt_data
    import tt_train

    model, _ = tt_train.load(model_dir, device="cpu")
    longest = model.config.max_position_embeddings
    asked = [{"ids": [5] * length, "prompt": ""} for length in (longest - 3, longest)]
    rows = answer(
        model, tt_data.load_tokenizer(tokenizer_dir), asked, max_new_tokens=longest, device=torch.device("cpu")
    )
    assert len(rows) == 2


@pytest.mark.parametrize("stated", [-1, 99_999, [2, 99_999]])
def test_an_end_that_the_model_cannot_say_does_not_stop_the_answers(model_dir, tokenizer_dir, tmp_path, stated):
    import tt_data
    import tt_train

    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": stated}))
    model, _ = tt_train.load(model_dir, device="cpu")
    tokenizer = tt_data.load_tokenizer([tokenizer_dir, tmp_path])
    rows = answer(model, tokenizer, [{"ids": [5], "prompt": ""}], max_new_tokens=2, device=torch.device("cpu"))
    assert len(rows) == 1
