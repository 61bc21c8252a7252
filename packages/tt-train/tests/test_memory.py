"""Ways to save memory change no number of a run: each trajectory is that of the plain run."""

import pytest
import torch

import tt_ckpt
import tt_models
from tt_train import ConfigError, compose, memory
from tt_train.build import build_optimizer, load_model, make_objective
from tt_train.job import assemble
from tt_train.memory import checkpoint_activations_, compile_, offload_activations_
from tt_train.recipes import sft
from tt_train.records.run_files import read_rows
from tt_train.run.console import Console
from tt_train.step import train_step

CONFIG = {
    "model_type": "llama", "vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True, "initializer_range": 0.05,
    "hidden_act": "silu", "attention_dropout": 0.0,
}  # fmt: skip
MODES = [True, "full", 2, 3, "selective"]


class Silent(Console):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def decoder(**more):
    torch.manual_seed(1)
    return tt_models.build(tt_models.config_from_hf(CONFIG | more)).train()


def adapted(**more):
    """The same with an adapter whose dropout changes every pass."""
    import tt_peft

    model = decoder(**more)
    config = tt_peft.LoRAConfig(rank=4, dropout=0.5, target_modules="all-linear")
    tt_peft.apply_lora_(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def gradients(model, *, seq_len=20, position_ids=None):
    torch.manual_seed(2)
    ids = torch.randint(0, 90, (2, seq_len))
    torch.manual_seed(3)  # of the dropout
    model(ids, position_ids).float().square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert ours
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-6, atol=1e-7 * float(gradient.abs().max()), msg=name)


def attention_calls(model, action):
    """How often the kernel of attention runs inside ``action(model)``."""
    from torch.utils._python_dispatch import TorchDispatchMode

    calls = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            calls.append(op in memory._ATTENTION)
            return op(*args, **(kwargs or {}))

    with Count():
        action(model)
    return sum(calls)


# ---- checkpointing ----


@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("make", [decoder, adapted])
def test_gradients_with_checkpointing_are_those_without_dropout_included(make, how):
    model = make()
    checkpoint_activations_(model, how)
    assert_same(gradients(model), gradients(make()))


@pytest.mark.parametrize("how", MODES)
def test_checkpointing_that_is_asked_for_is_done_and_every_block_is_recomputed_once(how):
    model, forwards = decoder(), []
    for index, block in enumerate(model.model.layers):
        block.mlp.register_forward_pre_hook(lambda *_, index=index: forwards.append(index))
    checkpoint_activations_(model, how)
    gradients(model)
    recomputed = {index for index in range(5) if forwards.count(index) == 2}
    assert len(forwards) == 5 + len(recomputed)
    assert recomputed == set(range(0, 5, how if how in (2, 3) and how is not True else 1))


@pytest.mark.parametrize(("how", "calls"), [(False, 5), ("full", 10), (2, 8), ("selective", 5)])
def test_selective_checkpointing_keeps_what_attention_gives(how, calls):
    model = decoder()
    if how:
        checkpoint_activations_(model, how)
    assert attention_calls(model, gradients) == calls


@pytest.mark.parametrize(("tiles", "calls"), [(True, 5), (False, 5 * 2 * 2)])
def test_selective_checkpointing_keeps_the_attention_of_packed_documents(tiles, calls, monkeypatch):
    from tt_models.cpu import attention

    monkeypatch.setattr(attention, "FASTER_IN", {torch.float32} if tiles else set())
    monkeypatch.setattr(attention, "WORTH", 1)
    model, plain = decoder(), decoder()
    checkpoint_activations_(model, "selective")
    positions = torch.cat([torch.arange(12), torch.arange(58)]).expand(2, -1)

    def step(model):
        return gradients(model, seq_len=70, position_ids=positions)

    assert attention_calls(model, step) == attention_calls(plain, step) == calls
    assert_same(step(model), step(plain))


@pytest.mark.parametrize("how", MODES)
def test_a_checkpointed_model_evaluates_and_generates_as_before(how):
    model, plain = decoder().eval(), decoder().eval()
    checkpoint_activations_(model, how)
    ids = torch.tensor([[3, 4, 5]])
    ours, theirs = (tt_models.generate(one, ids, max_new_tokens=5, temperature=0.0) for one in (model, plain))
    assert torch.equal(ours, theirs)
    assert list(model.state_dict()) == list(plain.state_dict())


