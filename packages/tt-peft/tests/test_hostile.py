"""Adapter folders and configs of an attacker or an accident: answered in one line, in time."""

import json
import os
import re
import struct
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tt_peft
from tt_peft import LoRAConfig
from tt_peft.expressions import STEPS, matches, worst_case

ENDLESS = [
    "([a-z0-9_.]+)+!",
    "(.*)*x!",
    "(?:(?:[a-z0-9_.]*)*)*!",
    r"(\w+|[a-z_.0-9]+)+!",
    ".*" * 12 + "!",
    r"(?=(.*.*)*!).*",
    "(.|.)" * 30 + "!",
    r"((?:[\w.]+\.?)+)+\Z!",
    r"(.+)+\1?(.+)+(.+)+(.+)+(.+)+!",
]
LONG = [f"model.layers.{i}.self_attn.{x}_proj" for i in range(40) for x in "qkvo"]


@pytest.fixture
def impatient(monkeypatch):
    """What never ends is stopped sooner than usual."""
    monkeypatch.setattr(tt_peft.expressions, "LIMIT_S", 0.4)


@pytest.fixture
def folder(make_lm, tmp_path):
    model = make_lm()
    tt_peft.apply_lora_(model, LoRAConfig(rank=4))
    return tt_peft.save_adapter(model, tmp_path / "adapter", base_model="org/base")


def edit(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(model, folder, match, kind=ValueError):
    with pytest.raises(kind, match=match) as error:
        tt_peft.load_adapter(model, folder)
    text = str(error.value)
    assert text.isprintable()
    assert len(text) < 2000
    return text


# ---- expressions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expression", ENDLESS)
def test_an_expression_that_backtracks_without_end_is_refused_by_name(expression, impatient):
    with pytest.raises(ValueError, match="takes more than 0.4 s or 1 GiB to match 160 names.*leave out the repetition"):
        matches([expression], LONG)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target_modules", ENDLESS[0]),
        ("exclude_modules", ENDLESS[0]),
        ("rank_pattern", {ENDLESS[0]: 4}),
        ("alpha_pattern", {"q_proj": 4, ENDLESS[0]: 4}),
    ],
)
def test_such_an_expression_is_refused_in_every_field_from_a_file_and_in_a_thread(
    field, value, folder, make_lm, impatient
):
    edit(folder, **{field: value})
    refused(make_lm(), folder, re.escape(ENDLESS[0]))
    found = []

    def apply():
        try:
            tt_peft.apply_lora_(make_lm(), LoRAConfig(**{field: value}))
        except ValueError as error:
            found.append(str(error))

    thread = threading.Thread(target=apply)
    thread.start()
    thread.join()
    assert "takes more than 0.4 s" in found[0]


def test_such_a_layers_pattern_is_refused(make_lm, impatient):
    with pytest.raises(ValueError, match="takes more than 0.4 s"):
        tt_peft.apply_lora_(make_lm(), LoRAConfig(layers_to_transform=(1,), layers_pattern=ENDLESS[0]))


def test_such_texts_in_lists_are_names(folder, make_lm):
    for field in ("target_modules", "modules_to_save", "exclude_modules", "layers_pattern"):
        if field != "layers_pattern":
            with pytest.raises(ValueError, match="matches no module"):
                tt_peft.apply_lora_(make_lm(), LoRAConfig(**{field: [ENDLESS[0]]}))
    edit(folder, target_modules=[ENDLESS[0]])
    refused(make_lm(), folder, "matches no module")


@pytest.mark.parametrize(
    "expression",
    [
        r".*\.layers\.[0-9]+\.self_attn\.(q|v)_proj",
        r"(?!.*mlp).*_proj",
        r"model\.layers\.(?:1|2)\d?\.self_attn\.(?:q|k)_proj",
        r".*(?<!k)_proj",
        r"(?i:MODEL).*q_proj",
        r"^model.*\d+.*[qv]_proj$",
        "|".join(re.escape(name) for name in LONG[::3]),
        r"(.*\.)?layers\.(?P<n>\d)\..*",
        r"(?:\w+\.)*q_proj",
        r".*?layers\.(\d)\1\..*",
    ],
)
def test_what_matches_is_what_the_standard_library_says_at_once_or_in_a_process(expression):
    expected = [place for place, name in enumerate(LONG) if re.fullmatch(expression, name)]
    assert expected
    assert list(matches([expression], LONG)[0]) == expected


