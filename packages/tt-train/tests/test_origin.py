"""What comes from where: nearest files, the dtypes of the base, a base that has moved, 4 bits, resized vocabularies."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import tt_ckpt
import tt_data
import tt_models
import tt_peft
import tt_train
from tt_train import ConfigError
from tt_train.recipes import sft
from tt_train.settings.composing import compose

TURNS = [{"role": "user", "content": "say alpha"}]
OWN = (
    "{% for m in messages %}<|turn|>{{ m.role }}:{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>{% endif %}"
)
IDS = torch.tensor([[5, 6, 7, 8, 260]])


def with_dtypes(model_dir, folder, dtype_of):
    """A copy of the model with each tensor in the dtype that ``dtype_of(name)`` gives."""
    shutil.copytree(model_dir, folder)
    tensors = {name: t.to(dtype_of(name)) for name, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_adapter(base, folder, *, rank=4, seed=1, scale=0.3, **lora):
    """An adapter with random weights over the model at ``base``, as a PEFT folder."""
    model = tt_train.load(base, device="cpu")[0]
    torch.manual_seed(seed)
    tt_peft.apply_lora_(model, tt_peft.LoRAConfig(rank=rank, **lora))
    for parameter in tt_peft.adapter_parameters(model).values():
        torch.nn.init.normal_(parameter.data, std=scale)
    return tt_peft.save_adapter(model, folder, base_model=str(base))


def logits(path, **options):
    model = tt_train.load(path, device="cpu", **options)[0]
    with torch.no_grad():
        return model(IDS).float()


# ---- dtypes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "norms"), [("float16", "float16"), ("bfloat16", "float32"), ("float32", "float32")]
)
def test_a_merge_keeps_the_dtype_of_every_tensor_and_the_bits_of_those_without_an_adapter(
    model_dir, tmp_path, weights, norms
):
    base = with_dtypes(model_dir, tmp_path / "base", lambda name: getattr(torch, norms if "norm" in name else weights))
    adapter = write_adapter(base, tmp_path / "adapter")
    tt_train.merge_run(adapter, tmp_path / "out")
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert {name: t.dtype for name, t in after.items()} == {name: t.dtype for name, t in before.items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "q_proj" in name or "v_proj" in name}


def test_a_merged_weight_is_rounded_once(model_dir, tmp_path):
    base = with_dtypes(model_dir, tmp_path / "base", lambda name: torch.bfloat16)
    adapter = write_adapter(base, tmp_path / "adapter")
    told = []
    tt_train.merge_run(adapter, tmp_path / "fp32", dtype=torch.float32)
    tt_train.merge_run(adapter, tmp_path / "out", tell=told.append)
    exact, rounded = (load_file(tmp_path / name / "model.safetensors") for name in ("fp32", "out"))
    assert all(torch.equal(exact[name].bfloat16(), rounded[name]) for name in exact)
    assert "median" in told[0]
    assert "fp32" in told[0]


def test_a_run_in_fp32_over_a_bf16_base_merges_to_what_its_base_is_and_says_so(model_dir, tmp_path, words, capsys):
    base = with_dtypes(model_dir, tmp_path / "base", lambda name: torch.bfloat16)
    more = [f"model.path={base}", "adapter.rank=2", "max_steps=1", f"output_dir={tmp_path / 'run'}"]
    run = sft.main(compose("sft", overrides=[*words, *more]))
    assert "forward pass in fp32" in (told := capsys.readouterr().err)
    assert "result in fp32; tt merge will write bf16, as the base is, or all of it with --dtype fp32" in told
    assert tt_train.load(run)[0].model.norm.weight.dtype == torch.float32
    tt_train.merge_run(run, tmp_path / "out")
    assert set(tt_ckpt.tensor_dtypes(tmp_path / "out").values()) == {torch.bfloat16}


@pytest.mark.parametrize("more", [["adapter.rank=2"], []])
def test_a_stopped_run_merges_to_what_its_finished_one_is(model_dir, words, tmp_path, more):
    """A bf16 forward pass over a base in fp32: neither the base nor the change is rounded to bf16."""
    steps = ["optimizer.lr=1e-3", "max_steps=2", "model.dtype=bf16", f"output_dir={tmp_path / 'run'}"]
    folder = sft.main(compose("sft", overrides=[*words, *more, f"model.path={model_dir}", *steps]))
    tt_train.merge_run(folder, tmp_path / "finished")
    shutil.rmtree(folder / ("adapter" if more else "model"))
    tt_train.merge_run(folder, tmp_path / "stopped")
    finished, stopped = (load_file(tmp_path / name / "model.safetensors") for name in ("finished", "stopped"))
    assert {tensor.dtype for tensor in stopped.values()} == {torch.float32}
    assert stopped.keys() == finished.keys()
    assert all(torch.equal(tensor, finished[name]) for name, tensor in stopped.items())
    said: list[str] = []
    tt_train.load(folder, tell=said.append)
    assert said == [f"{folder} has no result yet; this is its checkpoint of step 2"]


def test_a_merge_that_overflows_fp16_is_refused_with_a_dtype_that_fits(model_dir, tmp_path):
    adapter = write_adapter(model_dir, tmp_path / "adapter", scale=300.0)
    with pytest.raises(ValueError, match=r"q_proj.*float16.*(bf16|fp32|float32)"):
        tt_train.merge_run(adapter, tmp_path / "out", dtype=torch.float16)
    assert not (tmp_path / "out").exists()


def test_modules_trained_in_full_go_out_in_the_dtype_of_the_base(model_dir, tmp_path):
    base = with_dtypes(model_dir, tmp_path / "base", lambda name: torch.bfloat16)
    adapter = write_adapter(base, tmp_path / "adapter", modules_to_save=("lm_head",), dtype=torch.float32)
    tt_train.merge_run(adapter, tmp_path / "out")
    assert set(tt_ckpt.tensor_dtypes(tmp_path / "out").values()) == {torch.bfloat16}


def test_fp16_files_compute_in_fp32_on_a_cpu_and_files_decide_not_the_config(model_dir, tmp_path):
    half = with_dtypes(model_dir, tmp_path / "half", lambda name: torch.float16)
    assert tt_train.load(half, device="cpu")[0].output_weight.dtype == torch.float32
    brain = with_dtypes(model_dir, tmp_path / "brain", lambda name: torch.bfloat16)  # config.json says float32
    assert tt_train.load(brain, device="cpu")[0].output_weight.dtype == torch.bfloat16


# ---- nearest wins ----------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(model_dir, tmp_path):
    """An adapter with a tokenizer of its own that has one token more, over a copy of the model with room for it."""
    base = tmp_path / "base"
    shutil.copytree(model_dir, base)
    (base / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    folder = write_adapter(base, tmp_path / "adapter")
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.get)  # its row becomes the new token's
    index = vocabulary.pop(last)
    tokenizer["model"]["merges"] = [pair for pair in tokenizer["model"]["merges"] if "".join(pair) != last]
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": index, "content": "<|turn|>"})
    vocabulary["<|turn|>"] = index
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((base / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<|turn|>", "chat_template": OWN}))
    return folder


def served(folder):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True)
    return tokenizer, text, transformers.GenerationConfig.from_pretrained(folder)


def test_the_tokenizer_and_template_beside_an_adapter_are_used_and_go_out_with_the_weights(adapter, tmp_path):
    _, tokenizer = tt_train.load(adapter, device="cpu")
    assert tokenizer.render(TURNS, add_generation_prompt=True) == "<|turn|>user:say alpha<|turn|>"
    tt_train.merge_run(adapter, tmp_path / "out")
    merged, text, generation = served(tmp_path / "out")
    assert text == "<|turn|>user:say alpha<|turn|>"
    assert merged.eos_token == "<|turn|>"
    assert (
        set(generation.eos_token_id) == {tokenizer.eos_id, 2} == set(tt_data.load_tokenizer(tmp_path / "out").eos_ids)
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == tokenizer.eos_id
    assert not (tmp_path / "out" / "special_tokens_map.json").exists()  # of the base's tokenizer


@pytest.mark.parametrize("place", ["chat_template.jinja", "additional_chat_templates"])
def test_a_template_alone_beside_an_adapter_is_used_with_the_bases_tokenizer(model_dir, tmp_path, place):
    adapter = write_adapter(model_dir, tmp_path / "adapter")
    (adapter / "chat_template.jinja").write_text(OWN)
    if place != "chat_template.jinja":
        (adapter / place).mkdir()
        (adapter / place / "tool_use.jinja").write_text("tools")
    tokenizer = tt_train.load(adapter, device="cpu")[1]
    tt_train.merge_run(adapter, tmp_path / "out")
    out = tt_data.load_tokenizer(tmp_path / "out")
    assert out.templates == tokenizer.templates
    assert tokenizer.templates["default"] == OWN
    assert out.vocab_size == tt_data.load_tokenizer(model_dir).vocab_size
    assert served(tmp_path / "out")[1] == "<|turn|>user:say alpha<|turn|>"


def test_a_tokenizer_without_a_template_beside_an_adapter_keeps_the_bases(adapter, model_dir, tmp_path):
    config = json.loads((adapter / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (adapter / "tokenizer_config.json").write_text(json.dumps(config))
    tt_train.merge_run(adapter, tmp_path / "out")
    out = tt_data.load_tokenizer(tmp_path / "out")
    assert out.templates == tt_data.load_tokenizer(model_dir).templates == tt_train.load(adapter)[1].templates
    assert out.token_id("<|turn|>") is not None
    assert served(tmp_path / "out")[1].startswith("<|im_start|>user")


def test_what_ends_a_turn_of_the_bases_own_template_goes_into_the_generation_settings(model_dir, words, tmp_path):
    base = tmp_path / "base"  # a base model: its text ends with another token than its chat template's turns
    shutil.copytree(model_dir, base)
    config = json.loads((base / "tokenizer_config.json").read_text()) | {"eos_token": "<|endoftext|>"}
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    more = [f"model.path={base}", "adapter.rank=2", "max_steps=1", f"output_dir={tmp_path / 'run'}"]
    tt_train.merge_run(sft.main(compose("sft", overrides=[*words, *more])), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [0, 2]


@pytest.mark.parametrize("kind", ["adapter", "run"])
def test_generation_settings_beside_an_adapter_or_run_go_before_the_bases(model_dir, words, tmp_path, kind):
    if kind == "run":
        folder = tmp_path / "run"
        sft.main(compose("sft", overrides=[*words, "adapter.rank=2", "max_steps=1", f"output_dir={folder}"]))
    else:
        folder = write_adapter(model_dir, tmp_path / "adapter")
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.25, "eos_token_id": [2, 0]}))
    assert 0 in tt_train.load(folder, device="cpu")[1].eos_ids
    tt_train.merge_run(folder, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.25


def test_the_adapter_folder_of_a_run_is_the_run(model_dir, words, tmp_path):
    template = tmp_path / "mine.jinja"
    template.write_text(OWN)
    more = ["adapter.rank=2", "max_steps=1", f"data.template={template}", f"output_dir={tmp_path / 'run'}"]
    run = sft.main(compose("sft", overrides=[*words, *more]))
    assert tt_train.load(run / "adapter")[1].templates == tt_train.load(run)[1].templates == {"default": OWN}


def test_a_tokenizer_with_tokens_that_nothing_embeds_is_refused_with_the_sizes(adapter, tmp_path):
    tokenizer = json.loads((adapter / "tokenizer.json").read_text())
    first, like = len(tokenizer["model"]["vocab"]), tokenizer["added_tokens"][0]
    tokenizer["added_tokens"] += [{**like, "id": index, "content": f"<|{index}|>"} for index in range(first, 401)]
    (adapter / "tokenizer.json").write_text(json.dumps(tokenizer))
    for act in (lambda: tt_train.load(adapter), lambda: tt_train.merge_run(adapter, tmp_path / "out")):
        with pytest.raises(ConfigError, match=r"401 tokens, the model 400 embeddings.*--base DIR"):
            act()


# ---- where the base is -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adapter", "run", "stopped run"])
def test_a_base_that_moved_is_named_with_the_file_that_names_it_and_can_be_given(model_dir, words, tmp_path, kind):
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(model_dir, old)
    if kind == "adapter":
        folder, file = write_adapter(old, tmp_path / "adapter"), "adapter_config.json"
    else:
        more = [f"model.path={old}", "adapter.rank=2", "max_steps=2", "save_every=1", f"output_dir={tmp_path / 'run'}"]
        folder = sft.main(compose("sft", overrides=[*words, *more]))
        file = "adapter_config.json"
        if kind == "stopped run":
            shutil.rmtree(folder / "adapter")
            file = "manifest.json"
    expected = logits(folder)
    old.rename(new)
    with pytest.raises(ConfigError, match=rf"{file}: names the base model .*old, which does not exist.*--base DIR"):
        tt_train.load(folder)
    assert torch.equal(logits(folder, base=new), expected)
    tt_train.merge_run(folder, tmp_path / "out", base=new)
    torch.testing.assert_close(logits(tmp_path / "out"), expected, rtol=1e-4, atol=1e-5)


def test_a_base_that_is_a_directory_of_something_else_is_named_with_the_file_that_names_it(model_dir, tmp_path):
    adapter, base = write_adapter(model_dir, tmp_path / "adapter"), tmp_path / "old"
    base.mkdir()
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(base)}))
    with pytest.raises(ConfigError, match=rf"{file}: names the base model {base}, a directory without.*--base DIR"):
        tt_train.load(adapter, device="cpu")


def test_a_relative_base_may_be_relative_to_its_adapter(model_dir, tmp_path):
    shutil.copytree(model_dir, tmp_path / "base")
    adapter = write_adapter(tmp_path / "base", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": "../base"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert logits(adapter).shape[-1] == 400


def test_a_quantized_base_is_answered_with_the_way_to_give_another(model_dir, tmp_path):
    base = tmp_path / "base-bnb-4bit"
    shutil.copytree(model_dir, base)
    adapter = write_adapter(base, tmp_path / "adapter")
    unused = {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": False}
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": unused}
    (base / "config.json").write_text(json.dumps(config))
    assert logits(adapter).shape[-1] == 400  # left behind by some tools
    config |= {"quantization_config": {"quant_method": "bitsandbytes"}}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"adapter_config.json: names the base model .*quantized.*--base DIR"):
        tt_train.load(adapter)
    assert logits(adapter, base=model_dir).shape[-1] == 400


def test_a_folder_that_holds_an_adapter_names_it(model_dir, tmp_path):
    write_adapter(model_dir, tmp_path / "saved" / "reward")
    with pytest.raises(ConfigError, match="reward is an adapter; give that"):
        tt_train.load(tmp_path / "saved")


def test_another_base_than_the_adapters_own_is_refused(model_dir, tmp_path):
    adapter = write_adapter(model_dir, tmp_path / "adapter")
    other = with_dtypes(model_dir, tmp_path / "other", lambda name: torch.float32)
    tensors = {name: tensor + 0.1 for name, tensor in load_file(other / "model.safetensors").items()}
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the values of its weights differ"):
        tt_train.load(adapter, base=other)


@pytest.mark.parametrize("base", [["nf4", "dense"], ["a", "b"]])
def test_two_bases_of_a_kind_are_refused(model_dir, tmp_path, base):
    with pytest.raises(ConfigError, match="at most one directory"):
        tt_train.load(write_adapter(model_dir, tmp_path / "adapter"), base=base)


def test_a_model_has_no_other_base(model_dir):
    with pytest.raises(ConfigError, match="neither a run nor an adapter"):
        tt_train.load(model_dir, base=model_dir)


# ---- 4 bits ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def qlora_run(words, tmp_path):
    more = ["adapter.rank=2", "adapter.quantize_base=true", "max_steps=1", f"output_dir={tmp_path / 'run'}"]
    return sft.main(compose("sft", overrides=[*words, *more]))


def test_after_qlora_the_base_is_that_of_training_unless_dense_is_asked_for(qlora_run, model_dir, tmp_path):
    told: list[str] = []
    model = tt_train.load(model_dir, device="cpu")[0]
    tt_peft.load_adapter(model, qlora_run / "adapter", quantize_base=True)
    with torch.no_grad():
        trained = model(IDS)
    assert torch.equal(logits(qlora_run, tell=told.append), trained)
    dense = logits(qlora_run, base="dense", tell=told.append)
    assert not torch.allclose(dense, trained, atol=1e-4)
    assert "NF4), as in training" in told[0]
    assert "trained on 4 bits (--base nf4)" in told[1]
    for name, expected in (("nf4", trained), ("dense", dense)):
        tt_train.merge_run(qlora_run, tmp_path / name, base=name)
        torch.testing.assert_close(logits(tmp_path / name), expected, rtol=1e-4, atol=1e-5)


def test_card_and_report_of_qlora_say_which_base_was_trained_on_and_the_card_names_no_path_as_base(qlora_run):
    card = (qlora_run / "README.md").read_text()
    assert "qlora over a base of 4 bits (NF4)" in card
    assert "over a base of 4 bits (NF4)" in (qlora_run / "report.html").read_text()
    assert "base_model" not in card.split("---")[1]


def test_4_bits_can_be_asked_for_and_given_with_a_directory(model_dir, tmp_path):
    adapter = write_adapter(model_dir, tmp_path / "adapter")
    assert not torch.equal(logits(adapter, base=["nf4", model_dir]), logits(adapter))


# ---- resized vocabularies --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tied", "lora"),
    [
        (False, {}),
        (True, {}),
        (False, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        (False, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
        (False, {"trainable_token_indices": [400, 405]}),
        (True, {"modules_to_save": ["embed_tokens"]}),
        (True, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    ],
)
def test_an_adapter_over_a_resized_base_loads_and_merges_as_in_peft(model_dir, tmp_path, tied, lora):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = tmp_path / "base"
    shutil.copytree(model_dir, base)
    config = json.loads((base / "config.json").read_text()) | {"tie_word_embeddings": tied}
    (base / "config.json").write_text(json.dumps(config))
    if tied:
        tensors = load_file(base / "model.safetensors")
        del tensors["lm_head.weight"]
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs.resize_token_embeddings(410)
    torch.manual_seed(3)
    settings = {"r": 4, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
    adapted = peft.get_peft_model(theirs, peft.LoraConfig(**settings | lora))
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter)) if parameter.requires_grad else None
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    ids = torch.tensor([[5, 6, 405, 7]])
    with torch.no_grad():
        expected = adapted.eval()(ids).logits
        ours = tt_train.load(tmp_path / "adapter", device="cpu")[0]
        torch.testing.assert_close(ours(ids), expected, rtol=1e-4, atol=1e-5)
    assert ours.config.vocab_size == 410
    if tied and lora:
        with pytest.raises(ValueError, match="embed_tokens shares its weight with the output projection"):
            tt_train.merge_run(tmp_path / "adapter", tmp_path / "out")
        return
    tt_train.merge_run(tmp_path / "adapter", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 410
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-5)


# ---- size ------------------------------------------------------------------------------------------------------------


def test_a_tensor_of_more_than_2_to_the_24_values_goes_through_load_and_merge(model_dir, tmp_path):
    rows = (1 << 24) // 32 + 8
    base = tmp_path / "base"
    shutil.copytree(model_dir, base)
    config = json.loads((base / "config.json").read_text()) | {"vocab_size": rows, "tie_word_embeddings": True}
    (base / "config.json").write_text(json.dumps(config))
    tensors = load_file(base / "model.safetensors")
    del tensors["lm_head.weight"]
    torch.manual_seed(0)
    tensors["model.embed_tokens.weight"] = torch.randn(rows, 32, dtype=torch.bfloat16)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    model = tt_models.build(replace(tt_models.config_from_hf(config)), device="meta")
    tt_ckpt.load_weights(model, base)
    tt_peft.apply_lora_(model, tt_peft.LoRAConfig(rank=2))
    adapter = tt_peft.save_adapter(model, tmp_path / "adapter", base_model=str(base))
    tt_train.merge_run(adapter, tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"],
                       tensors["model.embed_tokens.weight"])  # fmt: skip


@pytest.mark.parametrize("named", [["a"], {"a": 1}, 5, "a\0b", "x\x1b]0;y\x07", "\u202ebase", "x" * 100_000])
def test_a_name_of_a_base_that_is_none_is_refused_and_shown_as_printable_text(model_dir, tmp_path, named):
    folder = write_adapter(model_dir, tmp_path / "adapter")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": named}))
    with pytest.raises(
        ConfigError, match="base_model_name_or_path: expected the name or path of a model, found"
    ) as error:
        tt_train.load(folder, device="cpu")
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 600
