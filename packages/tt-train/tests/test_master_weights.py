"""What trains is fp32, whatever the forward pass reads."""

import pytest
import torch

import tt_ckpt
from tt_train import compose
from tt_train.optim.master_weights import MasterWeights, join, split_
from tt_train.recipes import sft
from tt_train.run.console import Console


class Silent(Console):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def run(path, words, *more, **kwargs):
    return sft.main(compose("sft", overrides=[*words, f"output_dir={path}", *more]), console=Silent(), **kwargs)


def figures(path):
    from tt_train.records.run_files import read_rows

    return list(read_rows(path / "metrics.jsonl"))


def test_the_two_halves_of_a_number_are_the_number_and_the_upper_one_is_the_nearest():
    torch.manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (200_000,), dtype=torch.int32)
    whole = bits.view(torch.float32)
    whole = whole[whole.abs() < 3e38]  # finite, also once rounded
    whole = torch.cat([whole, torch.tensor([0.0, -0.0, 1e-45, 1.00390625, -1.00390625])])  # the last two: ties
    nearest, lost = torch.empty_like(whole, dtype=torch.bfloat16), torch.empty_like(whole, dtype=torch.int16)
    split_(whole.clone(), nearest, lost)
    assert torch.equal(join(nearest, lost).view(torch.int32), whole.view(torch.int32))
    error, least = (nearest.double() - whole).abs(), (whole.bfloat16().double() - whole).abs()
    assert torch.equal(error, least)


@pytest.mark.parametrize("make", [
    lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, fused=True),
    lambda parameters: torch.optim.SGD(parameters, lr=1e-4, momentum=0.9),
    lambda parameters: torch.optim.Adagrad(parameters, lr=1e-4),
])  # fmt: skip
@pytest.mark.parametrize("together", [False, True])
def test_updates_are_those_of_the_optimizer_in_fp32_bit_for_bit(make, together, monkeypatch):
    monkeypatch.setattr("tt_train.optim.master_weights._BUCKET", 40)  # several parameters, in several buckets
    torch.manual_seed(0)
    shapes = [(7, 5), (3,), (4, 2), (6, 6)]
    plain = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    ours = [torch.nn.Parameter(parameter.detach().clone()) for parameter in plain]
    groups = [
        [{"params": parameters[:1]}, {"params": parameters[1:], "weight_decay": 0.0}] for parameters in (plain, ours)
    ]
    reference, masters = make(groups[0]), MasterWeights(make(groups[1]), narrow=True, together=together)
    assert all(parameter.dtype == torch.bfloat16 for parameter in ours)
    for _ in range(5):
        for mine, theirs in zip(ours, plain, strict=True):
            theirs.grad = torch.randn(theirs.shape)
            mine.grad = theirs.grad.clone()
        reference.step()
        masters.step()
        masters.zero_grad()
        assert not masters.half_done
    for mine, theirs in zip(ours, plain, strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine - theirs).abs().max() <= theirs.abs().max() * 2**-8
    with masters.whole(ours):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(ours, plain, strict=True))
    entries = [entry for parameter in ours for entry in masters.state[parameter].values()]
    assert {entry.dtype for entry in entries if torch.is_tensor(entry)} == {torch.float32}


def test_micro_batches_are_added_up_in_fp32():
    parameter = torch.nn.Parameter(torch.zeros(1))
    masters = MasterWeights(torch.optim.SGD([parameter], lr=1.0), narrow=True)
    for _ in range(1000):  # in bf16 the sum stands still at 256
        parameter.sum().backward()
    assert parameter.grad.item() == 1000
    masters.step()
    assert parameter.item() == -1000