def test_plain_expressions_need_no_process(monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    for expression in (r".*\.layers\.[0-9]+\.(q|v)_proj", ".*_proj", "q_proj|v_proj", r"(?!.*mlp).*_proj"):
        assert worst_case(expression, LONG, 0) < STEPS
        matches([expression], [f"{name}.other" for name in LONG])


@pytest.mark.parametrize(
    ("expression", "why"),
    [
        ("q_proj(", "missing \\)"),
        ("(" * 5000 + ")" * 5000, "nested too deeply"),
        ("a{99999999999}", "repetition number is too large"),
        ("a+" * 100_000, "200,000 characters"),
        ("a)|(b", "unbalanced"),
        ("(?<=a*)b", "look-behind"),
        ("\x1b]0;x\x07(", "missing"),
        ("[\udce1-a]", "bad character range .udce1-a"),
    ],
)
@pytest.mark.parametrize("field", ["target_modules", "rank_pattern", "layers_pattern"])
def test_what_is_not_an_expression_is_refused_in_one_printable_line(expression, why, field, make_lm):
    value = {expression: 2} if field == "rank_pattern" else expression
    more = {"layers_to_transform": (0,)} if field == "layers_pattern" else {}
    with pytest.raises(ValueError, match=f"is not a valid regular expression: .*{why}") as error:
        tt_peft.apply_lora_(make_lm(), LoRAConfig(**{field: value}, **more))
    assert str(error.value).isprintable()


def test_without_a_process_an_involved_expression_is_refused_and_no_error_of_the_system_comes_out(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(ValueError, match="no process can be started for it .*list the names instead"):
        matches(["(?:x*)*(never asked before)"], LONG)


def test_a_layers_pattern_with_a_group_of_its_own_counts_the_layer(make_lm):
    model = make_lm()
    config = LoRAConfig(layers_to_transform=(1,), layers_pattern=r"(layers|h)", target_modules=("q_proj",))
    assert tt_peft.apply_lora_(model, config) == ["model.layers.1.self_attn.q_proj"]


def test_names_by_the_thousand_cost_in_proportion(monkeypatch):
    counts = []
    own = tt_peft.modules.own_modules
    for number in (20, 200):
        calls = []
        for module in (tt_peft.apply, tt_peft.modules):
            monkeypatch.setattr(module, "own_modules", lambda model, calls=calls: calls.append(1) or own(model))
        model = nn.ModuleDict({f"l{i}": nn.Linear(2, 2) for i in range(number)})
        names = tuple(model)
        config = LoRAConfig(rank=1, target_modules=names, rank_pattern=dict.fromkeys(names, 1))
        assert tt_peft.apply_lora_(model, config) == list(names)
        counts.append(len(calls))
    assert counts[0] == counts[1]  # the modules are listed as often, however many names there are


@pytest.mark.parametrize(
    "key",
    ["target_modules", "exclude_modules", "modules_to_save", "target_parameters", "rank_pattern", "alpha_pattern"],
)
def test_any_number_of_unknown_names_is_answered(key, folder, make_lm):
    for count in (100_000, 1_000_000):
        names = [f"m{i}" for i in range(count)]
        edit(folder, **{key: dict.fromkeys(names, 1) if key.endswith("pattern") else names})
        if count > 200_000:
            refused(make_lm(), folder, f"{key} has 1,000,000 names, expected at most 200,000: name modules by")
        elif key in ("target_modules", "target_parameters"):
            refused(make_lm(), folder, f"{key}: 'm0' matches no module")
        else:
            tt_peft.load_adapter(make_lm(), folder)  # PEFT passes over them


def test_any_number_of_layers_patterns_is_answered(folder, make_lm, impatient):
    edit(folder, layers_to_transform=[0], layers_pattern=[f"m{i}" for i in range(100_000)])
    refused(make_lm(), folder, "takes more than 0.4 s")


# ---- adapter_config.json ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("r", 0, "expected a whole number from 1 to 131072, found 0"),
        ("r", -1, "found -1"),
        ("r", 10**9, "found 1000000000"),
        ("r", True, "found True"),
        ("r", "8", "found '8'; write 8"),
        ("r", 8.0, r"found 8\.0; write 8"),
        ("r", float("nan"), "found nan"),
        ("r", 10**400, "found a number of 1,329 bits"),
        ("r", 100_000, r"gives model\.layers\.0\.self_attn\.q_proj rank 100,000 .* but its lora_A has shape \[4, 32\]"),
        ("rank_pattern", {"q_proj": 50_000}, r"q_proj rank 50,000 .* but its lora_A has shape"),
        ("lora_alpha", float("inf"), "expected a positive number up to 1000000000, found inf"),
        ("lora_alpha", float("nan"), "found nan"),
        ("lora_alpha", 0, "found 0"),
        ("lora_alpha", -16, "found -16"),
        ("lora_alpha", "16", "write 16"),
        ("lora_dropout", 2, "expected a number from 0 to below 1, found 2"),
        ("lora_dropout", float("nan"), "found nan"),
        ("lora_dropout", True, "found True"),
        ("bias", "lora_only", r"'lora_only' is not supported \(only \"none\"\); merge the adapter in PEFT"),
        ("modules_to_save", "lm_head", "expected a list of names, found 'lm_head'"),
        ("modules_to_save", [1], r"expected a list of names, found \[1\]"),
        ("target_modules", {"a": 1}, "expected a list of names, or an expression, found {'a': 1}"),
        ("target_modules", [None], "expected a list of names"),
        ("layers_to_transform", "12", "a whole number or a list of them, found '12'; write 12"),
        ("layers_to_transform", [True], "a whole number or a list"),
        ("rank_pattern", ["q_proj"], "names with whole numbers"),
        ("rank_pattern", {"q_proj": "8"}, "names with whole numbers"),
        ("alpha_pattern", {"q_proj": float("inf")}, "names with positive numbers"),
        ("use_rslora", "true", "expected true or false, found 'true'"),
        ("use_dora", 1, "expected true or false, found 1"),
        ("base_model_name_or_path", ["x"], "expected a name or a path"),
        ("init_lora_weights", [1], "expected true, false or a name"),
        ("peft_type", "IA3", "peft_type is 'IA3'; only 'LORA' is supported; merge the adapter in PEFT"),
        ("peft_type", ["LORA"], "peft_type is"),
        ("lora_alpa", 4, r"lora_alpa=4 is not known to tt_peft \(did you mean lora_alpha\?\)"),
        ("x\x1b]0;x\x07", 4, r"x\\x1b\]0;x\\x07=4 is not known"),
        ("new", {"a": [{"b": 1}]}, "new=an object of 1 is not known"),
        ("new", "\u202egnp.exe\x1b[2J" * 100, "characters"),
    ],
)
def test_a_wrong_value_is_answered_with_key_found_expected_and_cure(key, value, message, folder, make_lm):
    edit(folder, **{key: value})
    refused(make_lm(), folder, message)


