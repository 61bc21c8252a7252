"""Batches of answers: a loss of pairs is the same for packed rows as for others, on a real model."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

import tt_data
import tt_train

WORDS = "alpha beta gamma delta epsilon zeta eta theta".split()


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    rows = [
        {"prompt": [{"role": "user", "content": "say " + " ".join(WORDS[: i % 7 + 1])}],
         "chosen": [{"role": "assistant", "content": " ".join(WORDS[i % 5 :])}],
         "rejected": [{"role": "assistant", "content": " ".join(WORDS[: i % 4 + 1]) + f" {i}"}]}
        for i in range(23)
    ]  # fmt: skip
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def answers_of(model, batch):
    """The log-probability of each answer, by the formula of ``tt_data.batching.collate`` and all the logits."""
    logits = model(batch["input_ids"], position_ids=batch.get("position_ids"))[:, :-1].float()
    targets = batch["labels"][:, 1:]
    kept = targets != -100
    log_probs = logits.log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0]
    zeros = torch.zeros(int(batch["answer_ids"].max()) + 1)
    return zeros.index_add(0, batch["answer_ids"][:, 1:][kept], log_probs[kept])


def pair_loss(model, batches, reference):
    """The sum of -log sigmoid over all pairs, and how many there are."""
    total, count = torch.zeros(()), 0
    for batch in batches:
        with torch.no_grad():
            start = answers_of(reference, batch)
        margins = (answers_of(model, batch) - start).view(-1, 2)
        total = total - F.logsigmoid(0.1 * (margins[:, 0] - margins[:, 1])).sum()
        count += len(margins)
    return total, count


def gradients(model, batches, reference):
    model.zero_grad()
    loss, count = pair_loss(model, batches, reference)
    (loss / count).backward()
    return loss.item() / count, count, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("streaming", [False, True])
def test_packed_gradients_of_a_pair_loss_equal_unpacked_ones(model_dir, pairs_file, streaming):
    model, tokenizer = tt_train.load(model_dir)
    reference, _ = tt_train.load(model_dir)
    model, reference = model.float().train(), reference.float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter, generator=torch.Generator().manual_seed(parameter.dim())))
    options = {"max_seq_len": 64, "streaming": streaming}
    alone = tt_data.load_dataset(pairs_file, tokenizer, **options)
    packed = tt_data.load_dataset(pairs_file, tokenizer, packing=True, **options)
    wanted = gradients(model, next(tt_data.batches(alone, batch_size=23, micro_batch_size=4)), reference)
    size = next(size for size in range(1, 24) if step_of(packed, size)[0]["answer_ids"].max() == 45)
    assert size < 12  # packs hold several pairs
    for micro in (1, 2, size):
        batches = next(tt_data.batches(packed, batch_size=size, micro_batch_size=micro, shuffle=False))
        found = gradients(model, batches, reference)
        assert found[1] == wanted[1] == 23
        assert found[0] == pytest.approx(wanted[0], rel=1e-6)
        for name, gradient in wanted[2].items():
            torch.testing.assert_close(found[2][name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))


def step_of(dataset, size):
    return next(tt_data.batches(dataset, batch_size=size, micro_batch_size=size, shuffle=False))


@pytest.mark.parametrize("packing", [False, True])
def test_the_first_loss_of_pairs_is_ln_2(model_dir, pairs_file, packing):
    model, tokenizer = tt_train.load(model_dir)
    dataset = tt_data.load_dataset(pairs_file, tokenizer, max_seq_len=64, packing=packing)
    loss, count = pair_loss(model.float(), next(tt_data.batches(dataset, batch_size=8, micro_batch_size=2)), model)
    assert loss.item() / count == pytest.approx(math.log(2), rel=1e-6)


def test_an_answer_of_a_pack_does_not_see_its_neighbours(model_dir, pairs_file):
    """The log-probability of each answer is that of its document alone; another answer may change and it does not."""
    model, tokenizer = tt_train.load(model_dir)
    model = model.float()
    alone = tt_data.load_dataset(pairs_file, tokenizer, max_seq_len=64)
    packed = tt_data.load_dataset(pairs_file, tokenizer, max_seq_len=64, packing=True)
    batch = tt_data.collate([packed[0]], pad_id=0)
    with torch.no_grad():
        found = answers_of(model, batch)
        wanted = [answers_of(model, tt_data.collate([alone[row]], pad_id=0)) for row in packed.members(0)]
        torch.testing.assert_close(found, torch.cat(wanted), rtol=1e-5, atol=1e-5)
        changed = {**batch, "input_ids": torch.where(batch["answer_ids"] == 1, 9, batch["input_ids"])}
        again = answers_of(model, changed)
    others = torch.arange(len(found)) != 1
    assert torch.equal(again[others], found[others])
    assert again[1] != found[1]
