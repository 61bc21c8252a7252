import copy
import warnings

import pytest
import torch

import tt_peft


def test_peft_loads_our_files_without_a_warning_and_computes_the_same(make_llama, randomise, ids, tmp_path):
    peft = pytest.importorskip("peft")
    base = make_llama()
    ours = copy.deepcopy(base)
    tt_peft.apply_lora_(ours, tt_peft.LoRAConfig(rank=4, alpha=12, target_modules="all-linear"))
    randomise(ours)
    tt_peft.save_adapter(ours, tmp_path, base_model="org/base")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about its own names
        theirs = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()
    assert not torch.allclose(ours(ids).logits, make_llama()(ids).logits, atol=1e-3)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
