"""Reference log-probabilities: right for every row, computed once, and never those of something else."""

import functools
import json
import shutil

import pytest
import torch
from torch.multiprocessing import start_processes

import tt_data
import tt_train
from tt_ckpt.commit import write_manifest
from tt_ckpt.safetensors_file import write_tensor_dict
from tt_train import compose
from tt_train.build import load_model
from tt_train.errors import ConfigError
from tt_train.job import assemble
from tt_train.references.reference_cache import TENSORS, ReferenceCache, reference_facts, weights_of

WORDS = "alpha beta gamma delta epsilon zeta eta theta".split()


def pair(index):
    turns = [{"role": "user", "content": "say " + " ".join(WORDS[: index % 7 + 1])}]
    answers = " ".join(WORDS[index % 5 :]), f"{WORDS[index % 8]} {index}"
    return {"prompt": turns} | {
        side: [{"role": "assistant", "content": answer}]
        for side, answer in zip(("chosen", "rejected"), answers, strict=True)
    }


def judged(index):
    row = pair(index)
    return {"prompt": row["prompt"], "completion": row["chosen"], "label": index % 2 == 0}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    for name, row in (("pair", pair), ("judged", judged)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row(i)) + "\n" for i in range(13)))
    return folder


def job_of(files, model_dir, *words, kind="pair"):
    base = [f"model.path={model_dir}", f"data.train={files / f'{kind}.jsonl'}", "model.dtype=fp32", "device=cpu"]
    base += ["data.max_seq_len=64", "batch_size=8", "micro_batch_size=2"]
    return assemble(compose("sft", overrides=[*base, *words]), rows=kind)


def cache_of(job, folder, **facts):
    found = reference_facts(job, job.model_path) | facts
    held_out = [job.held_out] if job.held_out is not None else []
    return ReferenceCache(folder=folder, datasets=[job.train, *held_out], facts=found)


def answers(model, batch, calls=None):
    """The sum of the log-probabilities of each answer, from all the logits."""
    if calls is not None:
        calls.append(batch["input_ids"].shape)
    logits = model(batch["input_ids"], position_ids=batch.get("position_ids"))[:, :-1].float()
    targets = batch["labels"][:, 1:]
    kept = targets != -100
    each = logits.log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0]
    zeros = torch.zeros(int(batch["answer_ids"].max()) + 1)
    return zeros.index_add(0, batch["answer_ids"][:, 1:][kept], each[kept])


def made(job, folder, **facts):
    model = load_model(job)
    cache, calls = cache_of(job, folder, **facts), []
    assert not cache.load()
    cache.make(model, functools.partial(answers, model, calls=calls), job, lambda text: None)
    return model, calls


def rows_of(dataset):
    return [tt_data.collate([dataset[i]], pad_id=0) for i in range(len(dataset))]


@pytest.mark.parametrize("kind", ["pair", "judged"])
@pytest.mark.parametrize("packing", [False, True])
def test_every_row_and_pack_carries_the_log_probabilities_of_its_own_answers(files, model_dir, tmp_path, kind, packing):
    words = [f"data.packing={str(packing).lower()}", "data.eval=0.3", "eval_every=2"]
    job = job_of(files, model_dir, *words, kind=kind)
    model, calls = made(job, tmp_path / "cache")
    model.eval()
    again = job_of(files, model_dir, *words, kind=kind)
    assert cache_of(again, tmp_path / "cache").load()
    for dataset in (job.train, job.held_out, again.train, again.held_out):
        for batch in rows_of(dataset):
            with torch.no_grad():
                torch.testing.assert_close(batch["reference_log_probs"], answers(model, batch), rtol=1e-5, atol=1e-5)
                if kind == "judged":
                    other = {name[3:]: tensor for name, tensor in batch.items() if name.startswith("kl_")}
                    torch.testing.assert_close(
                        batch["kl_reference_log_probs"], answers(model, other), rtol=1e-5, atol=1e-5
                    )
    each = next(tt_data.batches(again.train, batch_size=len(again.train), micro_batch_size=2))
    for batch in each:
        assert len(batch["reference_log_probs"]) == int(batch["answer_ids"].max()) + 1
    assert len(calls) < 13 * (2 if kind == "judged" else 1)  # in batches


