"""The whole story, from nothing to a merged model, each part done by what users call themselves."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import tt_models
from tt_cli.quickstart import commands
from tt_cli.quickstart.blank_model import llama_config, train_tokenizer, write_blank_model
from tt_cli.quickstart.commands import Folders, Scale
from tt_cli.quickstart.narrator import Narrator, percent
from tt_cli.quickstart.rows import KINDS, PREFERRED, TARGET, Row, Splits, make_splits, write_pairs, write_rows
from tt_train.errors import counted

BEFORE_BELOW, AFTER_ABOVE = 0.10, 0.90  # exact match on held-out rows of the target kind
PREFERRED_ABOVE = 0.80  # the same after preference tuning, on held-out rows of the kind of the preferences
SAME_LOGITS = 1e-4  # relative: how far merged and adapted may be apart in fp32
MAX_NEW_TOKENS = 16  # of an answer that is scored
BATCH = 100  # questions answered at once


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of it; scores are the shares of unseen questions answered exactly, by kind."""

    seed: int
    before: dict[str, float]
    after: dict[str, float]
    logits_apart: float  # merged and adapted, relative
    answers_apart: int  # held-out questions that merged and adapted answer differently
    pairs: int  # wrong answers of the merged model that became preferences
    preferred: dict[str, float]  # scores after preference tuning
    question: str  # of the turn of chat
    answer: str
    commands: list[str]

    @property
    def shortfalls(self) -> list[str]:
        """What should have come out otherwise, one line each; empty when all went well."""
        before, after = self.before[TARGET], self.after[TARGET]
        found = []
        if not before < BEFORE_BELOW:
            found.append(f"{TARGET} before: {percent(before)} of held-out rows, expected under {percent(BEFORE_BELOW)}")
        if not after > AFTER_ABOVE:
            found.append(f"{TARGET} after: {percent(after)} of held-out rows, expected over {percent(AFTER_ABOVE)}")
        if self.logits_apart > SAME_LOGITS:
            found.append(f"merged model: logits {self.logits_apart:.0e} from the adapted, expected {SAME_LOGITS:.0e}")
        if self.answers_apart:
            apart = counted(self.answers_apart, "answer")
            found.append(f"merged model: {apart} unlike the adapted model's, expected none")
        if not self.pairs:
            found.append("preferences: the merged model gave no wrong answer to learn from, expected some")
        elif not self.preferred[PREFERRED] > (bar := max(self.after[PREFERRED], PREFERRED_ABOVE)):
            found.append(f"{PREFERRED} after preferences: {percent(self.preferred[PREFERRED])} of held-out rows, "
                         f"expected over {percent(bar)}")  # fmt: skip
        return found


def tell(root: Path, *, seed: int, scale: Scale, narrator: Narrator) -> Outcome:
    """Make data, tokenizer and base model, fine-tune, score, chat, merge, prefer and report, all under ``root``."""
    folders = Folders(root)
    splits = _make_rows(folders, scale, seed, narrator)
    _make_blank(folders, scale, seed, splits, narrator)
    narrator.part("3 Base", "the blank model, trained in full")
    done = [_train("sft", folders.pretrain_run, commands.pretrain_words(folders, scale, seed=seed), narrator)]
    before, said_before, _ = _score(folders.base, splits)
    own, target = percent(_base_mean(before)), percent(before[TARGET])
    narrator.fact(f"unseen questions: {own} right on its own tasks, {target} on {TARGET}")

    narrator.part("4 Adapter", "LoRA on the base")
    done.append(_train("sft", folders.lora_run, commands.lora_words(folders, scale, seed=seed), narrator))
    after, said_after, adapted = _score(folders.lora_run, splits)
    narrator.fact(f"unseen questions: {percent(after[TARGET])} right on {TARGET}")

    question = splits.held_out[0].question
    done.append(commands.chat_command(folders, question))
    answer = _chat(folders.lora_run, question, done[-1], narrator)
    narrator.fact(f"{answer}    (the base alone: {said_before[0] or 'nothing'})")
    done.append(commands.typed("tt", "merge", folders.lora_run, "-o", folders.merged))
    logits_apart, answers_apart = _merge(folders, splits, adapted, said_after, done[-1], narrator)
    preferred, pairs = after, _make_pairs(folders, splits, narrator)
    if pairs:
        done.append(_train("dpo", folders.dpo_run, commands.dpo_words(folders, scale, seed=seed), narrator))
        preferred, _, _ = _score(folders.dpo_run, splits)
        was, now = percent(after[PREFERRED]), percent(preferred[PREFERRED])
        narrator.fact(f"unseen questions: {now} right on {PREFERRED}, {was} before")
    done.append(commands.typed("tt", "report", folders.lora_run, "-o", folders.report))
    _report(folders, done[-1], narrator)
    return Outcome(
        seed=seed,
        before=before,
        after=after,
        logits_apart=logits_apart,
        answers_apart=answers_apart,
        pairs=pairs,
        preferred=preferred,
        question=question,
        answer=answer,
        commands=done,
    )


