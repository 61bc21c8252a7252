"""Optimizers against torch's."""

import pytest
import torch

from tt_train import ConfigError, compose
from tt_train.config import OptimizerSection
from tt_train.optim import (
    decayed,
    load_optimizer_tensors_,
    make_optimizer,
    optimizer_tensors,
    set_learning_rate,
)


@pytest.mark.parametrize(
    ("section", "reference"),
    [
        (
            OptimizerSection(name="adamw", lr=0.1, weight_decay=0.3, betas=(0.5, 0.7), eps=1e-3),
            lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.3, betas=(0.5, 0.7), eps=1e-3),
        ),
        (
            OptimizerSection(name="sgd", lr=0.1, weight_decay=0.3, momentum=0.5),
            lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.3, momentum=0.5),
        ),
        (OptimizerSection(name="rmsprop", lr=0.1), lambda p: torch.optim.RMSprop(p, lr=0.1, weight_decay=0.01)),
    ],
)
def test_optimizers_are_torchs_with_every_argument(section, reference):
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 8)) for _ in range(2))
    first, second = make_optimizer([{"params": [ours]}], section), reference([theirs])
    for step in range(5):
        for parameter in (ours, theirs):
            parameter.grad = torch.cos(parameter.detach() * (step + 1))
        first.step()
        second.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_an_argument_that_the_optimizer_lacks_is_refused():
    parameter = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ConfigError, match=r"optimizer\.momentum: adamw has no momentum"):
        make_optimizer([{"params": [parameter]}], OptimizerSection(name="adamw", momentum=0.9))


def test_a_group_scales_its_rate():
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:], "lr_scale": 16.0}], lr=1.0)
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 8.0]


def test_state_goes_out_and_in_exactly():
    def trained(steps, state=None, start=None):
        parameter = torch.nn.Parameter(torch.ones(4) if start is None else start.clone())
        optimizer = make_optimizer([{"params": [parameter]}], OptimizerSection(lr=0.1))
        if state:
            load_optimizer_tensors_(optimizer, state, {parameter: "w"})
        for _ in range(steps):
            parameter.grad = torch.sin(parameter.detach() + torch.arange(4))
            optimizer.step()
        return parameter.detach(), optimizer_tensors(optimizer, {parameter: "w"})

    whole, _ = trained(6)
    half, state = trained(3)
    assert set(state) == {"w/step", "w/exp_avg", "w/exp_avg_sq"}
    resumed, _ = trained(3, {key: value.clone() for key, value in state.items()}, half)
    assert torch.equal(whole, resumed)
    with pytest.raises(ValueError, match="'v', which this run does not train"):
        load_optimizer_tensors_(torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]), {"v/step": torch.ones(())}, {})


@pytest.mark.parametrize("narrow", [False, True])
def test_matrices_decay_and_vectors_do_not(narrow):
    matrix, vector = torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(3))
    section = OptimizerSection(lr=0.1, weight_decay=0.5)
    optimizer = make_optimizer(decayed([vector, matrix]), section, narrow=narrow)
    matrix.grad, vector.grad = torch.zeros(3, 2), torch.zeros(3)
    optimizer.step()
    assert torch.equal(vector, torch.ones_like(vector))
    torch.testing.assert_close(matrix.float(), torch.full((3, 2), 0.95), rtol=2**-8, atol=0)


DORA = ["adapter.rank=2", "adapter.use_dora=true"]


@pytest.mark.parametrize("more", [[], DORA, [*DORA, "adapter.lora_plus_ratio=4"]])
def test_what_a_run_decays(words, more):
    from tt_train.build import load_model, trainable_groups
    from tt_train.job import assemble

    job = assemble(compose("sft", overrides=[*words, *more]))
    model = load_model(job)
    groups = trainable_groups(job, model)
    decay = {id(p): group.get("weight_decay", 0.01) for group in groups for p in group["params"]}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(decay) == len(trained)
    assert all((decay[id(parameter)] > 0) == (parameter.dim() > 1) for parameter in trained)
    assert {parameter.dim() for parameter in trained} == {1, 2}