@pytest.mark.parametrize(
    "kind", ["ADALORA", "IA3", "LOHA", "LOKR", "OFT", "BOFT", "VERA", "PREFIX_TUNING", "TRAINABLE_TOKENS", "XLORA"]
)
def test_other_kinds_of_adapters_are_refused_by_name(kind, folder, make_lm):
    edit(folder, peft_type=kind)
    refused(make_lm(), folder, f"adapter_config.json: peft_type is '{kind}'; only 'LORA' is supported; merge")


@pytest.mark.parametrize(
    ("key", "value", "works"),
    [
        ("alora_invocation_tokens", [1, 2], False),
        ("megatron_config", {"a": 1}, False),
        ("arrow_config", {"a": 1}, False),
        ("use_qalora", True, False),
        ("use_bdlora", {"a": 1}, False),
        ("kasa_config", {"a": 1}, False),
        ("layer_replication", [[0, 1]], False),
        ("init_lora_weights", "loftq", False),
        ("init_lora_weights", "corda", False),
        ("init_lora_weights", "olora", False),
        ("loftq_config", {"loftq_bits": 4}, True),  # with init_lora_weights=true: nothing was changed by it
        ("corda_config", {"a": 1}, True),
        ("eva_config", {"rho": 2.0}, True),
        ("init_lora_weights", "eva", True),
        ("megatron_core", "megatron.core", True),
        ("runtime_config", {"ephemeral_gpu_offload": False}, True),
    ],
)
def test_every_feature_of_peft_is_supported_or_refused_by_its_key(key, value, works, folder, make_lm):
    edit(folder, **{key: value})
    if works:
        tt_peft.load_adapter(make_lm(), folder)
    else:
        refused(make_lm(), folder, f"adapter_config.json: {key}=.* is not supported")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "adapter_config.json: 0 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 812\n", "git-lfs pointer to a file of 812"),
        (b"  <!DOCTYPE html><html>", "a web page, not the file itself"),
        (b"\xff\xfe{\x00}\x00", ":1: not UTF-8"),
        (b'{"r": 8', ":1:8: not valid JSON"),
        (b'{"r": 8, "r": 9}', "'r' is given twice, with different values"),
        (b"[1]", "expected a JSON object, found"),
        (b"7", "expected a JSON object, found 7"),
        (b"[" * 50_000, "nested too deeply"),
        (b'{"r": ' + b"9" * 6000 + b"}", "not valid JSON: Exceeds the limit"),
    ],
)
def test_a_file_that_is_not_a_config_is_answered_with_what_it_is(content, message, folder, make_lm):
    (folder / "adapter_config.json").write_bytes(content)
    refused(make_lm(), folder, message)