def _make_rows(folders: Folders, scale: Scale, seed: int, narrator: Narrator) -> Splits:
    splits = make_splits(
        seed,
        num_pretrain=scale.pretrain.num_rows,
        num_finetune=scale.finetune.num_rows,
        num_held_out=scale.num_held_out,
        num_base_held_out=scale.num_base_held_out,
        num_practice=scale.preferences.num_rows,
    )
    write_rows(folders.pretrain_rows, splits.pretrain)
    write_rows(folders.finetune_rows, splits.finetune)
    write_rows(folders.held_out_rows, splits.held_out)
    kinds = dict.fromkeys(row.kind for row in splits.base_held_out)
    narrator.part("1 Rows", f"{len(splits.pretrain):,} to learn {', '.join(kinds)}; {len(splits.finetune):,} to learn "
                f"{TARGET}; {len(splits.held_out):,} of {TARGET} held out, in no training file")  # fmt: skip
    return splits


def _make_blank(folders: Folders, scale: Scale, seed: int, splits: Splits, narrator: Narrator) -> None:
    texts = (text for row in (*splits.pretrain, *splits.finetune) for text in (row.question, row.answer))
    vocab_size = train_tokenizer(texts, folders.blank, vocab_size=scale.vocab_size)
    config = llama_config(
        vocab_size=vocab_size, hidden_size=scale.hidden_size, num_hidden_layers=scale.num_hidden_layers
    )
    parameters = write_blank_model(folders.blank, config, seed=seed)
    narrator.part("2 Model", f"a tokenizer of {vocab_size} tokens trained on the rows, and a Llama of {parameters:,} "
                f"random parameters, in {folders.blank}")  # fmt: skip
    narrator.command(commands.typed("tt", "data", "show", folders.finetune_rows, "--tokenizer", folders.blank))


def _train(recipe: Literal["sft", "dpo"], run: Path, words: Sequence[str], narrator: Narrator) -> str:
    """Train as ``tt run`` does with this recipe and these words. Returns the command."""
    from tt_train import compose
    from tt_train.recipes import dpo, sft

    command = commands.run_command(recipe, words, run)
    narrator.command(command)
    config = replace(compose(recipe, overrides=words), output_dir=str(run))
    with closing(narrator.training_console()) as console:
        {"sft": sft, "dpo": dpo}[recipe].main(config, console=console)
    return command


def _score(path: Path, splits: Splits) -> tuple[dict[str, float], list[str], tt_models.Decoder]:
    """Exact match by kind, the answers to the held-out rows, and the model."""
    model, tokenizer = _load(path)
    said = answers(model, tokenizer, [row.question for row in splits.held_out])
    rest = [*splits.practice_held_out, *splits.base_held_out]
    return (
        by_kind(splits.held_out, said) | by_kind(rest, answers(model, tokenizer, [row.question for row in rest])),
        said,
        model,
    )


def _chat(run: Path, question: str, command: str, narrator: Narrator) -> str:
    """One turn, through what ``tt chat`` is made of. Returns the answer."""
    from tt_cli.talk import Sampling, Speaker

    narrator.part("5 Chat", "one turn with the base and its adapter")
    narrator.command(command)
    speaker = Speaker(str(run))
    ids = speaker.prompt_ids([{"role": "user", "content": question}])
    return "".join(piece for _, _, piece in speaker.replies([ids], Sampling(max_new_tokens=64)))


