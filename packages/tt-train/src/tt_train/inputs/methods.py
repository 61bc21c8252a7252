"""What can be known of a recipe's own sections before weights load: a teacher, and rounded weights.

A file apart from ``model``, which is about the model that trains.
"""

import warnings
from pathlib import Path

import tt_ckpt
import tt_data
import tt_models
import tt_peft
from tt_ckpt.shown import quoted
from tt_train.config import KDConfig, QATConfig, RunConfig
from tt_train.inputs.fake_quantize import quantization_mistakes
from tt_train.inputs.model import folder_of

_PROBES = 16  # rows that both tokenizers encode


def method_mistakes(
    config: RunConfig,
    model_config: tt_models.ModelConfig,
    lora: tt_peft.LoRAConfig | None,
    train: tt_data.Dataset | tt_data.Stream,
    length: int,
) -> list[str]:
    """A line for each thing in the sections of ``kd`` and ``qat`` that does not work with the model or the rows, which
    have up to ``length`` tokens. Raises ConfigError, ValueError or OSError if the teacher cannot be read."""
    if isinstance(config, QATConfig):
        model = tt_models.build(model_config, device="meta")
        if lora is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # check_adapter has said them
                tt_peft.apply_lora_(model, lora)
        return quantization_mistakes(model, config.quantization)
    if isinstance(config, KDConfig):
        assert config.kd.teacher is not None
        return _teacher_mistakes(folder_of(config.kd.teacher, key="kd.teacher"), train, length)
    return []


def _teacher_mistakes(folder: Path, train: tt_data.Dataset | tt_data.Stream, length: int) -> list[str]:
    teacher = tt_models.config_from_hf(tt_ckpt.read_config(folder))
    tt_ckpt.check_weights(tt_models.build(teacher, device="meta"), folder)
    found, longest = [], teacher.max_position_embeddings
    if longest < length:
        found.append(
            f"kd.teacher: it reads at most {longest} tokens (max_position_embeddings), rows may have {length}; set "
            f"data.max_seq_len={longest}"
        )
    rows = train.head(_PROBES) if isinstance(train, tt_data.Stream) else train
    texts = ["".join(text for text, _ in rows.rendered(i)) for i in range(min(_PROBES, len(rows)))]
    if difference := _difference(train.tokenizer, tt_data.load_tokenizer(folder), texts):
        found.append(
            f"kd.teacher: {difference}, so its probabilities are those of other tokens; take a teacher with the "
            "tokenizer of the student"
        )
    return found


def _difference(student: tt_data.Tokenizer, teacher: tt_data.Tokenizer, texts: list[str]) -> str | None:
    """How the ids of two tokenizers differ, if they do. Templates may: rows are those of the student's."""
    if student.vocab_size != teacher.vocab_size:
        return f"its tokenizer has {teacher.vocab_size} tokens, the student's {student.vocab_size}"
    for index in range(student.vocab_size):
        ours, theirs = (each.decode([index], skip_special=False) for each in (student, teacher))
        if ours != theirs:
            return f"its token {index} is {quoted(theirs)}, the student's {quoted(ours)}"
    for text in texts:
        if student.encode(text, add_bos=False, add_eos=False) != teacher.encode(text, add_bos=False, add_eos=False):
            return f"its tokenizer makes other ids of {quoted(text)}"
    return None
