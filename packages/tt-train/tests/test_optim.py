"""Optimizers against torch's."""

import copy
import pickle

import pytest
import torch

from tt_train import ConfigError, TrainingError, compose
from tt_train.config import OptimizerSection
from tt_train.inputs import components
from tt_train.optim.optimizers import decayed, make_optimizer, set_learning_rate
from tt_train.optim.state import load_optimizer_tensors_, optimizer_tensors, state_bytes


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
        (
            OptimizerSection(name="adamw", lr=0.1, weight_decay=0.0, options={"amsgrad": True}),
            lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.0, amsgrad=True),
        ),
        (
            OptimizerSection(name="sgd", lr=0.1, momentum=0.5, options={"nesterov": True}),
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5, weight_decay=0.01, nesterov=True),
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


@pytest.mark.parametrize("name", ["adamw", "sgd", "adagrad", "rmsprop", "muon"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda given: pickle.loads(pickle.dumps(given))])
def test_a_copy_of_an_optimizer_makes_the_steps_that_the_optimizer_makes(name, copied):
    parameter = torch.nn.Parameter(torch.randn(4, 3))
    optimizer = make_optimizer(decayed([parameter]), OptimizerSection(name=name, lr=0.1))
    parameter.grad = torch.ones(4, 3)
    optimizer.step()
    its, other = copied((parameter, optimizer))
    for weight, each in ((parameter, optimizer), (its, other)):
        weight.grad = torch.arange(12.0).view(4, 3)
        each.step()
    assert torch.equal(its, parameter)
    assert type(other.optimizers[0]) is type(optimizer.optimizers[0])


def test_a_state_that_an_optimizer_begins_with_is_fp32_for_a_bf16_weight():
    parameter = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    optimizer = make_optimizer(decayed([parameter]), OptimizerSection(name="adagrad", lr=0.5))
    parameter.grad = torch.ones(3)
    optimizer.step()  # torch's fused kernel refuses a sum in bf16
    assert optimizer.state[parameter]["sum"].dtype == torch.float32
    assert parameter.eq(-0.5).all()


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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["optimizer.options.amsgrd=true"],
            "optimizer.options.amsgrd: adamw has no such argument; did you mean 'amsgrad'",
        ),
        (["optimizer.options.lr=1"], "optimizer.options.lr: write optimizer.lr"),
        (["optimizer.options.params=1"], "optimizer.options.params: adamw has no such argument; it takes amsgrad"),
        (["optimizer.name=sgd", "optimizer.options.nesterov=true"], "Nesterov momentum requires a momentum"),
        (["optimizer.name=adamw_8bit"], "did you mean 'adamw8bit'?"),
        (["optimizer.name=adamw8bit", "optimizer.momentum=0.9"], "optimizer.momentum: adamw8bit has no momentum"),
        (
            ["optimizer.name=adamw8bit", "optimizer.options={is_paged: true}"],
            "is_paged: adamw8bit has no such argument",
        ),
        (
            ["optimizer.options={fused: true, foreach: true}"],
            "optimizer.options: adamw cannot be made of these values: `fused` and `foreach` cannot be `True` together",
        ),
        (["optimizer.options={fused: sometimes}"], "optimizer.options.fused: expected true or false, got 'sometimes'"),
        (["optimizer.options={amsgrad: 7}"], "optimizer.options.amsgrad: expected true or false, got 7"),
    ],
)
def test_an_option_that_the_optimizer_does_not_take_is_refused_before_weights_load(words, said):
    try:
        config = compose("sft", overrides=["model.path=m", "data.train=d", *words])
        found = components.mistakes(config, torch.device("cpu"))
    except ConfigError as error:
        found = error.problems
    assert len(found) == 1
    assert said in found[0]


def test_an_optimizer_that_cannot_make_a_step_is_refused_before_weights_load(monkeypatch):
    class Closure(torch.optim.LBFGS):
        """torch's own, whose step needs a closure."""

        def __init__(self, params, lr, weight_decay=0.0):
            super().__init__(params, lr=lr)

    monkeypatch.setattr("tt_train.optim.optimizers.resolve", lambda name, known: Closure)
    config = compose("sft", overrides=["model.path=m", "data.train=d", "adapter.rank=2"])
    (line,) = components.mistakes(config, torch.device("cpu"))
    assert "cannot make a step on cpu" in line
    assert "closure" in line


