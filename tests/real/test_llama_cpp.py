"""Our GGUF files in llama.cpp itself, by the wheel of xllamacpp: ids, log-probabilities, greedy answers, adapters."""

import importlib.util
import json
import random
import urllib.request
from pathlib import Path

import pytest
import torch

import tt_ckpt
import tt_models
import tt_peft
import tt_train
from tt_ckpt.formats.gguf.plan import plan_model
from tt_ckpt.formats.gguf.writer import write_gguf
from tt_ckpt.hf.save import stored_weights
from tt_train.models.export import export

llama_cpp = pytest.importorskip("xllamacpp")
SOURCE = Path(__file__).parents[2] / "packages" / "tt-ckpt" / "tests" / "test_gguf.py"
spec = importlib.util.spec_from_file_location("gguf_of_tt_ckpt", SOURCE)
assert spec is not None
assert spec.loader is not None
made = importlib.util.module_from_spec(spec)
spec.loader.exec_module(made)
QUESTIONS = ["What is the capital of France?", "Name three colours.", "Write a line about the sea.", "What is 2 + 2?"]


class Server:
    """llama-server in this process, in float32 wherever it can be."""

    def __init__(self, model, adapter=None):
        settings = llama_cpp.CommonParams()
        settings.model.path = str(model)
        settings.n_ctx, settings.n_parallel, settings.warmup, settings.verbosity = 512, 1, False, 0
        settings.cpuparams.n_threads = 1
        settings.swa_full = True
        settings.cache_type_k = settings.cache_type_v = llama_cpp.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = llama_cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if adapter is not None:
            settings.lora_adapters = [llama_cpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        self.server = llama_cpp.Server(settings)

    def ask(self, path, **body):
        request = urllib.request.Request(
            self.server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def ids(self, text):
        return self.ask("/tokenize", content=text, add_special=False, parse_special=False)["tokens"]

    def log_probs(self, ids, count=100):
        """The most likely next tokens and their log-probabilities."""
        answer = self.ask("/completion", prompt=ids, n_predict=1, temperature=0, n_probs=count, cache_prompt=False)
        return {one["id"]: one["logprob"] for one in answer["completion_probabilities"][0]["top_logprobs"]}

    def greedy(self, ids, count=24):
        answer = self.ask(
            "/completion", prompt=ids, n_predict=count, temperature=0, return_tokens=True, cache_prompt=False,
            samplers=["temperature"],
        )  # fmt: skip
        return answer["tokens"]


def distance(server, model, ids):
    """The largest difference of the log-probabilities of the 100 likeliest tokens."""
    with torch.no_grad():
        ours = torch.log_softmax(model(torch.tensor([ids]))[0, -1].float(), -1)
    return max(abs(float(ours[index]) - value) for index, value in server.log_probs(ids).items())


def greedy(model, tokenizer, ids, count=24):
    found = tt_models.generate(model, [ids], max_new_tokens=count, temperature=0, eos_ids=tokenizer.eos_ids)[0]
    return [int(index) for index in found[len(ids) :] if int(index) not in tokenizer.eos_ids]


@pytest.fixture(scope="module")
def loaded(model):
    return tt_train.load(model, dtype=torch.float32)


def test_llama_cpp_answers_as_we_do_and_stops_where_we_do(tt, model, loaded, folder, figure):
    ours, tokenizer = loaded
    tt("export", model, "-o", folder / "f32.gguf", "--to", "gguf", "--type", "f32")
    server = Server(folder / "f32.gguf")
    for question in QUESTIONS:
        ids = tokenizer.encode_prompt([{"role": "user", "content": question}])
        prompt = server.ask("/apply-template", messages=[{"role": "user", "content": question}])["prompt"]
        assert prompt == tokenizer.render([{"role": "user", "content": question}], add_generation_prompt=True)
        assert [index for index in server.greedy(ids) if index not in tokenizer.eos_ids] == greedy(ours, tokenizer, ids)
        assert distance(server, ours, ids) < 1e-3
    end = server.ask("/completion", prompt=[*ids, tokenizer.eos_id], n_predict=1, temperature=0)
    assert end["tokens_predicted"] == 1
    figure("llama.cpp: four greedy answers of 24 tokens are ours (f32)")


def test_a_type_with_more_bits_is_closer_to_ours(tt, model, loaded, folder, figure):
    ours, tokenizer = loaded
    ids = tokenizer.encode_prompt([{"role": "user", "content": QUESTIONS[0]}])
    found = {}
    for kind in ("f16", "bf16", "q8_0", "q4_0"):  # llama.cpp rounds activations to the type too, q4_0's to q8_0
        tt("export", model, "-o", folder / f"{kind}.gguf", "--to", "gguf", "--type", kind)
        found[kind] = distance(Server(folder / f"{kind}.gguf"), ours, ids)
        figure(f"llama.cpp: log-probabilities differ by {found[kind]:.1e} ({kind})")
    assert list(found) == sorted(found, key=found.__getitem__)


def test_llama_cpp_splits_200_odd_texts_as_we_do(loaded, folder):
    _, tokenizer = loaded
    server, draw = Server(folder / "f32.gguf"), random.Random(0)
    letters = "The it's WE'LL 12345 \n\n\t  \r\n def f(x): <|im_start|> \u00df\u00e9e\u0301 \u4eca \U0001f600\u200d"
    texts = ["", " ", "\n", "<|im_end|>"]
    texts += ["".join(draw.choices(letters, k=draw.randint(1, 60))) for _ in range(196)]
    wrong = [text for text in texts if server.ids(text) != tokenizer.encode(text, add_bos=False, add_eos=False)]
    assert wrong == []


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_file_changes_what_llama_cpp_computes_as_it_changes_ours(model, folder, tmp_path, rslora):
    ours, tokenizer = tt_train.load(model, dtype=torch.float32)
    torch.manual_seed(0)
    config = tt_peft.LoRAConfig(
        rank=4, target_modules="all-linear", use_rslora=rslora, alpha_pattern={"down_proj": 3.0}
    )
    tt_peft.apply_lora_(ours, config)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    tt_peft.save_adapter(ours, tmp_path / "adapter", base_model=str(model))
    export(tmp_path / "adapter", tmp_path / "adapter.gguf", to="gguf", adapter=True)
    ids = tokenizer.encode_prompt([{"role": "user", "content": QUESTIONS[0]}])
    assert distance(Server(folder / "f32.gguf"), ours, ids) > 0.1
    assert distance(Server(folder / "f32.gguf", tmp_path / "adapter.gguf"), ours, ids) < 1e-3


@pytest.mark.parametrize("case", [case for case in made.CASES if case not in ("mistral", "phi 3")])  # with windows
def test_llama_cpp_computes_every_family_as_we_do(case, model, tmp_path, figure):
    _, config, _ = made.CASES[case]
    rows = tt_ckpt.open_tensors(model).specs["model.embed_tokens.weight"].shape[0]
    made.small(type(config).from_dict({**config.to_dict(), "vocab_size": rows})).save_pretrained(tmp_path / "hf")
    stated = tt_models.config_from_hf(tt_ckpt.read_config(tmp_path / "hf"))
    weights = stored_weights(tmp_path / "hf", tt_models.config_to_hf(stated))
    write_gguf(plan_model(weights, model, kind="F32"), tmp_path / "m.gguf")
    ours = tt_models.build(stated, device="meta")
    tt_ckpt.load_weights(ours, tmp_path / "hf", dtype=torch.float32)
    ids = [(i * 7919 + 13) % (rows - 10) + 5 for i in range(60)]
    found = distance(Server(tmp_path / "m.gguf"), ours.eval(), ids)
    figure(f"llama.cpp: log-probabilities differ by {found:.1e} ({case})")
    assert found < (1e-2 if case.startswith("gemma") else 1e-3)  # its GELU is a table in float16
