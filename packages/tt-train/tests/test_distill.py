"""Distillation against the formula in fp64 over all logits, and against the models of transformers."""

import shutil

import pytest
import torch
import torch.nn.functional as F

import tt_models
import tt_peft
import tt_train
from tt_train.losses import chunks
from tt_train.losses.cross_entropy import Summed
from tt_train.losses.distill import distillation

SIZES = {"vocab_size": 120, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


def model_of(kind="llama", seed=0, hidden=32, **more):
    config = {"model_type": kind, "hidden_size": hidden, "intermediate_size": 48, "max_position_embeddings": 64} | SIZES
    torch.manual_seed(seed)
    model = tt_models.build(tt_models.config_from_hf(config | {"rms_norm_eps": 1e-5} | more))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 120, (3, 20), generator=generator)
    labels = torch.where(torch.rand(3, 20, generator=generator) < 0.3, -100, ids)
    return {"input_ids": ids, "labels": labels}


def reference(model, teacher, batch, *, divergence, temperature, weight, known=120):
    """Sums in fp64, by torch's own functions, over all logits."""
    keep = batch["labels"][:, 1:] != -100
    targets = batch["labels"][:, 1:][keep]
    logits, wanted = model(batch["input_ids"])[:, :-1][keep], teacher(batch["input_ids"])[:, :-1][keep].detach()
    ours = F.log_softmax(logits[:, :known] / temperature, -1)
    theirs = F.log_softmax(wanted[:, :known] / temperature, -1)
    pair = (ours, theirs) if divergence == "forward" else (theirs, ours)
    kl = F.kl_div(*pair, reduction="sum", log_target=True)
    ce = F.cross_entropy(logits, targets, reduction="sum")
    return (1 - weight) * temperature**2 * kl + weight * ce, kl, ce


def close(found, wanted):
    """The logits of a chunk are fp32, whatever the model is."""
    torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=2e-6 * float(wanted.abs().max()))


def compare(model, teacher, batch, known=120, **options):
    weight = options.get("cross_entropy_weight", 0.5)
    asked = {"divergence": options["divergence"], "temperature": options.get("temperature", 1.0)}
    loss, kl, ce = reference(model, teacher, batch, weight=weight, known=known, **asked)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    wanted = torch.autograd.grad(loss, [model.get_parameter(name) for name in names])
    found = distillation(model, batch, teacher=teacher, **options)
    assert isinstance(found, Summed)
    assert found.count == found.tokens == int((batch["labels"][:, 1:] != -100).sum())
    for value, expected in ((found.loss, loss), *zip(found.metrics.values(), (kl, ce), strict=True)):
        close(value.detach(), expected.detach())
    assert list(found.metrics) == ["divergence", "cross_entropy"]
    for gradient, expected in zip(
        torch.autograd.grad(found.loss, [model.get_parameter(name) for name in names]), wanted, strict=True
    ):
        close(gradient, expected)


