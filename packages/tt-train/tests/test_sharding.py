"""Many devices as gloo processes on the CPU: each trains what one process does."""

import json

import pytest
import torch

import tt_data
from tt_train import ConfigError, compose
from tt_train.build import build_optimizer, load_model, make_objective
from tt_train.distributed import world
from tt_train.evaluate import to_device
from tt_train.job import assemble
from tt_train.step import train_step


def trajectory(words, steps=5):  # the last has 5 rows
    """Losses, gradient norms and the trained weights after some steps."""
    job = assemble(compose("sft", overrides=words))
    config, here = job.config, world()
    model = load_model(job)
    optimizer, objective = build_optimizer(job, model), make_objective(config)
    names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    batches = tt_data.batches(job.train, batch_size=config.batch_size, micro_batch_size=config.micro_batch_size,
                              rank=here.rank, world_size=here.size, pad_id=job.tokenizer.pad_id)  # fmt: skip
    results = []
    for step in range(steps):
        torch.manual_seed(step)
        micro_batches = [to_device(batch, job.device) for batch in next(batches)]
        results.append(train_step(model, micro_batches, objective, optimizer, max_grad_norm=0.5))
    with optimizer.whole(names):
        weights = {name: whole(parameter.detach()) for parameter, name in names.items()}
    return results, weights


def whole(tensor):
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.clone()


def save_trajectory(words, file):
    results, weights = trajectory(words)
    if world().is_main:
        torch.save({"results": [vars(result) for result in results], "weights": weights}, file)


CASES = {
    "full": [],
    "tied": ["model.path=TIED"],
    "packed": ["data.packing=true", "data.max_seq_len=64"],
    "checkpointed": ["activation_checkpointing=true"],
    "lora": ["adapter.rank=4", "adapter.target_modules=all-linear"],
    "lora on all": [
        "adapter.rank=4",
        "adapter.target_modules=[q_proj, lm_head, embed_tokens]",
        "adapter.modules_to_save=[norm]",
    ],
    "qlora": ["adapter.rank=4", "adapter.quantize_base=true"],
    "qdora": ["adapter.rank=4", "adapter.quantize_base=true", "adapter.use_dora=true", "activation_checkpointing=true"],
    "dora": ["adapter.rank=4", "adapter.use_dora=true"],
}
WAYS = {
    "two replicas": (2, ["parallel.replicate=2"]),
    "two shards": (2, ["parallel.shard=2"]),
    "two replicas of two shards": (4, ["parallel.shard=2"]),
}


@pytest.fixture
def tied_dir(model_dir, tmp_path):
    """The model with one matrix as embedding and output projection."""
    import tt_ckpt
    import tt_models

    config = json.loads((model_dir / "config.json").read_text()) | {"tie_word_embeddings": True}
    torch.manual_seed(5)
    tt_ckpt.save_hf(
        tt_models.build(tt_models.config_from_hf(config)), tmp_path / "tied", config=config, source=model_dir
    )
    return tmp_path / "tied"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_many_ranks_train_what_one_process_does(case, way, words, tied_dir, ranks, tmp_path):
    words = [
        word.replace("TIED", str(tied_dir)) for word in (*words, *CASES[case], "batch_size=8", "micro_batch_size=2")
    ]
    results, weights = trajectory(words)
    size, more = WAYS[way]
    ranks(size, save_trajectory, [*words, *more], tmp_path / "found.pt")
    found = torch.load(tmp_path / "found.pt")
    for step, (one, many) in enumerate(zip(results, found["results"], strict=True)):
        close = {"rel": 1e-6 if step == 0 else 1e-5}
        assert many["loss"] == pytest.approx(one.loss, **close)
        assert many["grad_norm"] == pytest.approx(one.grad_norm, **close)
        assert (many["tokens"], many["outcome"]) == (one.tokens, "updated")
    assert found["weights"].keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("way", ["two shards", "two replicas of two shards"])
def test_shards_are_updated_in_the_backward_pass_as_one_process_does_it(way, words, ranks, tmp_path):
    words = [*words, "optimizer_in_backward=true", "max_grad_norm_of=parameter", "activation_checkpointing=selective"]
    results, weights = trajectory([*words, "micro_batch_size=8"])
    size, more = WAYS[way]
    ranks(size, save_trajectory, [*words, *more, f"micro_batch_size={8 // size}"], tmp_path / "found.pt")
    found = torch.load(tmp_path / "found.pt")
    for ours, theirs in zip(results, found["results"], strict=True):
        assert theirs["loss"] == pytest.approx(ours.loss, rel=1e-5)
        assert theirs["grad_norm"] == pytest.approx(ours.grad_norm, rel=1e-5)
        assert theirs["tokens"] == ours.tokens
    for name, weight in weights.items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-5, atol=1e-5)


def test_copies_are_not_updated_in_the_backward_pass(words, ranks):
    ranks(2, refuses_copies, words)


def refuses_copies(words):
    backward = ["optimizer_in_backward=true", "max_grad_norm=null", "parallel.replicate=2"]
    with pytest.raises(ConfigError, match="gradients of copies are added up after the backward pass"):
        assemble(compose("sft", overrides=[*words, *backward]))
    with pytest.raises(ConfigError, match="the state of adamw8bit cannot be sharded; use adamw"):
        assemble(compose("sft", overrides=[*words, "optimizer.name=adamw8bit", "parallel.shard=2"]))