def test_a_mix_carries_the_log_probabilities_of_all_its_parts(files, model_dir, tmp_path):
    rows = (files / "pair.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("a", rows[:6]), ("b", rows[6:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    mix = f"{{{tmp_path / 'a.jsonl'}: 0.5, {tmp_path / 'b.jsonl'}: 0.5}}"
    job = job_of(files, model_dir, f"data.train={mix}")
    model, _ = made(job, tmp_path / "cache")
    for batch in rows_of(job.train):
        with torch.no_grad():
            torch.testing.assert_close(batch["reference_log_probs"], answers(model, batch), rtol=1e-5, atol=1e-5)


def test_dropout_is_off_while_the_reference_is_computed(files, model_dir, tmp_path):
    """Of a base that has dropout, two passes give the same numbers: those without it."""
    noisy = shutil.copytree(model_dir, tmp_path / "noisy")
    config = json.loads((noisy / "config.json").read_text()) | {"attention_dropout": 0.5}
    (noisy / "config.json").write_text(json.dumps(config))
    first, second = job_of(files, noisy), job_of(files, noisy)
    for job, name in ((first, "one"), (second, "two")):
        model, _ = made(job, tmp_path / name)
        assert model.training
    plain = job_of(files, model_dir)
    made(plain, tmp_path / "three")
    for i in range(13):
        assert first.train[i]["reference_log_probs"] == second.train[i]["reference_log_probs"]
        assert first.train[i]["reference_log_probs"] == plain.train[i]["reference_log_probs"]


@pytest.mark.parametrize(("change", "said"), [
    ("rows", "data: the rows of .*, as they are read now, are not in it"),
    ("model", "model [0-9a-f]{12} there, [0-9a-f]{12} here"),
    ("max_seq_len", r"max_seq_len \[64\] there, \[48\] here"),
    ("dtype", "dtype 'fp32' there, 'bf16' here"),
    ("template", "tokenizer or template [0-9a-f]{12} there, [0-9a-f]{12} here"),
    ("quantized", "quantized False there, True here"),
    ("adapter", "adapter None there, '?[0-9a-f]+'? here"),
])  # fmt: skip
def test_a_cache_of_something_else_is_refused_and_says_what_differs(files, model_dir, tmp_path, change, said):
    made(job_of(files, model_dir), tmp_path / "cache")
    words, facts, model, data = [], {}, model_dir, files
    if change == "rows":
        data = shutil.copytree(files, tmp_path / "files")
        (data / "pair.jsonl").write_text((files / "pair.jsonl").read_text().replace("alpha", "beta"))
    elif change == "model":
        model = shutil.copytree(model_dir, tmp_path / "model")
        weights = model / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x3d")
    elif change in ("max_seq_len", "dtype", "template"):
        key = {"dtype": "model.dtype"}.get(change, f"data.{change}")
        words = [f"{key}={ {'max_seq_len': 48, 'dtype': 'bf16', 'template': 'chatml'}[change] }".replace(" ", "")]
    else:
        facts = {"quantized": True} if change == "quantized" else {"adapter": "0" * 64}
    with pytest.raises(ConfigError, match=f"loss.reference_cache: .* was made for something else: .*{said}"):
        cache_of(job_of(data, model, *words), tmp_path / "cache", **facts).load()


def test_mismatched_answers_of_another_seed_are_refused(files, model_dir, tmp_path):
    made(job_of(files, model_dir, kind="judged"), tmp_path / "cache")
    with pytest.raises(ConfigError, match="seed of mismatched answers 0 there, 1 here"):
        cache_of(job_of(files, model_dir, "seed=1", kind="judged"), tmp_path / "cache").load()


def test_more_rows_than_are_needed_are_no_difference(files, model_dir, tmp_path):
    """A run without held-out rows, or with another order, uses the cache of one with them."""
    shutil.copy(files / "pair.jsonl", tmp_path / "eval.jsonl")
    made(job_of(files, model_dir, f"data.eval={tmp_path / 'eval.jsonl'}"), tmp_path / "cache")
    assert cache_of(job_of(files, model_dir, "seed=3", "data.packing=true"), tmp_path / "cache").load()


@pytest.mark.parametrize(
    "damage", ["cut", "flipped", "manifest", "missing", "empty", "other", "crafted", "link", "file"]
)
def test_a_damaged_cache_is_refused_with_the_cure(files, model_dir, tmp_path, damage):
    folder = tmp_path / "cache"
    made(job_of(files, model_dir), folder)
    tensors, manifest = folder / TENSORS, folder / "MANIFEST.json"
    if damage in ("cut", "flipped"):
        raw = bytearray(tensors.read_bytes())
        raw[-1] ^= 1
        tensors.write_bytes(raw if damage == "flipped" else raw[:-3])
    elif damage == "manifest":
        manifest.write_text(manifest.read_text().replace("fp32", "bf16"))
    elif damage == "missing":
        tensors.unlink()
    elif damage in ("empty", "other", "file"):
        shutil.rmtree(folder)
        if damage == "file":
            folder.write_text("hello")
        else:
            folder.mkdir()
        if damage == "other":
            (folder / "model.safetensors").write_bytes(b"x")
    elif damage == "crafted":  # a manifest that fits, and numbers that do not
        about = json.loads(manifest.read_text())
        del about["files"], about["sha256"]
        name = next(iter(about["data"])) + ".reference_log_probs"
        manifest.unlink()
        tensors.unlink()
        write_tensor_dict(tensors, {name: torch.full((13, 2), float("nan"))})
        write_manifest(folder, about)
    else:
        shutil.move(tensors, tmp_path / "elsewhere")
        tensors.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="damaged, or not a cache.*name another folder, or remove this one"):
        cache_of(job_of(files, model_dir), folder).load()


