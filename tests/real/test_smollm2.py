"""SmolLM2-135M-Instruct from its GGUF file to a merged fine-tune, against transformers, peft and TRL."""

import json
import shutil

import pytest
import torch

import tt_models
import tt_train

QUESTIONS = ["What is the capital of France?", "Name three colours.", "Write a line about the sea.", "What is 2 + 2?"]


def reference(path, dtype):
    """The model at ``path`` and its tokenizer in transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval(), AutoTokenizer.from_pretrained(path)


def distance(a, b):
    """The largest difference, as a share of the largest value."""
    return float((a.float() - b.float()).abs().max() / b.float().abs().max())


def prompt_ids(tokenizer, question):
    """The ids that transformers asks ``question`` with."""
    messages = [{"role": "user", "content": question}]
    return torch.tensor([tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)])


def test_the_converted_weights_are_those_that_transformers_reads(gguf_file, model):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, GgufConfig

    read = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    ).state_dict()
    ours = load_file(model / "model.safetensors")
    assert ours.keys() == read.keys() - {"lm_head.weight"}  # tied
    for name, weight in ours.items():
        assert torch.equal(weight, read[name].to(torch.bfloat16)), name


def test_it_is_certified(tt, model):
    assert "equal" in tt("verify", model)


def test_it_knows_the_capital_of_france(tt, model):
    answer = tt("generate", model, QUESTIONS[0], "--temperature", "0", "--max-new-tokens", "24")
    assert "Paris" in answer


def greedy(model, tokenizer, question, limit=24):
    """Our greedy answer: ids of prompt and answer."""
    ids = tokenizer.encode_prompt([{"role": "user", "content": question}])
    return tt_models.generate(model, [ids], max_new_tokens=limit, temperature=0, eos_ids=tokenizer.eos_ids)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["model", "merged"])
def test_greedy_texts_are_those_of_transformers(name, dtype, request, figure):
    """Token by token. Two that differ must be closer to each other than the reference's own error in ``dtype``."""
    path = request.getfixturevalue(name)
    ours, tokenizer = tt_train.load(path, dtype=dtype)
    theirs, their_tokenizer = reference(path, dtype)
    ends = theirs.generation_config.eos_token_id
    assert set(tokenizer.eos_ids) == {ends} if isinstance(ends, int) else set(ends)
    same = 0
    for question in QUESTIONS:
        ids = prompt_ids(their_tokenizer, question)
        want = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)[0]
        got = greedy(ours, tokenizer, question)
        length = min(len(want), len(got))
        apart = (want[:length] != got[:length]).nonzero()
        if not len(apart):
            assert len(want) == len(got), question
            same += 1
            continue
        place = int(apart[0])
        exact = reference(path, torch.float64)[0]
        with torch.no_grad():
            true, rounded = (model(want[None, :place]).logits[0, -1].double() for model in (exact, theirs))
        error = float((true - rounded).abs().max())
        assert abs(float(true[want[place]] - true[got[place]])) <= 2 * error, (question, place)
    figure(f"{name}, {dtype}: {same} of {len(QUESTIONS)} greedy texts equal transformers' to the last token")
    assert same or dtype == torch.bfloat16


def score(path, held_out):
    """The share of held-out questions that are answered exactly."""
    questions, judge = held_out
    model, tokenizer = tt_train.load(path, dtype=torch.float32)
    prompts = [tokenizer.encode_prompt([{"role": "user", "content": question}]) for question, _ in questions]
    ids = tt_models.generate(model, prompts, max_new_tokens=24, temperature=0, eos_ids=tokenizer.eos_ids)
    longest = max(map(len, prompts))
    answers = [tokenizer.decode(row[longest:].tolist()).strip() for row in ids]
    return sum(judge(answer, entry) == 1.0 for answer, (_, entry) in zip(answers, questions, strict=True)) / len(
        answers
    )


def test_fine_tuning_teaches_what_it_could_not_do(model, tuned, held_out, figure):
    before, after = score(model, held_out), score(tuned, held_out)
    figure(f"held-out questions answered exactly: {before:.0%} before, {after:.0%} after")
    assert before <= 0.1
    assert after >= 0.5


