"""An optimizer that updates each parameter during the backward pass makes the steps of one that waits for its end."""

import copy

import pytest
import torch

import tt_ckpt
from tt_train import ConfigError, TrainingError, compose
from tt_train.inputs.model import Processes
from tt_train.job import assemble, look_over
from tt_train.losses.cross_entropy import Summed
from tt_train.optim.master_weights import InBackward, MasterWeights
from tt_train.recipes import sft
from tt_train.records.run_files import read_rows
from tt_train.run.console import Console
from tt_train.step import train_step

BACKWARD = ["optimizer_in_backward=true", "max_grad_norm=null", "micro_batch_size=8"]


class Silent(Console):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)

    warn = note


def run(path, words, *more, **kwargs):
    config = compose("sft", overrides=[*words, "samples.num=0", f"output_dir={path}", *more])
    return sft.main(config, console=Silent(), **kwargs)


def saved(path):
    return tt_ckpt.TrainCheckpoint(path / "checkpoints").restore()


def assert_same_bits(one, other):
    for group, tensors in one.tensors.items():
        assert list(tensors) == list(other.tensors[group])
        for name, tensor in tensors.items():
            assert torch.equal(tensor, other.tensors[group][name]), name


class Net(torch.nn.Module):
    """Two layers, of which the first is used twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)

    def forward(self, x):
        return self.second(self.first(torch.tanh(self.first(x))))


def squares(model, batch):
    error = model(batch["x"]) - batch["y"]
    return Summed(error.square().sum(), len(error), len(error))


def batch(step=0):
    generator = torch.Generator().manual_seed(step)
    return {"x": torch.randn(6, 4, generator=generator), "y": torch.randn(6, 2, generator=generator)}


def in_backward(model, make, **more):
    return InBackward(*(make([parameter]) for parameter in model.parameters()), **more)


MAKE = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.05, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=0.05),
    "nadam": lambda parameters: torch.optim.NAdam(parameters, lr=0.05),
}


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@pytest.mark.parametrize("narrow", [False, True])
def test_any_optimizer_ends_in_the_same_bits(make, narrow):
    after, during = Net(), Net()
    waits, hurries = MasterWeights(make(after.parameters()), narrow=narrow), in_backward(during, make, narrow=narrow)
    for step in range(5):
        rows = {key: value.to(torch.bfloat16 if narrow else torch.float32) for key, value in batch(step).items()}
        results = [train_step(after, [rows], squares, waits), train_step(during, [rows], squares, hurries)]
        assert results[0].loss == results[1].loss
        assert results[0].grad_norm == pytest.approx(results[1].grad_norm, rel=1e-5)
    for mine, theirs in zip(during.parameters(), after.parameters(), strict=True):
        assert mine.dtype == (torch.bfloat16 if narrow else torch.float32)
        assert torch.equal(mine, theirs)
    with waits.whole(waits.lost), hurries.whole(hurries.lost):
        assert all(torch.equal(*pair) for pair in zip(after.parameters(), during.parameters(), strict=True))


def test_a_gradient_is_gone_before_the_next_is_complete():
    model, alive = Net(), []
    optimizer = in_backward(model, MAKE["adamw"])
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad is not None for p in model.parameters()))
        )
    train_step(model, [batch()], squares, optimizer)
    assert alive == [0] * 4


def test_a_step_is_counted_once():
    model = Net()
    optimizer = in_backward(model, MAKE["adamw"])
    for step in range(3):
        train_step(model, [batch(step)], squares, optimizer)
    assert {int(entries["step"]) for entries in optimizer.state.values()} == {3}
    assert optimizer.updates == 3


def test_a_step_of_several_micro_batches_is_refused():
    model = Net()
    with pytest.raises(ValueError, match="unpack"):
        train_step(model, [batch(), batch(1)], squares, in_backward(model, MAKE["sgd"]))


@pytest.mark.parametrize("bound", [0.01, 1e9])
def test_each_parameter_is_clipped_by_its_own_norm(bound):
    model, reference = Net(), Net()
    optimizer = in_backward(model, MAKE["sgd"])
    theirs = MAKE["sgd"](reference.parameters())
    for step in range(3):
        train_step(model, [batch(step)], squares, optimizer, max_grad_norm=bound)
        total, count, *_ = squares(reference, batch(step))
        (total / count).backward()
        for parameter in reference.parameters():
            torch.nn.utils.clip_grad_norm_([parameter], bound)
        theirs.step()
        theirs.zero_grad()
    for mine, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)


def test_a_loss_that_is_not_finite_updates_nothing():
    model = Net()
    before, optimizer = copy.deepcopy(model.state_dict()), in_backward(model, MAKE["adamw"])
    rows = batch()
    rows["y"][0, 0] = float("inf")
    result = train_step(model, [rows], squares, optimizer)
    assert (result.outcome, result.half_done, optimizer.half_done) == ("not_finite", False, False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not optimizer.state


def spoiled(name):
    """The loss of ``squares``, and a gradient of ``name`` that is not finite."""

    def objective(model, batch):
        part = squares(model, batch)
        handle = model.get_parameter(name).register_hook(lambda gradient: gradient * float("nan"))
        spoiled.handles.append(handle)
        return part

    return objective


spoiled.handles = []


@pytest.mark.parametrize("name", ["first.weight", "first.bias", "second.weight", "second.bias"])
def test_a_gradient_that_is_not_finite_stops_the_updates_there_and_a_half_step_is_known_as_one(name):
    model = Net()
    before, optimizer = copy.deepcopy(model.state_dict()), in_backward(model, MAKE["adamw"])
    order = []
    for key, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, key=key: order.append(key))
    result = train_step(model, [batch()], spoiled(name), optimizer)
    for handle in spoiled.handles:
        handle.remove()
    assert (result.outcome, result.first_nonfinite) == ("not_finite", name)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == set(order[: order.index(name)])
    assert result.half_done == optimizer.half_done == bool(changed)
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_objective_of_no_trained_parameter_is_refused():
    model, other = Net(), Net()
    with pytest.raises(TrainingError, match="depends on no trained parameter"):
        train_step(model, [batch()], lambda _, rows: squares(other, rows), in_backward(model, MAKE["sgd"]))


# ---- in a run ----


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("adapter", [[], ["adapter.rank=4", "adapter.dtype=bf16"]])
def test_a_run_ends_in_the_bits_of_one_that_waits_and_resumes_from_it_and_the_other_way_round(
    tmp_path, words, dtype, adapter
):
    common = [*adapter, f"model.dtype={dtype}", "micro_batch_size=8", "max_grad_norm=null", "schedule.name=constant"]
    now, later = "optimizer_in_backward=true", "optimizer_in_backward=false"
    waits = run(tmp_path / "waits", words, *common, "max_steps=4")
    hurries = run(tmp_path / "hurries", words, *common, "max_steps=4", now)
    assert_same_bits(saved(hurries), saved(waits))
    for first, second in ((now, now), (now, later), (later, now)):
        path = tmp_path / f"{first[-5:]}{second[-5:]}"
        run(path, words, *common, "max_steps=2", first)
        run(path, words, *common, "max_steps=4", second, resume="auto")
        assert_same_bits(saved(path), saved(waits))
    losses = [[row["loss"] for row in read_rows(path / "metrics.jsonl")] for path in (waits, hurries)]
    assert losses[0] == losses[1]


def test_a_run_that_stops_within_a_step_saves_no_checkpoint_of_it(tmp_path, words, monkeypatch):
    import tt_train.build

    original = tt_train.build.load_model

    def loaded(job):
        model, calls = original(job), []

        def hook(gradient):
            calls.append(1)
            return gradient * float("nan") if len(calls) == 3 else gradient

        model.model.embed_tokens.weight.register_hook(hook)
        return model

    monkeypatch.setattr(sft, "load_model", loaded)
    with pytest.raises(TrainingError, match="some weights were updated before") as caught:
        run(tmp_path / "r", words, *BACKWARD, "save_every=2", "keep_last=4")
    assert "model.embed_tokens.weight" in str(caught.value)
    assert "step-000002; continue from there" in caught.value.__notes__[0]
    assert sorted(path.name for path in (tmp_path / "r" / "checkpoints").glob("step-*")) == ["step-000002"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["micro_batch_size=4"], "batch_size 8 is accumulated over micro-batches of 4"),
        (["max_grad_norm=1.0"], "set max_grad_norm_of=parameter to clip each parameter's gradient by its own norm"),
        (["on_nonfinite=skip"], "the step cannot be skipped; set on_nonfinite=stop"),
        (["optimizer_in_backward=false", "max_grad_norm_of=parameter"], "parameter is for optimizer_in_backward"),
        (["max_grad_norm_of=layer"], "max_grad_norm_of: expected one of model, parameter"),
    ],
)
def test_what_an_update_in_the_backward_pass_cannot_do_is_refused_before_weights_load(words, more, said):
    with pytest.raises(ConfigError) as caught:
        assemble(compose("sft", overrides=[*words, *BACKWARD, *more]))
    assert said in str(caught.value)


def test_what_the_launcher_of_several_ranks_refuses_is_counted_for_all_of_them(words):
    config = compose("sft", overrides=[*words, *BACKWARD, "micro_batch_size=4", "adapter.rank=2"])
    look_over(config, processes=Processes(2, 2))  # one micro-batch on each
    assemble(config, elsewhere=2)  # of tt plan --nproc 2
    with pytest.raises(ConfigError, match="set micro_batch_size=8 or batch_size=4"):
        look_over(config)
    offload = compose("sft", overrides=[*words, "adapter.rank=2", "parallel.cpu_offload=true"])
    with pytest.raises(ConfigError, match="offloads shards, and nothing is sharded"):
        look_over(offload, processes=Processes(2, 2))
