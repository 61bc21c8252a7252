"""The optimizer muon: torch's Muon for the matrices of blocks, AdamW for the rest."""

import pytest
import torch

import tt_data
from tt_train import ConfigError, compose
from tt_train.build import build_optimizer, load_model
from tt_train.devices.distributed import world
from tt_train.job import assemble
from tt_train.losses.cross_entropy import cross_entropy
from tt_train.memory import blocks
from tt_train.recipes import sft
from tt_train.step import train_step


def muon_run(words, *more, steps=4):
    """Losses and optimizer of a small run by muon."""
    config = compose("sft", overrides=[*words, "optimizer.name=muon", "optimizer.lr=1e-2", *more])
    job, here = assemble(config), world()
    model = load_model(job)
    optimizer = build_optimizer(job, model)
    batches = tt_data.batches(job.train, batch_size=8, micro_batch_size=config.micro_batch_size, rank=here.rank,
                              world_size=here.size, pad_id=job.tokenizer.pad_id)  # fmt: skip
    losses = [train_step(model, next(batches), cross_entropy, optimizer).loss for _ in range(steps)]
    return losses, optimizer


def test_muon_is_torchs_for_matrices_of_blocks_and_adamw_for_the_rest(words):

    losses, optimizer = muon_run(words)
    muon, adamw = optimizer.optimizers
    assert isinstance(muon, torch.optim.Muon)
    assert isinstance(adamw, torch.optim.AdamW)
    job = assemble(compose("sft", overrides=words))
    plain = load_model(job)
    hidden = [parameter for parameter in blocks(plain).parameters() if parameter.dim() == 2]
    rest = [parameter for parameter in plain.parameters() if all(parameter is not other for other in hidden)]
    decayed_rest = [{"params": [p for p in rest if p.dim() > 1]}, {"params": [p for p in rest if p.dim() < 2],
                                                                   "weight_decay": 0.0}]  # fmt: skip
    both = [torch.optim.Muon(hidden, lr=1e-2, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(decayed_rest, lr=1e-2, weight_decay=0.01, betas=(0.9, 0.999), eps=1e-8)]  # fmt: skip
    batches = tt_data.batches(job.train, batch_size=8, micro_batch_size=8, pad_id=job.tokenizer.pad_id)
    for expected in losses:
        (batch,) = next(batches)
        logits = plain(batch["input_ids"])[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
        assert expected == pytest.approx(loss.item(), rel=2e-3)  # products in bf16 round what fp32 sums differ in
        loss.backward()
        for one in both:
            one.step()
            one.zero_grad()
    assert losses[-1] < losses[0]


def test_muon_resumes_to_the_same_bits_and_learns_with_an_adapter_in_bf16_and_in_the_backward_pass(words, tmp_path):

    def run(name, *more, resume=None):
        words_of_run = [*words, "optimizer.name=muon", "samples.num=0", "save_every=2", f"output_dir={tmp_path / name}"]
        return sft.main(compose("sft", overrides=[*words_of_run, "max_steps=4", *more]), resume=resume)

    whole, half = run("whole"), tmp_path / "whole" / "checkpoints" / "step-000002"
    again = run("again", resume=half)
    files = [(path / "model" / "model.safetensors").read_bytes() for path in (whole, again)]
    assert files[0] == files[1]
    backward = ["optimizer_in_backward=true", "max_grad_norm=null", "micro_batch_size=8"]
    for more in (["adapter.rank=4"], ["model.dtype=bf16"], backward):
        losses, _ = muon_run(words, *more)
        assert losses[-1] < losses[0]


def test_two_shards_make_muons_steps_up_to_the_rounding_of_bf16(words, ranks):
    expected, _ = muon_run(words)
    ranks(2, compare_muon, [*words, "micro_batch_size=2"], expected)


def compare_muon(words, expected):
    losses, _ = muon_run(words, "parallel.shard=2")
    assert losses[0] == pytest.approx(expected[0], rel=1e-5)
    assert losses == pytest.approx(expected, rel=1e-2)


def test_muon_alone_without_a_matrix_of_a_block_is_refused(words):
    with pytest.raises(ConfigError, match="no matrix of a block trains; use adamw"):
        muon_run(words, "adapter.rank=4", "adapter.target_modules=[lm_head]", steps=0)
