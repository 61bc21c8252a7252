"""What every contestant works on: shapes of models, token batches, rows, a tokenizer and tiny tasks, from fixed seeds.

Only the standard library is imported here. What needs torch, tokenizers or safetensors imports it where it is used.
"""

import itertools
import json
import random
from pathlib import Path
from typing import Any

EOS = "<|endoftext|>"
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = {"full": [], "lora q,v": ["q_proj", "v_proj"], "lora": ALL_LINEAR, "qlora": ALL_LINEAR}
_COLUMNS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads")  # fmt: skip
SHAPES = {
    "tiny": (512, 128, 256, 2, 4, 4),  # the least that every NF4 takes
    "10.5M": (4096, 256, 688, 8, 4, 4),
    "134M": (32000, 768, 2048, 12, 12, 12),
    "42M": (8192, 512, 1536, 12, 8, 4),
    "1.1B": (32000, 2048, 5632, 22, 32, 4),  # TinyLlama
    "Llama-3.2-3B": (128256, 3072, 8192, 28, 24, 8),
    "Llama-3.1-8B": (128256, 4096, 14336, 32, 32, 8),
}


def hf_config(request: dict[str, Any]) -> dict[str, Any]:
    """The ``config.json`` of a request's ``shape``: a Llama, or with ``window`` a Mistral."""
    sizes = dict(zip(_COLUMNS, SHAPES[request["shape"]], strict=True))
    window = {"sliding_window": request["window"]} if request.get("window") else {}
    kind = ("mistral", "MistralForCausalLM") if window else ("llama", "LlamaForCausalLM")
    return {
        **sizes, **window, "model_type": kind[0], "architectures": [kind[1]], "rope_theta": 10000.0,
        "head_dim": sizes["hidden_size"] // sizes["num_attention_heads"], "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": request["shape"] == "Llama-3.2-3B",
        "attention_bias": False, "mlp_bias": False, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip


def weight_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights, as in the files of a Hugging Face Llama."""
    width, inner, vocabulary = (config[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    queries, keys = (config[f"num_{kind}_heads"] * config["head_dim"] for kind in ("attention", "key_value"))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        rows = {"q": (queries, width), "k": (keys, width), "v": (keys, width), "o": (width, queries)}
        shapes |= {f"{name}self_attn.{part}_proj.weight": shape for part, shape in rows.items()}
        shapes |= {f"{name}mlp.{part}_proj.weight": (inner, width) for part in ("gate", "up")}
        shapes[f"{name}mlp.down_proj.weight"] = (width, inner)
        shapes |= {f"{name}{part}_layernorm.weight": (width,) for part in ("input", "post_attention")}
    shapes["model.norm.weight"] = (width,)
    return shapes if config["tie_word_embeddings"] else shapes | {"lm_head.weight": (vocabulary, width)}


def write_model(folder: Path, request: dict[str, Any]) -> None:
    """A Hugging Face directory with seeded weights and a tokenizer; with ``shards`` in as many files."""
    import torch
    from safetensors.torch import save_file

    config = hf_config(request)
    dtype = torch.float32 if request["dtype"] == "fp32" else torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in weight_shapes(config).items():
        drawn = torch.ones(shape) if len(shape) == 1 else torch.empty(shape).normal_(0, 0.02, generator=generator)
        weights[name] = drawn.to(dtype)
    folder.mkdir(parents=True)
    number, places = request.get("shards", 1), {}
    for index in range(number):
        file = "model.safetensors" if number == 1 else f"model-{index + 1:05}-of-{number:05}.safetensors"
        part = dict(list(weights.items())[index::number])
        save_file(part, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    if number > 1:
        total = sum(weight.nbytes for weight in weights.values())
        index_of = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index_of))
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": str(dtype).partition(".")[2]}))
    write_tokenizer(folder, config["vocab_size"])


def tokens(request: dict[str, Any]) -> dict[str, Any]:
    """One batch: ``input_ids``, ``labels`` and, if documents of ``document`` tokens are packed, ``position_ids``."""
    import torch

    generator = torch.Generator().manual_seed(0)
    shape = (request["batch"], request["length"])
    ids = torch.randint(0, SHAPES[request["shape"]][0], shape, generator=generator)
    batch = {"input_ids": ids, "labels": ids.clone()}
    if document := request.get("document"):
        positions = torch.arange(request["length"]) % document
        batch["labels"][:, positions == 0] = -100  # the last token of a document does not predict the next document
        batch["position_ids"] = positions.expand(shape).clone()
    return batch


def trained(batch: dict[str, Any]) -> int:
    """Tokens that have a loss: the labels, shifted by one, that are not -100."""
    return int((batch["labels"][:, 1:] != -100).sum())


def sentences(seed: int) -> Any:
    """A function of a number of words: seeded sentences of made-up words, frequent and rare ones."""
    draw = random.Random(seed)
    syllables = [a + b for a in "bcdfghjklmnprstvw" for b in ("a", "e", "i", "o", "u", "ai", "ou", "er")]
    words = ["".join(draw.choices(syllables, k=draw.choice([1, 2, 2, 3, 3, 4]))) for _ in range(20_000)]
    weights = list(itertools.accumulate(1 / (i + 10) for i in range(len(words))))
    return lambda count: " ".join(draw.choices(words, cum_weights=weights, k=count)).capitalize() + "."


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """A byte-level BPE tokenizer with a chat template, as transformers keeps it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder.mkdir(parents=True, exist_ok=True)
    sentence, tokenizer = sentences(0), Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocabulary, 8192), special_tokens=[EOS], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator((sentence(200) for _ in range(500 if vocabulary < 8192 else 2000)), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    turn = "{{ message['role'] }}: {{ message['content'] }}{{ eos_token if message['role'] == 'assistant' else '\n' }}"
    template = f"{{% for message in messages %}}{turn}{{% endfor %}}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "pad_token": EOS, "bos_token": EOS,
                "chat_template": template, "add_bos_token": False}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_rows(file: Path, request: dict[str, Any]) -> None:
    """Rows as jsonl. ``rows`` says how many, ``kind`` what they are.

    ``tokens``: ids and labels, of instruction data as it is found: the length is log-normal (median 160, a tenth above
    450), a fifth to a half of it is the prompt. ``pairs``: prompts with two answers. ``text``; ``accents``: one
    character that is not ASCII in each; ``chats``: conversations of 2 to 6 turns.
    """
    draw, sentence = random.Random(1), sentences(0)
    vocabulary, longest = SHAPES[request.get("shape", "10.5M")][0], request.get("longest", request.get("length", 1024))
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as stream:
        for _ in range(request["rows"]):
            if request["kind"] == "tokens":
                length = min(longest, max(16, round(draw.lognormvariate(5.08, 0.8))))
                ids, prompt = (
                    [draw.randrange(1, vocabulary) for _ in range(length)],
                    int(length * draw.uniform(0.2, 0.5)),
                )
                row: dict[str, Any] = {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}
            elif request["kind"] == "pairs":
                sizes = [min(longest // 4, max(4, round(draw.lognormvariate(3.4, 0.8)))) for _ in range(2)]
                row = {"prompt": sentence(draw.randint(8, 40)), "chosen": " " + sentence(sizes[0]),
                       "rejected": " " + sentence(sizes[1])}  # fmt: skip
            elif request["kind"] == "chats":
                turns = [{"role": role, "content": sentence(draw.randint(8, 40))}
                         for _ in range(draw.randint(1, 3)) for role in ("user", "assistant")]  # fmt: skip
                row = {"messages": turns}
            else:
                end = " caf\u00e9" if request["kind"] == "accents" else ""
                row = {"text": sentence(draw.randint(8, 40)) + end}
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_tasks(folder: Path, request: dict[str, Any]) -> None:
    """Four tasks for lm-eval: choices, choices of one token, rolling perplexity and short answers."""
    draw, sentence, count = random.Random(2), sentences(0), request["rows"]
    folder.mkdir(parents=True)
    rows: dict[str, list[dict[str, Any]]] = {"choices": [], "letters": [], "rolling": [], "answers": []}
    for _ in range(count):
        question = sentence(draw.choice([8, 16, 30, 60, 120]))
        choices = [sentence(draw.randint(3, 12)) for _ in range(4)]
        rows["choices"].append({"question": question, "choices": choices, "gold": draw.randrange(4)})
        rows["letters"].append({"question": question, "choices": ["a", "e", "i", "o"], "gold": draw.randrange(4)})
        rows["rolling"].append({"question": sentence(draw.choice([50, 150, 300]))})
        rows["answers"].append({"question": question, "answer": choices[0]})
    choice = {"output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
              "doc_to_target": "gold", "metric_list": [{"metric": "acc"}]}  # fmt: skip
    kinds = {
        "choices": choice, "letters": choice,
        "rolling": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}",
                    "metric_list": [{"metric": "word_perplexity"}]},
        "answers": {"output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}",
                    "generation_kwargs": {"until": ["\n\n\n"], "max_gen_toks": 16, "do_sample": False},
                    "metric_list": [{"metric": "exact_match"}]},
    }  # fmt: skip
    for name, settings in kinds.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}}}
        task = {"task": f"bench_{name}", "test_split": "test", "num_fewshot": 0, **source, **settings}
        (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
