"""vLLM answers with our adapters, merged and quantized directories as tt does: `nox -s vllm`.

Each model is in a process of its own, since vLLM keeps its memory to the end.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

import tt_models
import tt_train

pytest.importorskip("vllm")
QUESTIONS = ["What is the capital of France?", "Name three colours.", "What is 2 + 2?", "Write a line about the sea."]
LIMIT = 24
SERVE = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

if __name__ == "__main__":
    asked = json.load(sys.stdin)
    adapter = asked["adapter"] and LoRARequest("adapter", 1, asked["adapter"])
    lora = {"enable_lora": True, "max_lora_rank": asked["rank"]} if adapter else {}
    llm = LLM(asked["model"], max_model_len=512, enforce_eager=True, max_num_seqs=4, **lora, **asked["options"])
    greedy = SamplingParams(temperature=0, max_tokens=asked["limit"], prompt_logprobs=0)
    chats = [[{"role": "user", "content": question}] for question in asked["questions"]]
    answers = llm.chat(chats, greedy, lora_request=adapter or None)
    rows = [[list(a.prompt_token_ids), list(a.outputs[0].token_ids), a.outputs[0].finish_reason] for a in answers]
    pairs = [zip(a.prompt_logprobs[1:], a.prompt_token_ids[1:]) for a in answers]
    print("ANSWERS" + json.dumps([rows, [[found[index].logprob for found, index in pair] for pair in pairs]]))
"""
CALM = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
}  # fmt: skip


def theirs(model, questions, *, adapter=None, rank=16, **options):
    """Of vLLM: prompt ids, answer ids and why the answer ended of each; and the log-probabilities of the prompts."""
    asked = {"model": str(model), "adapter": str(adapter) if adapter else "", "rank": rank, "limit": LIMIT}
    done = subprocess.run(
        [sys.executable, "-c", SERVE],
        input=json.dumps({**asked, "questions": questions, "options": options}),
        capture_output=True,
        text=True,
        env=os.environ | CALM,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [line] = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS")]
    rows, log_probs = json.loads(line.removeprefix("ANSWERS"))
    return [tuple(row) for row in rows], torch.tensor([value for row in log_probs for value in row])


def ours(path, questions, dtype):
    """The rows of tt."""
    model, tokenizer = tt_train.load(path, dtype=dtype)
    rows = []
    for question in questions:
        prompt = [int(index) for index in tokenizer.encode_prompt([{"role": "user", "content": question}])]
        found = tt_models.generate(model, [prompt], max_new_tokens=LIMIT, temperature=0, eos_ids=tokenizer.eos_ids)[0]
        answer = [int(index) for index in found[len(prompt) :]]
        rows.append((prompt, answer, "stop" if answer[-1] in tokenizer.eos_ids else "length"))
    return rows


def test_the_published_model_answers_alike(model, figure):
    found, _ = theirs(model, QUESTIONS, dtype="float32")
    assert found == ours(model, QUESTIONS, torch.float32)
    figure(f"vLLM, the published model in fp32: {len(found)} of {len(found)} greedy answers, prompts and stops equal")


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_a_tuned_model_answers_alike(kind, tt, model, tuned, held_out, folder, figure):
    questions = QUESTIONS + [question for question, _ in held_out[0][:8]]
    if kind == "adapter":
        found, _ = theirs(model, questions, adapter=tuned / "adapter", dtype="float32")
        expected = ours(tuned, questions, torch.float32)
    else:
        tt("merge", tuned, "-o", folder / "merged32", "--dtype", "fp32")
        found, _ = theirs(folder / "merged32", questions, dtype="float32")
        expected = ours(folder / "merged32", questions, torch.float32)
    assert found == expected
    figure(f"vLLM, {kind} in fp32: {len(found)} of {len(found)} greedy answers, prompts and stops equal")


def prompt_log_probs(path, prompts, dtype):
    model, _ = tt_train.load(path, dtype=dtype)
    found = []
    for prompt in prompts:
        with torch.no_grad():
            logits = model.eval()(torch.tensor([prompt]))[0, :-1]
        found.append(torch.log_softmax(logits.float(), -1).gather(1, torch.tensor(prompt[1:])[:, None])[:, 0])
    return torch.cat(found)


@pytest.mark.parametrize("to", ["int8", "int8-dynamic"])
def test_a_quantized_directory_is_read_as_we_read_it(to, tt, model, folder, figure):
    """vLLM computes it in bf16 only. What the formats round away is the same size in both, but not the same numbers."""
    tt("quantize", model, "-o", folder / to, "--to", to)
    rows, found = theirs(folder / to, QUESTIONS, load_format="safetensors", safetensors_load_strategy="torchao")
    prompts = [row[0] for row in rows]
    assert prompts == [row[0] for row in ours(model, QUESTIONS, torch.float32)]
    exact = prompt_log_probs(model, prompts, torch.float32)
    lost = (prompt_log_probs(folder / to, prompts, None) - exact).abs().mean()
    lost_there = (found - exact).abs().mean()
    assert lost_there < 1.5 * lost, "vLLM reads other weights"
    figure(f"vLLM, {to} in bf16: log-probabilities {lost_there:.3f} from those of the model in fp32, ours {lost:.3f}")