# ---- offloading ----


class Counting(memory.Offload):
    SMALLEST = 0

    def __init__(self):
        super().__init__()
        self.taken = []

    def pack(self, tensor):
        packed = super().pack(tensor)
        if isinstance(packed, tuple):
            self.taken.append(packed[1])
        return packed


@pytest.mark.parametrize("how", [False, *MODES])
@pytest.mark.parametrize("make", [decoder, adapted])
def test_gradients_with_offloading_are_those_without_and_weights_stay(make, how, monkeypatch):
    monkeypatch.setattr(memory, "Offload", Counting)
    model = make()
    if how:
        checkpoint_activations_(model, how)
    offload_activations_(model)
    assert_same(gradients(model), gradients(make()))
    taken, shapes = model.model.forward.args[0].taken, {tuple(parameter.shape) for parameter in model.parameters()}
    shapes |= {shape[::-1] for shape in shapes}
    assert taken
    assert not [tensor for tensor in taken if tensor.is_floating_point() and tuple(tensor.shape) in shapes]


@pytest.mark.parametrize("how", ["full", 2])
def test_offloading_takes_the_inputs_of_checkpointed_blocks_and_nothing_inside_of_them(how, monkeypatch):
    monkeypatch.setattr(memory, "Offload", Counting)
    plain, model = decoder(), decoder()
    checkpoint_activations_(model, how)
    for one in (plain, model):
        offload_activations_(one)
        gradients(one)
    taken, every = (sum(tensor.nbytes for tensor in one.model.forward.args[0].taken) for one in (model, plain))
    inputs = 2 * 20 * 32 * 4
    outside = 4 * inputs  # of the embedding, the formula of the final norm and the position tables, at most
    inside = every // 5
    blocks = 5 * inputs if how == "full" else 3 * inputs + 2 * inside
    assert blocks <= taken <= blocks + outside


def test_offloading_on_the_cpu_has_no_effect_and_says_so(words):
    job = assemble(compose("sft", overrides=[*words, "activation_offloading=true"]))
    assert "activation_offloading: has no effect on the CPU, where all activations are already" in job.notes
    assert "_offloaded" not in repr(load_model(job).model.forward)


@pytest.mark.gpu
def test_offloading_on_a_gpu_changes_no_gradient_and_leaves_no_memory_behind():
    def train(offload):
        model = decoder(hidden_size=256, intermediate_size=512, head_dim=64, num_hidden_layers=8).cuda()
        if offload:
            offload_activations_(model)
        ids = torch.randint(0, 90, (8, 64), generator=torch.Generator().manual_seed(0)).cuda()
        torch.cuda.empty_cache()
        start, peaks, after = torch.cuda.memory_allocated(), [], []
        for _ in range(6):
            torch.cuda.reset_peak_memory_stats()
            model.zero_grad(set_to_none=True)
            model(ids).float().square().sum().backward()
            torch.cuda.synchronize()
            peaks.append(torch.cuda.max_memory_allocated() - start)
            after.append(torch.cuda.memory_allocated() - start)
        return {name: p.grad.clone() for name, p in model.named_parameters()}, peaks, after

    ours, peaks, after = train(offload=True)
    theirs, plain_peaks, _ = train(offload=False)
    assert all(torch.equal(gradient, theirs[name]) for name, gradient in ours.items())
    assert max(peaks[1:]) == min(peaks[1:])
    assert max(peaks) < min(plain_peaks)
    assert len(set(after[1:])) == 1


# ---- refusals ----


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["activation_checkpointing=3"], "every block number 3 is asked for, the model has 2"),
        (["activation_checkpointing=0"], "expected one of false, true, full, selective, or n for every n-th block"),
        (["activation_checkpointing=half"], "expected one of false, true, full, selective, or n for every n-th block"),
    ],
)
def test_a_way_of_checkpointing_that_does_not_exist_is_refused_before_weights_load(words, more, said):
    with pytest.raises(ConfigError) as caught:
        assemble(compose("sft", overrides=[*words, *more]))
    assert said in str(caught.value)


