"""How many functions and files of ours a row and a merge pass: what a stranger would have to read to follow one.

``python tests/test_walks.py`` prints both walks, in the order in which functions are first entered.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

ROW_LIMITS = (60, 12)  # functions, files
MERGE_LIMITS = (120, 25)


def walk(action: Callable[[], object]) -> list[tuple[str, str]]:
    """File and name of every function of ours that ``action`` enters; comprehensions belong to their function."""
    found: dict[tuple[str, str], None] = {}

    def see(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        file = code.co_filename
        if event != "call" or code.co_name.startswith("<") or f"{os.sep}tests{os.sep}" in file:
            return
        package = next((part for part in Path(file).parts if part.startswith("tt_")), None)
        if package is not None:
            found[file[file.rindex(f"{os.sep}{package}{os.sep}") + 1 :], code.co_qualname] = None

    sys.setprofile(see)
    try:
        action()
    finally:
        sys.setprofile(None)
    return list(found)


def walk_of_a_row(folder: Path) -> list[tuple[str, str]]:
    """From rows.jsonl of messages to the token ids of its first row."""
    import tt_data

    turns = [{"role": "user", "content": "two and two"}, {"role": "assistant", "content": "four"}]
    (folder / "rows.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    tokenizer = tt_data.load_tokenizer(tokenizer_folder(folder))
    return walk(lambda: tt_data.load_dataset(str(folder / "rows.jsonl"), tokenizer)[0])


def walk_of_a_merge(folder: Path) -> list[tuple[str, str]]:
    """From the directory of a LoRA run to a model directory."""
    from tt_train import compose, merge_run
    from tt_train.recipes import sft

    model = model_folder(folder)
    (folder / "rows.jsonl").write_text('{"text": "one two three"}\n' * 4)
    words = [f"model.path={model}", f"data.train={folder / 'rows.jsonl'}", "model.dtype=fp32", "batch_size=2"]
    words += ["max_steps=1", "adapter.rank=2", f"output_dir={folder / 'run'}", "samples.num=0", "device=cpu"]
    sft.main(compose("sft", overrides=words))
    return walk(lambda: merge_run(folder / "run", folder / "merged"))


def tokenizer_folder(folder: Path) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["a b c"], trainer)
    path = folder / "tokenizer"
    path.mkdir()
    tokenizer.save(str(path / "tokenizer.json"))
    template = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": template}
    (path / "tokenizer_config.json").write_text(json.dumps(names))
    return path


def model_folder(folder: Path) -> Path:
    import tt_ckpt
    import tt_models

    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 300, "hidden_size": 16,
        "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": False,
    }  # fmt: skip
    model = tt_models.build(tt_models.config_from_hf(config))
    tt_ckpt.save_hf(model, folder / "model", config=config, source=tokenizer_folder(folder))
    return folder / "model"


@pytest.mark.parametrize(("passed", "limits"), [(walk_of_a_row, ROW_LIMITS), (walk_of_a_merge, MERGE_LIMITS)])
def test_a_walk_passes_no_more_functions_and_files_than_a_stranger_can_follow(tmp_path, passed, limits):
    steps = passed(tmp_path)
    files = {file for file, _ in steps}
    assert 0 < len(steps) <= limits[0]
    assert 0 < len(files) <= limits[1]


if __name__ == "__main__":
    import tempfile

    for name, passed in (("row", walk_of_a_row), ("merge", walk_of_a_merge)):
        with tempfile.TemporaryDirectory() as folder:
            steps = passed(Path(folder))
        print(f"{name}: {len(steps)} functions in {len({file for file, _ in steps})} files")
        if "-v" in sys.argv:
            print("".join(f"    {file}: {function}\n" for file, function in steps))