def test_a_config_of_any_size_is_not_read(folder, make_lm):
    with (folder / "adapter_config.json").open("ab") as file:
        file.truncate(1 << 40)
    refused(make_lm(), folder, "1,099,511,627,776 bytes, expected at most 67,108,864")


def test_the_base_s_name_is_shown_without_what_acts_on_a_terminal_and_without_a_password(folder, make_lm):
    edit(folder, base_model_name_or_path="https://me:hf_secret@host/../x\x1b]0;x\x07")
    text = refused(make_lm(seed=3), folder, "this adapter was trained on")
    assert "hf_secret" not in text
    assert "\\x1b" in text


# ---- adapter_model.safetensors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "adapter_model.safetensors: 0 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 812\n", "git-lfs pointer to a file of 812"),
        (b"<html><body>Sign in</body></html>", "a web page, not the file itself"),
        (b"\x02\0\0\0\0\0\0\0{}extra", "damaged or not a safetensors file .15 bytes."),
        (struct.pack("<Q", 1 << 60) + b"{", "damaged or not a safetensors file"),
        (b'\x52\0\0\0\0\0\0\0{"a": {"dtype": "\x1b]0;x", "shape": [1], "data_offsets": [0, 4]}}', "damaged or not"),
    ],
)
def test_weights_that_are_something_else_are_answered_with_what_they_are(content, message, folder, make_lm):
    (folder / "adapter_model.safetensors").write_bytes(content)
    refused(make_lm(), folder, message)


def test_tensor_names_are_printable_short_and_each_once(folder, make_lm):
    file = folder / "adapter_model.safetensors"
    state = load_file(file)
    for name, message in (
        ("a\x1b]0;PWNED\x07", "printable characters"),
        ("a\u202eb", "printable characters"),
        ("a" * 5000, "5,000 characters"),
        ("", "1 to 500 printable"),
    ):
        save_file({**state, name: torch.zeros(1)}, file)
        refused(make_lm(), folder, message)
    key = "model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({**state, key: torch.zeros(4, 32)}, file)
    refused(make_lm(), folder, f"tensors .*{key} are the same one")


def test_a_tensor_of_any_declared_size_is_not_read(folder, make_lm):
    header = json.dumps(
        {"a.lora_A.weight": {"dtype": "F32", "shape": [1 << 36], "data_offsets": [0, 1 << 38]}}
    ).encode()
    file = folder / "adapter_model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(file, 8 + len(header) + (1 << 38))  # a hole: no disk
    refused(make_lm(), folder, r"68,719,476,736 values, the model has|unable to mmap")


def test_trained_rows_without_their_indices_name_the_folder(folder, make_lm):
    file = folder / "adapter_model.safetensors"
    key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    for tensor, indices in ((torch.tensor(1.0), None), (torch.ones(1, 32), [True]), (torch.tensor(1.0), [1])):
        save_file({**load_file(file), key: tensor}, file)
        edit(folder, trainable_token_indices=indices)
        refused(
            make_lm(), folder, "adapter: adapter_config.json: trainable_token_indices has no|does not fit model.embed"
        )