@pytest.mark.parametrize("error", [RuntimeError("not built"), KeyError("three"), AssertionError()])
def test_whatever_the_constructor_of_an_optimizer_raises_is_a_mistake_in_the_config(monkeypatch, error):
    class Picky(torch.optim.SGD):
        def __init__(self, params, lr, weight_decay=0.0, power=1):
            raise error

    monkeypatch.setattr("tt_train.optim.optimizers.resolve", lambda name, known: Picky)
    config = compose("sft", overrides=["model.path=m", "data.train=d", "optimizer.options={power: 2}"])
    (line,) = components.mistakes(config, torch.device("cpu"))
    assert line.startswith("optimizer.options: adamw cannot be made of these values: ")
    assert str(error) in line
    assert type(error).__name__ in line or "not built" in line


def test_an_optimizer_of_matrices_alone_is_for_an_adapter_and_is_refused_for_norms_before_weights_load(monkeypatch):
    class Matrices(torch.optim.SGD):
        def __init__(self, params, lr, weight_decay=0.0):
            super().__init__(params, lr=lr)
            if any(parameter.dim() != 2 for group in self.param_groups for parameter in group["params"]):
                raise ValueError("only 2D parameters")

    monkeypatch.setattr("tt_train.optim.optimizers.resolve", lambda name, known: Matrices)
    for adapter, found in (["adapter.rank=2"], 0), ([], 1), (["adapter.rank=2", "adapter.use_dora=true"], 1):
        config = compose("sft", overrides=["model.path=m", "data.train=d", *adapter])
        lines = components.mistakes(config, torch.device("cpu"))
        assert len(lines) == found
        assert all("only 2D parameters" in line for line in lines)


def test_an_option_that_torchs_fused_kernel_does_not_have_is_used_without_it():
    parameter = torch.nn.Parameter(torch.ones(2))
    section = OptimizerSection(options={"foreach": True})
    optimizer = make_optimizer([{"params": [parameter]}], section)
    (group,) = optimizer.param_groups
    assert (group["fused"], group["foreach"]) == (None, True)