def test_selective_checkpointing_is_refused_where_attention_is_no_single_operation(words):
    from tt_train.inputs.model import activation_mistakes

    config = compose("sft", overrides=[*words, "activation_checkpointing=selective"])
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    bounded = decoder()
    bounded.model.layers[0].self_attn.softcap = 30.0
    assert activation_mistakes(decoder(), config, cpu, []) == activation_mistakes(bounded, config, cpu, []) == []
    assert "bounds its attention scores or has sinks; use full" in activation_mistakes(bounded, config, cuda, [])[0]
    (line,) = activation_mistakes(decoder(attention_dropout=0.1), config, cpu, [])
    assert "on the CPU attention with dropout is no single operation; use full" in line
    config.data.packing = True
    assert "packed rows and windows use flex_attention" in activation_mistakes(decoder(), config, cuda, [])[0]


@pytest.mark.parametrize("respects", [False, True])
def test_what_selective_keeps_is_offloaded_or_the_pair_is_refused(words, monkeypatch, respects):
    from tt_train.inputs import model as checks

    monkeypatch.setattr(checks, "KEEPS_BY_HOOKS", respects)
    config = compose("sft", overrides=[*words, "activation_checkpointing=selective", "activation_offloading=true"])
    found = checks.activation_mistakes(decoder(), config, torch.device("cuda"), [])
    assert len(found) == (0 if respects else 1)
    assert respects or "leaves on the device what activation_checkpointing=selective keeps; use full" in found[0]


# ---- one trajectory ----


def trajectory(words, *more, steps=6, prepare=lambda model: None):
    """Loss and gradient norm of each step, and the weights after the last."""
    config = compose("sft", overrides=[*words, *more])
    job = assemble(config)
    model = load_model(job)
    prepare(model)
    objective, optimizer = make_objective(config), build_optimizer(job, model)
    import tt_data

    batches = tt_data.batches(job.train, batch_size=config.batch_size, micro_batch_size=config.micro_batch_size,
                              seed=0, pad_id=job.tokenizer.pad_id)  # fmt: skip
    figures = []
    for step, micro_batches in zip(range(steps), batches, strict=False):
        torch.manual_seed(step)
        result = train_step(model, micro_batches, objective, optimizer, max_grad_norm=config.max_grad_norm)
        figures.append((result.loss, result.grad_norm))
    weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    return torch.tensor(figures), weights