def test_what_cannot_be_used_is_not_written(files, model_dir, tmp_path):
    job = job_of(files, model_dir)
    cache = cache_of(job, tmp_path / "cache")
    model = load_model(job)

    def broken(batch):
        return answers(model, batch) * float("nan")

    with pytest.raises(ConfigError, match="is not made: a log-probability of the reference is not finite"):
        cache.make(model, broken, job, lambda text: None)

    def interrupted(batch):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.make(model, interrupted, job, lambda text: None)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    blocked = cache_of(job, tmp_path / "file" / "cache")
    with pytest.raises(ConfigError, match="file/cache cannot be written: "):
        blocked.make(model, interrupted, job, lambda text: None)  # before it computes


def rank_of_two(rank, folder, files, model_dir):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        job = job_of(files, model_dir)
        _, calls = made(job, folder / "cache")
        values = [job.train[i]["reference_log_probs"] for i in range(13)]
        (folder / f"{rank}.json").write_text(json.dumps([len(calls), values]))
        again = job_of(files, model_dir)
        assert cache_of(again, folder / "cache").load()
        assert [again.train[i]["reference_log_probs"] for i in range(13)] == values
        with pytest.raises(ConfigError, match="dtype 'fp32' there, 'bf16' here"):  # on every rank
            cache_of(job_of(files, model_dir, "model.dtype=bf16"), folder / "cache").load()
    finally:
        torch.distributed.destroy_process_group()


def test_two_ranks_compute_half_each_and_get_all(files, model_dir, tmp_path):
    start_processes(rank_of_two, args=(tmp_path, files, model_dir), nprocs=2, start_method="fork")
    (calls, values), (other_calls, other_values) = (json.loads((tmp_path / f"{r}.json").read_text()) for r in range(2))
    assert values == other_values
    assert calls == other_calls == 4  # 7 of 13 rows in twos, one of them twice: sharded weights need it
    job = job_of(files, model_dir)
    made(job, tmp_path / "alone")
    alone = torch.tensor([job.train[i]["reference_log_probs"] for i in range(13)])
    torch.testing.assert_close(torch.tensor(values), alone, rtol=1e-5, atol=1e-5)


def test_weights_are_named_by_their_content(model_dir, tmp_path):
    copy = shutil.copytree(model_dir, tmp_path / "copy")
    assert weights_of(model_dir) == weights_of(copy)
    (copy / "config.json").write_text((copy / "config.json").read_text().replace("1e-05", "1e-06"))
    assert weights_of(model_dir) != weights_of(copy)
    assert tt_train.load(model_dir) is not None