def several_chunks(monkeypatch):
    """Of 16 positions at most, in blocks of 5 rows."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1)
    monkeypatch.setattr(chunks, "CACHED_BYTES", 5 * 4 * 120)


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_loss_and_gradients_equal_the_formula_over_all_logits(batch, monkeypatch, divergence, temperature, weight):
    several_chunks(monkeypatch)
    options = {"divergence": divergence, "temperature": temperature, "cross_entropy_weight": weight}
    compare(model_of(), model_of(seed=1, hidden=40), batch, **options)


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
@pytest.mark.parametrize("kind", ["tied", "softcap", "head lora", "lora", "frozen head"])
def test_every_kind_of_head_gives_the_same(batch, monkeypatch, divergence, kind):
    several_chunks(monkeypatch)
    more = {"tie_word_embeddings": kind == "tied"}
    if kind == "softcap":
        more |= {"model_type": "gemma2", "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}
        more |= {"attn_logit_softcapping": None, "sliding_window": 64, "hidden_activation": "gelu_pytorch_tanh"}
    model = model_of(**({"kind": more.pop("model_type")} if kind == "softcap" else {}), **more)
    if "lora" in kind:
        targets = ["q_proj", "lm_head"] if kind == "head lora" else ["q_proj"]
        tt_peft.apply_lora_(model, tt_peft.LoRAConfig(rank=4, target_modules=targets))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    if kind == "frozen head":
        model.lm_head.requires_grad_(False)
    compare(model.double(), model_of(seed=1), batch, divergence=divergence, temperature=1.5)


def test_vocabularies_that_are_padded_to_different_sizes_are_compared_where_both_are(batch):
    """Qwen 2.5 has 151,936 rows in its small models and 152,064 in its large ones, of one tokenizer."""
    compare(model_of(), model_of(seed=1, vocab_size=128), batch, divergence="forward")
    compare(model_of(vocab_size=128), model_of(seed=1), batch, divergence="reverse")


def test_a_student_that_is_its_teacher_has_no_divergence(batch):
    model = model_of()
    for divergence in ("forward", "reverse"):
        found = distillation(model, batch, teacher=model_of(), divergence=divergence, cross_entropy_weight=0.0)
        assert abs(found.loss.item()) < 1e-4
        for gradient in torch.autograd.grad(found.loss, list(model.parameters())):
            assert float(gradient.abs().max()) < 1e-4


def test_directions_differ_and_the_teacher_gets_no_gradient(batch):
    model, teacher = model_of(), model_of(seed=1)
    forward = distillation(model, batch, teacher=teacher, divergence="forward")
    reverse = distillation(model, batch, teacher=teacher, divergence="reverse")
    assert abs(forward.loss.item() - reverse.loss.item()) > 1e-2
    forward.loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    with pytest.raises(RuntimeError, match="one backward pass only"):
        forward.loss.backward()


def test_nothing_to_train_on_is_a_sum_over_nothing(batch):
    model = model_of()
    found = distillation(model, {**batch, "labels": torch.full_like(batch["labels"], -100)}, teacher=model_of(seed=1))
    assert (found.loss.item(), found.count) == (0.0, 0)
    found.loss.backward()


def test_packed_documents_are_distilled_as_they_are_alone(batch):
    model, teacher = model_of(), model_of(seed=1)
    one = {name: values[:1, :12] for name, values in batch.items()}
    two = {name: values[1:2, :8] for name, values in batch.items()}
    packed = {name: torch.cat([one[name], two[name]], dim=1) for name in one}
    packed["labels"][0, 12] = -100
    packed["position_ids"] = torch.cat([torch.arange(12), torch.arange(8)])[None]
    found = distillation(model, packed, teacher=teacher, divergence="reverse")
    alone = [distillation(model, each, teacher=teacher, divergence="reverse") for each in (one, two)]
    close(found.loss.detach(), sum(each.loss.detach().double() for each in alone))


def test_the_loss_equals_that_of_the_same_models_in_transformers(model_dir, tmp_path, batch):
    transformers = pytest.importorskip("transformers")
    import tt_ckpt

    other = shutil.copytree(model_dir, tmp_path / "teacher")
    teacher, _ = tt_train.load(model_dir)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.5)
    (other / "model.safetensors").unlink()
    tt_ckpt.save_hf(teacher, tmp_path / "made", config=tt_ckpt.read_config(model_dir))
    shutil.copy(tmp_path / "made" / "model.safetensors", other)
    theirs, wanted = (
        transformers.AutoModelForCausalLM.from_pretrained(folder).double() for folder in (model_dir, other)
    )
    keep = batch["labels"][:, 1:] != -100
    s, t = (m(batch["input_ids"]).logits[:, :-1][keep].detach() / 2 for m in (theirs, wanted))
    kl = (t.softmax(-1) * (t.log_softmax(-1) - s.log_softmax(-1))).sum()
    student, _ = tt_train.load(model_dir)
    found = distillation(student.float(), batch, teacher=teacher.float(), temperature=2.0, cross_entropy_weight=0.0)
    torch.testing.assert_close(found.loss.detach().double(), 4 * kl, rtol=1e-4, atol=1e-4)