def test_an_optimizer_that_fails_within_a_step_is_noticed(monkeypatch):
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    masters = MasterWeights(torch.optim.SGD(parameters, lr=1.0), narrow=True)
    monkeypatch.setattr(masters.optimizers[0], "step", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        masters.step()
    assert masters.half_done
    assert all(parameter.dtype == torch.bfloat16 for parameter in parameters)


SMALL = ["optimizer.lr=1e-5", "schedule.name=constant", "schedule.warmup_steps=0", "max_steps=12", "samples.num=0"]


def test_a_full_run_in_bf16_learns_what_one_in_fp32_learns(tmp_path, words):
    """Steps of 1e-5 are far below what bf16 can add to a weight; the held-out gain is that of fp32 all the same."""
    gains = {}
    for dtype in ("bf16", "fp32"):
        path = run(tmp_path / dtype, words, *SMALL, "data.eval=0.2", f"model.dtype={dtype}", "max_steps=60")
        rows = figures(path)
        gains[dtype] = rows[0]["eval_loss"] - rows[-1]["eval_loss"]
    assert gains["fp32"] > 0
    assert gains["bf16"] == pytest.approx(gains["fp32"], rel=0.02)


def test_the_result_of_a_bf16_run_is_the_trained_fp32_weights_rounded_once_to_the_dtypes_of_the_base(
    tmp_path, words, model_dir
):
    from safetensors.torch import load_file, save_file

    base = tmp_path / "base"
    base.mkdir()
    for file in model_dir.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    weights = load_file(base / "model.safetensors")
    mixed = {name: tensor if "norm" in name else tensor.half() for name, tensor in weights.items()}
    save_file(mixed, base / "model.safetensors", metadata={"format": "pt"})
    path = run(tmp_path / "r", words, *SMALL, "model.dtype=bf16", f"model.path={base}")
    result = load_file(path / "model" / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in result.items()} == {name: t.dtype for name, t in mixed.items()}
    saved = tt_ckpt.TrainCheckpoint(path / "checkpoints").restore()
    for name, tensor in result.items():
        whole = join(saved.tensors["model"][name], saved.tensors["lost_bits"][name])
        assert torch.equal(tensor, whole.to(tensor.dtype))
    moved = [(result[name] != mixed[name]).float().mean() for name in result if "norm" in name]
    assert min(moved) > 0.99  # fp32 tensors keep what bf16 would have rounded away


@pytest.mark.parametrize("more", [["adapter.rank=4", "adapter.dtype=bf16"], ["adapter.rank=4", "adapter.dtype=bf16",
                                  "adapter.modules_to_save=[lm_head]"]])  # fmt: skip
def test_an_adapter_in_bf16_trains_in_fp32_too(tmp_path, words, more):
    path = run(
        tmp_path / "r", words, *SMALL, "model.dtype=bf16", "optimizer.lr=2e-5", "save_every=1", "keep_last=20", *more
    )
    checkpoints = tt_ckpt.TrainCheckpoint(path / "checkpoints")
    first, last = (checkpoints.restore(path / "checkpoints" / f"step-{step:06d}") for step in (1, 12))
    for name, lost in last.tensors["lost_bits"].items():
        moved = last.tensors["optimizer"][f"{name}/exp_avg"] != 0
        changed = (lost != first.tensors["lost_bits"][name])[moved]
        assert changed.float().mean() > 0.99, name


@pytest.mark.parametrize("more", [[], ["adapter.rank=4", "adapter.dtype=bf16"]])
def test_a_bf16_run_that_is_stopped_at_every_step_ends_in_the_same_bits(tmp_path, words, more):
    more = [*more, "model.dtype=bf16", "samples.num=0", "schedule.name=constant", "schedule.warmup_steps=0"]
    whole = run(tmp_path / "whole", words, *more, "max_steps=4")
    path = tmp_path / "cut"
    for step in range(1, 5):
        run(path, words, *more, f"max_steps={step}", resume="auto")
    (one, other) = (tt_ckpt.TrainCheckpoint(folder / "checkpoints").restore() for folder in (whole, path))
    for group, tensors in one.tensors.items():
        assert all(torch.equal(tensor, other.tensors[group][name]) for name, tensor in tensors.items())
    assert [row["loss"] for row in figures(path)] == [row["loss"] for row in figures(whole)]


def test_a_bf16_run_says_which_dtype_does_what(tmp_path, words):
    console = Silent()
    config = compose("sft", overrides=[*words, *SMALL, "model.dtype=bf16", f"output_dir={tmp_path / 'r'}"])
    path = sft.main(config, console=console)
    assert "forward pass in bf16, trained weights in fp32, result in fp32" in console.notes
    from tt_train.records.run_files import read_json

    assert read_json(path / "manifest.json")["precision"] == {"forward": "bf16", "trained": "fp32", "written": "fp32"}
    assert "bf16, trained in fp32, written in fp32" in (path / "report.html").read_text()


def test_memory_is_that_of_fp32_training(tmp_path, words):
    """Two bytes of the weight, two of what rounding lost, four of the gradient and eight of AdamW's state."""
    parameter = torch.nn.Parameter(torch.randn(1000))
    masters = MasterWeights(torch.optim.AdamW([parameter], fused=True), narrow=True)
    (parameter.sum()).backward()
    masters.step()
    state = sum(entry.nbytes for entry in masters.state[parameter].values() if entry.numel() > 1)
    assert (parameter.nbytes, masters.lost[parameter].nbytes, parameter.grad.nbytes, state) == (2000, 2000, 4000, 8000)


VERBS = {
    "checkpointed": ["activation_checkpointing=selective"],
    "every second block": ["activation_checkpointing=2"],
    "in backward": ["optimizer_in_backward=true", "max_grad_norm=null", "micro_batch_size=8"],
    "clipped in backward": [
        "optimizer_in_backward=true", "max_grad_norm_of=parameter", "max_grad_norm=1.0", "micro_batch_size=8",
    ],
    "8 bits": ["optimizer.name=adamw8bit"],
    "4 bits": ["optimizer.name=adamw4bit"],
    "fp8": ["optimizer.name=adamw_fp8"],
    "amsgrad": ["optimizer.options.amsgrad=true"],
    "8 bits in backward": [
        "optimizer.name=adamw8bit", "optimizer_in_backward=true", "max_grad_norm=null", "micro_batch_size=8",
    ],
}  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_what_trains_is_fp32_with_every_way_to_save_memory_and_resumes_to_the_same_bits(tmp_path, words, verb):
    """A step of 1e-5 moves the 16 bits that bf16 has no room for, in nearly every weight."""
    more = [*SMALL, *VERBS[verb], "model.dtype=bf16", "keep_last=9"]
    whole = run(tmp_path / "whole", words, *more, "save_every=1", "max_steps=3")
    checkpoints = tt_ckpt.TrainCheckpoint(whole / "checkpoints")
    first, last = (checkpoints.restore(whole / "checkpoints" / f"step-{step:06d}") for step in (1, 3))
    for name, lost in last.tensors["lost_bits"].items():
        if "embed_tokens" not in name:  # rows of tokens that do not occur stay
            assert (lost != first.tensors["lost_bits"][name]).float().mean() > 0.95, name
    path = tmp_path / "cut"
    for step in (1, 3):
        run(path, words, *more, f"max_steps={step}", resume="auto")
    cut = tt_ckpt.TrainCheckpoint(path / "checkpoints").restore()
    for group, tensors in last.tensors.items():
        assert all(torch.equal(tensor, cut.tensors[group][name]) for name, tensor in tensors.items())


def test_offloaded_activations_leave_trained_weights_in_fp32(words):
    from tt_train.build import build_optimizer, load_model
    from tt_train.job import assemble
    from tt_train.memory import offload_activations_

    job = assemble(compose("sft", overrides=[*words, "model.dtype=bf16"]))
    model = load_model(job)
    offload_activations_(model)
    optimizer = build_optimizer(job, model)
    model(torch.tensor([[3, 4, 5]])).float().sum().backward()
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}
    assert len(optimizer.lost) == len(list(model.parameters()))