def _merge(
    folders: Folders, splits: Splits, adapted: tt_models.Decoder, said: list[str], command: str, narrator: Narrator
) -> tuple[float, int]:
    """Merge, and compare with the adapted model: logits, and answers to the held-out rows."""
    from tt_train import merge_run

    narrator.part("6 Merge", "one Hugging Face directory, which transformers and others load")
    narrator.command(command)
    merge_run(folders.lora_run, folders.merged)
    merged, tokenizer = _load(folders.merged)
    questions = [row.question for row in splits.held_out]
    apart = largest_difference(adapted, merged, tokenizer, questions[:32])
    others = sum(a != b for a, b in zip(said, answers(merged, tokenizer, questions), strict=True))
    narrator.fact(
        f"against the adapted model: logits within {apart:.0e}, {len(said) - others} of {len(said)} answers the same"
    )
    return apart, others


def _make_pairs(folders: Folders, splits: Splits, narrator: Narrator) -> int:
    """Ask the merged model more questions; what it answers wrongly becomes preferences. Returns their number."""
    merged, tokenizer = _load(folders.merged)
    given = [said.removesuffix("...") for said in answers(merged, tokenizer, [row.question for row in splits.practice])]
    pairs = write_pairs(folders.pair_rows, splits.practice, given)
    narrator.part("7 Pairs", f"{len(given):,} lists of 3 or 7 letters to the merged model, which learned on 4 to 6: "
                f"{pairs:,} wrong answers are rejected, the right ones chosen")  # fmt: skip
    narrator.command(commands.typed("tt", "data", "show", folders.pair_rows, "--tokenizer", folders.merged))
    return pairs


def _report(folders: Folders, command: str, narrator: Narrator) -> None:
    from tt_train.report import write_report

    narrator.part("8 Report", "one page and one picture")
    narrator.command(command)
    write_report([folders.lora_run], folders.report)


def _load(path: Path) -> tuple[tt_models.Decoder, Any]:
    from tt_train import load

    return load(path, device="cpu")


def _base_mean(scores: dict[str, float]) -> float:
    own = [scores[kind] for kind in KINDS]
    return sum(own) / len(own)


def answers(model: tt_models.Decoder, tokenizer: Any, questions: Sequence[str]) -> list[str]:
    """The greedy answer to each question; one that does not end in time is marked by a trailing ellipsis."""
    found: list[str] = []
    ends = set(tokenizer.eos_ids)
    for prompts, lengths in _padded_prompts(tokenizer, questions):
        output = tt_models.generate(
            model,
            prompts,
            max_new_tokens=MAX_NEW_TOKENS,
            temperature=0,
            eos_ids=tokenizer.eos_ids,
            pad_id=tokenizer.pad_id,
            prompt_lengths=lengths,
        )
        for ids in output[:, prompts.shape[1] :].tolist():
            stop = next((place for place, token in enumerate(ids) if token in ends), None)
            found.append(tokenizer.decode(ids[:stop]) + ("..." if stop is None else ""))
    return found


def exact_match(rows: Sequence[Row], given: Sequence[str]) -> float:
    """The share of rows whose answer was given letter by letter."""
    return sum(row.answer == answer for row, answer in zip(rows, given, strict=True)) / len(rows)


def by_kind(rows: Sequence[Row], given: Sequence[str]) -> dict[str, float]:
    """``exact_match`` of each kind of task."""
    kinds = dict.fromkeys(row.kind for row in rows)
    pairs = list(zip(rows, given, strict=True))
    return {
        kind: exact_match([row for row, _ in pairs if row.kind == kind], [a for row, a in pairs if row.kind == kind])
        for kind in kinds
    }


@torch.no_grad()
def largest_difference(
    one: tt_models.Decoder, other: tt_models.Decoder, tokenizer: Any, questions: Sequence[str]
) -> float:
    """The largest difference of two models' logits on the questions, relative to the largest logit."""
    worst = 0.0
    for question in questions:
        ids = torch.tensor([prompt_ids(tokenizer, question)])
        expected, found = one(ids), other(ids)
        worst = max(worst, float((expected - found).abs().max() / expected.abs().max()))
    return worst


def prompt_ids(tokenizer: Any, question: str) -> list[int]:
    """One question up to where the model answers."""
    ids: list[int] = tokenizer.encode_prompt([{"role": "user", "content": question}])
    return ids


def _padded_prompts(tokenizer: Any, questions: Sequence[str]) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of prompts padded on the left, with their lengths."""
    prompts = [prompt_ids(tokenizer, question) for question in questions]
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        width = max(map(len, part))
        padded = [[tokenizer.pad_id] * (width - len(ids)) + ids for ids in part]
        yield torch.tensor(padded), torch.tensor([len(ids) for ids in part])
