"""A tiny model directory, its tokenizer and a file of rows, made once; copies are cheap."""

import json
import os

import pytest
import torch

torch.set_num_threads(1)  # tests fork: a child would wait for ever for threads that it does not have


def pytest_collection_modifyitems(items):
    """Tests marked gpu run where there is one: nox -s gpu."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau".split()


def row(index):
    """A chat of one turn whose answer repeats words of the question."""
    chosen = [WORDS[(index * step + step) % len(WORDS)] for step in range(1, 3 + index % 4)]
    question, answer = "say " + " ".join(chosen), " ".join(reversed(chosen))
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("".join(json.dumps(row(index)) + "\n" for index in range(37)))
    return file


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS), "say user assistant system"] * 20, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": TEMPLATE,
        "model_max_length": 128,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "pad_token_id": 0}))
    return folder


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory, tokenizer_dir):
    """A Llama of two layers with random weights, in the layout of Hugging Face."""
    import tt_ckpt
    import tt_models

    folder = tmp_path_factory.mktemp("model")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 400,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "initializer_range": 0.05,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": None,
        "torch_dtype": "float32",
        "use_cache": True,
    }
    torch.manual_seed(5)
    model = tt_models.build(tt_models.config_from_hf(config))
    tt_ckpt.save_hf(model, folder, config=config, source=tokenizer_dir)
    return folder


@pytest.fixture
def words(model_dir, rows_file):
    """The words of a small run: ``compose("sft", overrides=[*words, ...])``."""
    return [
        f"model.path={model_dir}",
        f"data.train={rows_file}",
        "model.dtype=fp32",
        "batch_size=8",
        "micro_batch_size=4",
        "max_steps=6",
        "device=cpu",
        "optimizer.lr=5e-3",
        "schedule.warmup_steps=2",
        "samples.max_new_tokens=4",
    ]


def on_rank(rank, size, store, function, args):
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    function(*args)
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture
def ranks(tmp_path):
    """``ranks(size, function, *args)`` calls the function on so many forked processes, each with its rank."""
    if os.environ.get("TT_ONE_PROCESS"):
        pytest.skip("TT_ONE_PROCESS: what several processes do does not depend on how the package was installed")
    import torch._dynamo  # seconds in every forked rank, once here
    import torch.distributed.fsdp
    import torch.multiprocessing

    count = iter(range(1000))

    def run(size, function, *args):
        store = tmp_path / f"store{next(count)}"
        arguments = (size, store, function, args)
        torch.multiprocessing.start_processes(on_rank, args=arguments, nprocs=size, start_method="fork")

    return run