class Counts(torch.optim.Optimizer):
    """Keeps a number per parameter, and another per group, as optimizers outside of torch do."""

    def __init__(self, params, lr, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "k": 0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["k"] += 1
            for parameter in group["params"]:
                state = self.state[parameter]
                state["seen"] = state.get("seen", 0) + 1
                state["mean"] = state.get("mean", torch.zeros(2)) + float(parameter.grad.mean())
                parameter.add_(state["mean"].mean() * state["seen"], alpha=-group["lr"] / group["k"])


@pytest.mark.parametrize("in_backward", [False, True])
def test_numbers_that_an_optimizer_keeps_per_parameter_and_per_group_are_restored(monkeypatch, in_backward):
    monkeypatch.setattr("tt_train.optim.optimizers.resolve", lambda name, known: Counts)

    def trained(steps, state=None, start=None):
        parameters = [torch.nn.Parameter(torch.ones(4) * (i + 1) if start is None else start[i]) for i in range(2)]
        optimizer = make_optimizer(
            [{"params": parameters}], OptimizerSection(name="x.Y", lr=0.1), in_backward=in_backward
        )
        names = {parameter: f"w{index}" for index, parameter in enumerate(parameters)}
        load_optimizer_tensors_(optimizer, state or {}, names)
        for _ in range(steps):
            loss = sum(torch.sin(parameter).sum() for parameter in parameters)
            if in_backward:
                with optimizer.updating(1.0, None):
                    loss.backward()
            else:
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        return [p.detach().clone() for p in parameters], optimizer_tensors(optimizer, names)

    whole, _ = trained(5)
    half, state = trained(2)
    assert {"w0/seen#", "w0/mean", "w0/group:k#"} <= set(state)
    resumed, _ = trained(3, state, half)
    assert all(torch.equal(*pair) for pair in zip(whole, resumed, strict=True))


def test_state_that_no_checkpoint_holds_is_an_error_and_not_left_out():
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    optimizer.state[parameter]["history"] = [1, 2]
    with pytest.raises(TrainingError, match="keeps 'history' as a list"):
        optimizer_tensors(optimizer, {parameter: "w"})


LOW_BIT = {"adamw8bit": 2.1, "adamw4bit": 1.1, "adamw_fp8": 2.1}  # bytes per weight of a large matrix, at most


@pytest.mark.parametrize("name", LOW_BIT)
def test_a_small_state_is_small_and_goes_out_as_plain_tensors_and_in_exactly(name):
    shapes = {"matrix": (64, 128), "odd": (5, 7), "vector": (96,)}

    def trained(steps, state=None, start=None):
        torch.manual_seed(0)
        parameters = {key: torch.nn.Parameter(torch.randn(shape)) for key, shape in shapes.items()}
        optimizer = make_optimizer(decayed(parameters.values()), OptimizerSection(name=name, lr=0.1), narrow=True)
        names = {parameter: key for key, parameter in parameters.items()}
        for key, parameter in parameters.items() if start else ():
            parameter.data, optimizer.lost[parameter] = start[0][key].clone(), start[1][key].clone()
        load_optimizer_tensors_(optimizer, state or {}, names)
        for step in range(steps):
            set_learning_rate(optimizer, 0.1 / (step + 1 + 3 * (state is not None)))
            for index, parameter in enumerate(parameters.values()):
                parameter.grad = torch.sin(parameter.detach().float() * 9 + index)
            optimizer.step()
        weights = {key: parameter.detach() for key, parameter in parameters.items()}
        lost = {key: optimizer.lost[parameter] for key, parameter in parameters.items()}
        return (weights, lost), optimizer_tensors(optimizer, names), optimizer

    whole, _, optimizer = trained(6)
    half, state, _ = trained(3)
    assert all(type(tensor) is torch.Tensor for tensor in state.values())
    assert "matrix/exp_avg.codes" in state
    assert state["odd/exp_avg"].dtype == torch.float32  # below 4096 values
    large = sum(tensor.nbytes for key, tensor in state.items() if key.startswith("matrix/") and "qmap" not in key)
    assert large <= LOW_BIT[name] * 64 * 128
    assert state_bytes(optimizer) == sum(tensor.nbytes for tensor in state.values())
    resumed, *_ = trained(3, {key: value.clone() for key, value in state.items()}, half)
    for mine, theirs in zip(resumed, whole, strict=True):
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in mine.items())


LEARNS = {"adamw": 0.01, "adamw8bit": 0.01, "adamw_fp8": 0.01, "adamw4bit": 0.3}


@pytest.mark.parametrize(("name", "most"), LEARNS.items())
def test_an_optimizer_with_a_small_state_learns(name, most):
    """The distance to the target begins at 1; a state of 4 bits is coarse."""
    target = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    parameter = torch.nn.Parameter(torch.zeros(64, 128))
    optimizer = make_optimizer([{"params": [parameter]}], OptimizerSection(name=name, lr=0.05, weight_decay=0.0))
    for _ in range(60):
        (parameter - target).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float((parameter.detach() - target).square().mean()) < most


def test_a_damaged_state_is_named_and_not_copied():
    parameter = torch.nn.Parameter(torch.zeros(64, 128))
    optimizer = make_optimizer([{"params": [parameter]}], OptimizerSection(name="adamw8bit"))
    parameter.grad = torch.ones(64, 128)
    optimizer.step()
    good = optimizer_tensors(optimizer, {parameter: "w"})
    for bad, said in [
        ({**good, "w/exp_avg.codes": torch.zeros(4, dtype=torch.uint8)}, "'exp_avg.codes' of w has shape"),
        ({**good, "w/exp_avg.codes": good["w/exp_avg.codes"].float()}, "torch.float32"),
        ({key: value for key, value in good.items() if key != "w/exp_avg.scale"}, "'exp_avg.scale' of w is missing"),
        ({**good, "w/evil": torch.zeros(1)}, "'evil' of w is not one that this optimizer keeps"),
    ]:
        with pytest.raises(ValueError, match=said):
            load_optimizer_tensors_(optimizer, bad, {parameter: "w"})