def assert_same_trajectory(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


LORA = ["adapter.rank=4", "adapter.dropout=0.3", "adapter.target_modules=all-linear"]


@pytest.mark.parametrize("adapter", [[], LORA])
@pytest.mark.parametrize("how", ["full", "2", "selective"])
def test_checkpointing_on_or_off_is_one_trajectory(words, adapter, how):
    plain = trajectory(words, *adapter)
    assert_same_trajectory(trajectory(words, *adapter, f"activation_checkpointing={how}"), plain)


@pytest.mark.parametrize("adapter", [[], LORA])
def test_offloading_on_or_off_is_one_trajectory(words, adapter, monkeypatch):
    monkeypatch.setattr(memory.Offload, "SMALLEST", 0)
    plain = trajectory(words, *adapter)
    assert_same_trajectory(trajectory(words, *adapter, prepare=offload_activations_), plain)


@pytest.mark.parametrize("packing", ["false", "true"])
def test_however_a_step_is_split_it_is_one_trajectory(words, packing):
    more = [f"data.packing={packing}", "data.max_seq_len=64"]
    whole = trajectory(words, *more, "micro_batch_size=8")
    for size in (1, 2, 4):
        assert_same_trajectory(trajectory(words, *more, f"micro_batch_size={size}"), whole)


@pytest.mark.parametrize("adapter", [[], [LORA[0], LORA[2]], [LORA[0], "adapter.use_dora=true"]])
def test_packed_rows_and_rows_apart_are_one_trajectory(words, adapter):
    """A step is the whole data set, since a pack is a row: 37 rows apart, or the few packs that hold them."""
    more = [*adapter, "batch_size=37", "data.max_seq_len=64"]
    packed = [*more, "data.packing=true", "micro_batch_size=1"]
    assert len(assemble(compose("sft", overrides=[*words, *packed])).train) < 20
    assert_same_trajectory(trajectory(words, *packed), trajectory(words, *more, "micro_batch_size=37"))


@pytest.mark.parametrize("adapter", [[], LORA])
@pytest.mark.parametrize("how", ["false", "selective"])
def test_the_optimizer_in_the_backward_pass_or_after_it_is_one_trajectory(words, adapter, how):
    more = [*adapter, "micro_batch_size=8", "max_grad_norm=null", f"activation_checkpointing={how}"]
    assert_same_trajectory(trajectory(words, *more, "optimizer_in_backward=true"), trajectory(words, *more))


def test_the_fused_loss_and_plain_logits_are_one_trajectory(words, monkeypatch):
    import torch.nn.functional as F

    from tt_train.losses import cross_entropy as losses

    fused = trajectory(words)

    def plain(hidden, weight, labels, *, reduction, label_smoothing, softcap):
        return F.cross_entropy((hidden @ weight.T).float(), labels, reduction=reduction)

    monkeypatch.setattr(losses, "linear_cross_entropy", plain)
    assert_same_trajectory(trajectory(words), fused)


# ---- compilation ----


@pytest.fixture
def backend(request, monkeypatch):
    """Some of torch.compile, without the code that it would generate in a minute."""
    torch._dynamo.reset()
    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kw: original(self, backend=request.param, **kw))
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager"], indirect=True)
@pytest.mark.parametrize(("make", "how"), [(decoder, "selective"), (adapted, False), (adapted, "full")])
def test_blocks_compile_once_for_all_of_them_and_all_lengths(make, how, backend):
    from torch._dynamo.utils import counters

    counters.clear()
    model = make(num_hidden_layers=10)  # more than dynamo's limit of recompilations
    if how:
        checkpoint_activations_(model, how)
    compile_(model)
    for length in (20, 33, 8, 64, 17):
        gradients(model, seq_len=length)
    # with an adapter, the input of the first block needs no gradient and that of the others does
    assert counters["stats"]["unique_graphs"] == (1 if make is decoder else 2)
    assert not counters["graph_break"]


@pytest.mark.parametrize("backend", ["aot_eager"], indirect=True)
@pytest.mark.parametrize("more", [["activation_checkpointing=2"], [*LORA[:1], "activation_checkpointing=full"]])
def test_compile_on_or_off_is_one_trajectory(words, more, backend):
    assert_same_trajectory(trajectory(words, *more, "compile=true"), trajectory(words, *more))


def test_a_compiled_run_says_what_compiling_took_and_resumes_to_the_same_bits(tmp_path, words):
    def train(name, *more, **kwargs):
        console, fixed = Silent(), [*words, "compile=true", "samples.num=0", f"output_dir={tmp_path / name}"]
        return sft.main(compose("sft", overrides=[*fixed, *more]), console=console, **kwargs), console.notes

    whole, notes = train("whole", "max_steps=3", "schedule.name=constant")
    (said,) = (note for note in notes if note.startswith("compiling took"))
    assert said.endswith("s of step 1")
    assert float(said.split()[2]) > 0.1
    train("cut", "max_steps=1", "schedule.name=constant")
    cut, _ = train("cut", "max_steps=3", "schedule.name=constant", resume="auto")
    first, second = (tt_ckpt.TrainCheckpoint(path / "checkpoints").restore().tensors["model"] for path in (whole, cut))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert [row["loss"] for row in read_rows(whole / "metrics.jsonl")] == [
        row["loss"] for row in read_rows(cut / "metrics.jsonl")
    ]


# ---- figures ----


def test_memory_figures_are_those_of_the_device(monkeypatch):
    assert list(memory.memory_gib(torch.device("cpu"))) == ["allocated"]
    assert 0.01 < memory.peak_memory_gib(torch.device("cpu")) < 100
    kinds = ("active", "allocated", "reserved")
    stats = {f"{kind}_bytes.all.peak": number * 2**30 for number, kind in enumerate(kinds, 1)}
    monkeypatch.setattr(torch.accelerator, "memory_stats", lambda device: stats)
    found = memory.memory_gib(torch.device("cuda"))
    assert found == {"active": 1.0, "allocated": 2.0, "reserved": 3.0}
    assert memory.peak_memory_gib(torch.device("xpu")) == 2.0