@pytest.mark.parametrize("counts", [{"parameters": "9" * 500}, {"parameters": 10**300, "tensors": 1}, {"tensors": []}])
def test_metadata_of_another_kind_is_damaged_and_not_repeated(counts, folder, make_lm):
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file), file, {"tt_base": json.dumps({"shapes": "x", **counts})})
    refused(make_lm(), folder, "the metadata 'tt_base' is damaged")


# ---- links and special files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_link_out_of_the_folder_a_pipe_and_a_folder_are_refused_before_they_are_opened(name, folder, make_lm):
    file = folder / name
    outside = folder.parent / "outside"
    file.rename(outside)
    file.symlink_to(outside)
    refused(make_lm(), folder, f"{name}: a link out of its folder, to .*outside; copy the file into the folder")
    file.unlink()
    file.symlink_to(folder / "nothing")
    refused(make_lm(), folder, f"{name}: a link to .*nothing, which does not exist", FileNotFoundError)
    file.unlink()
    os.mkfifo(file)
    refused(make_lm(), folder, f"{name}: a pipe, not a regular file")
    file.unlink()
    file.mkdir()
    refused(make_lm(), folder, f"{name}: a folder, not a regular file")
    file.rmdir()
    file.symlink_to("/dev/zero")
    refused(make_lm(), folder, f"{name}: a link out of its folder")
    file.unlink()
    outside.rename(folder / "inside")
    file.symlink_to("inside")
    tt_peft.load_adapter(make_lm(), folder)


def test_the_links_of_a_hub_cache_and_a_folder_that_is_a_link_are_followed(folder, make_lm, tmp_path):
    snapshot = tmp_path / "models--org--adapter" / "snapshots" / "abc"
    blobs = tmp_path / "models--org--adapter" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).rename(blobs / name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    tt_peft.load_adapter(make_lm(), snapshot)
    (tmp_path / "link").symlink_to(snapshot)
    tt_peft.load_adapter(make_lm(), tmp_path / "link")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_writing_replaces_a_link_and_follows_none(name, make_lm, tmp_path):
    model = make_lm()
    tt_peft.apply_lora_(model, LoRAConfig(rank=4))
    victim, place = tmp_path / "victim", tmp_path / "adapter"
    victim.write_text("KEEP")
    place.mkdir()
    (place / name).symlink_to(victim)
    (place / f".{name}.{os.getpid()}.tmp").symlink_to(victim)  # where temporaries were once
    tt_peft.save_adapter(model, place)
    assert victim.read_text() == "KEEP"
    assert not (place / name).is_symlink()
    tt_peft.load_adapter(make_lm(), place)
    (place / name).unlink()
    (place / name).mkdir()
    with pytest.raises(IsADirectoryError, match="a folder is there; remove it"):
        tt_peft.save_adapter(model, place)
    assert not list(place.glob(".tmp-*"))


# ---- library use -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 10**7}, "rank must be a positive whole number, got 10000000: expected 1 to 131072"),
        ({"alpha": 10**400}, "alpha must be a positive number, got a number of"),
        ({"target_modules": 5}, "target_modules must be names, got 5"),
        ({"modules_to_save": {"a": 1}}, "modules_to_save must be names"),
        ({"modules_to_save": 1.5}, "modules_to_save must be names, got 1.5"),
        ({"layers_to_transform": 1.5}, "layers_to_transform must be whole numbers, got 1.5"),
        ({"layers_to_transform": True}, "layers_to_transform must be whole numbers"),
        ({"rank_pattern": {1: 2}}, "rank_pattern must have names or expressions as keys"),
        ({"rank_pattern": {"x\x1b": 0}}, r"rank_pattern\['x\\x1b'\] must be a positive whole number, got 0"),
        ({"dtype": "fp32"}, "dtype must be a floating point type such as torch.float32, got 'fp32'"),
        ({"init": ["kaiming"]}, "init must be one of"),
        ({"target_modules": ["a"] * 300_000}, "target_modules has 300,000 names, expected at most 200,000"),
    ],
)
def test_a_config_made_by_hand_is_refused_with_the_field(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        LoRAConfig(**changes)
    assert str(error.value).isprintable()