# ---- a small state under shards --------------------------------------------------------------------------------------

SHAPES = {
    "even": (64, 256),
    "uneven": (63, 256),
    "small": (7, 3),
    "vector": (96,),
    "fp32 as shards": (128, 100),
}  # fmt: skip  (50 blocks; a third of it is not whole blocks, so it has none)


def small_state_steps(name, steps, *, placement=None, state=None, weights=None):
    """Weights and state after some steps on gradients that are known, by shards of a mesh or whole."""
    from torch.distributed.tensor import Shard, distribute_tensor

    def laid(tensor):
        return tensor if placement is None else distribute_tensor(tensor, placement, [Shard(0)])

    torch.manual_seed(0)
    start = {key: torch.randn(shape) for key, shape in SHAPES.items()}
    parameters = {key: torch.nn.Parameter(laid((weights or start)[key].clone())) for key in SHAPES}
    optimizer = make_optimizer([{"params": list(parameters.values())}], OptimizerSection(name=name, lr=0.1))
    names = {parameter: key for key, parameter in parameters.items()}
    if state:
        load_optimizer_tensors_(optimizer, state, names)
    for step in steps:
        set_learning_rate(optimizer, 0.1 / (step + 1))
        for index, parameter in enumerate(parameters.values()):
            numbers = torch.arange(parameter.numel()).view(parameter.shape)
            parameter.grad = laid(torch.sin(numbers * (step + 3.0) + index))
        optimizer.step()
    whole = {key: parameter.detach() if placement is None else parameter.detach().full_tensor()
             for key, parameter in parameters.items()}  # fmt: skip
    return whole, optimizer_tensors(optimizer, names)


def compare_small_states(name, folder):
    """On 3 ranks: shards against the whole, a stop in between, and other numbers of ranks in both directions."""
    import torch.distributed as dist
    from torch.distributed.tensor import init_device_mesh

    import tt_ckpt

    mesh = init_device_mesh("cpu", (3,))
    expected, _ = small_state_steps(name, range(6))
    found, _ = small_state_steps(name, range(6), placement=mesh)
    precise, _ = small_state_steps("adamw", range(6))
    torch.testing.assert_close(found.pop("fp32 as shards"), precise["fp32 as shards"], rtol=1e-5, atol=1e-5)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())
    half, parts = small_state_steps(name, range(3), placement=mesh)
    assert all(type(tensor) is torch.Tensor for tensor in parts.values())
    checkpoint = tt_ckpt.TrainCheckpoint(folder / name)
    checkpoint.save(3, tensors={"optimizer": parts}, state={})
    saved = dict(checkpoint.restore().tensors["optimizer"])
    assert {"even/exp_avg[0:22].codes", "fp32 as shards/exp_avg[43:86]"} <= saved.keys()
    again, _ = small_state_steps(name, range(3, 6), placement=mesh, state=saved, weights=half)
    one, _ = small_state_steps(name, range(3, 6), state=saved, weights=half)
    whole_half, whole_state = small_state_steps(name, range(3))
    three, _ = small_state_steps(name, range(3, 6), placement=mesh, state=whole_state, weights=whole_half)
    for key, tensor in found.items():
        assert torch.equal(again[key], tensor), key
        assert torch.equal(one[key], tensor), key
        assert torch.equal(three[key], tensor), key
    fourth, _ = small_state_steps(name, [3], placement=mesh, state=whole_state, weights=whole_half)
    torch.testing.assert_close(fourth, small_state_steps(name, range(4))[0], rtol=1e-6, atol=1e-6)
    if dist.get_rank() == 0:
        part = {key: value for key, value in saved.items() if "[0:22]" not in key}
        with pytest.raises(ValueError, match="which are not all of 64"):
            small_state_steps(name, [], state=part)


@pytest.mark.parametrize("name", LOW_BIT)
def test_a_small_state_under_shards_is_that_of_one_process_and_continues_in_any_world(name, ranks, tmp_path):
    ranks(3, compare_small_states, name, tmp_path)