def test_the_adapter_gives_the_same_logits_in_peft(model, tuned, figure):
    from peft import PeftModel

    theirs, their_tokenizer = reference(model, torch.float32)
    theirs = PeftModel.from_pretrained(theirs, tuned / "adapter").eval()
    ours, _ = tt_train.load(tuned, dtype=torch.float32)
    ids = prompt_ids(their_tokenizer, "Reverse this list of words: red, green, blue")
    with torch.no_grad():
        want, got, exact = theirs(ids).logits, ours(ids), theirs.double()(ids).logits
    error = distance(got, want)
    figure(f"adapter in peft, fp32: logits differ by {error:.1e} (peft's own error {distance(want, exact):.1e})")
    assert error <= 4 * distance(want, exact)


def encoded(tokenizer, messages, *, newline):
    """Ids and labels by transformers' rendering; ``newline``: whether the line end behind the end token is trained."""
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    labels = [-100] * len(prompt) + whole[len(prompt) :]
    return whole, labels if newline else [*labels[:-1], -100]


STEPS, BATCH, RATE = 10, 4, 1e-4


@pytest.fixture(scope="module")
def start(model, folder):
    """A random adapter that every curve starts from, in peft's format."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(reference(model, torch.float32)[0], config).save_pretrained(folder / "start")
    return folder / "start"


def adapted(model, start):
    from peft import PeftModel

    return PeftModel.from_pretrained(reference(model, torch.float32)[0], start, is_trainable=True)


def our_losses(tt, model, start, data, out):
    tt("run", "sft", f"model.path={model}", f"data.train={data}", "model.dtype=fp32", f"adapter.path={start}",
       "adapter.rank=8", "adapter.alpha=16", "adapter.target_modules=all-linear", f"optimizer.lr={RATE}",
       "optimizer.weight_decay=0", "schedule.name=constant", "schedule.warmup_steps=0", f"batch_size={BATCH}",
       f"micro_batch_size={BATCH}", f"max_steps={STEPS}", "data.shuffle=false", "samples.num=0", "-o", out)  # fmt: skip
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(out)
    return losses


def test_ten_steps_are_those_of_a_plain_loop(tt, model, start, rows, folder, figure):
    talks = [json.loads(line)["messages"] for line in rows.read_text().splitlines()[: STEPS * BATCH]]
    theirs, tokenizer = adapted(model, start), reference(model, torch.float32)[1]
    theirs.train()
    trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    want = []
    for step in range(STEPS):
        batch = [encoded(tokenizer, talk, newline=False) for talk in talks[step * BATCH : (step + 1) * BATCH]]
        count = sum(label != -100 for _, labels in batch for label in labels)
        total = 0.0
        for ids, labels in batch:
            logits = theirs(input_ids=torch.tensor([ids])).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum") / count
            loss.backward()
            total += float(loss)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        want.append(total)
    got = our_losses(tt, model, start, rows, folder / "plain")
    figure(f"ten steps, plain loop: {', '.join(f'{loss:.4f}' for loss in want)}")
    figure(f"ten steps, tt run:     {', '.join(f'{loss:.4f}' for loss in got)}")
    assert got == pytest.approx(want, rel=1e-4)


def test_ten_steps_are_those_of_trl_once_the_newline_is_trained(tt, model, start, rows, folder, figure):
    """TRL trains the line end behind the end token too; it is easy, so that its losses read lower."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    talks = [json.loads(line)["messages"] for line in rows.read_text().splitlines()[: STEPS * BATCH]]
    tokenizer = reference(model, torch.float32)[1]
    settings = SFTConfig(
        output_dir=str(folder / "trl"), max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=RATE,
        lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0, logging_steps=1,
        report_to=[], save_strategy="no", use_cpu=True, bf16=False, fp16=False, gradient_checkpointing=False,
        train_sampling_strategy="sequential", disable_tqdm=True,
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": talk[:1], "completion": talk[1:]} for talk in talks])
    trainer = SFTTrainer(adapted(model, start), args=settings, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    want = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    pairs = [dict(zip(("input_ids", "labels"), encoded(tokenizer, talk, newline=True), strict=True)) for talk in talks]
    path = folder / "ids.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    got = our_losses(tt, model, start, path, folder / "newline")
    figure(f"ten steps, TRL:        {', '.join(f'{loss:.4f}' for loss in want)}")
    assert got == pytest.approx(want, rel=1e-4)
