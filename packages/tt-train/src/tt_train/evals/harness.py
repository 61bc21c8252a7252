"""The model ``tt`` of lm-evaluation-harness: a run or model that answers its three kinds of requests.

lm-eval imports this module by its entry point (a release that has the group ``lm_eval.models``), or anybody who wants
``tt`` registered does. https://github.com/EleutherAI/lm-evaluation-harness/blob/main/docs/model_guide.md
"""

import functools
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm  # type: ignore[import-untyped]  # of lm-eval

import tt_data
from tt_models.sampling import Sampling
from tt_train.errors import ConfigError
from tt_train.evals.answer import Wanted
from tt_train.evals.score import ModelOptions, open_model

Pair = tuple[tuple[str, str], list[int], list[int]]
_SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty")
_HARMLESS = (("temperature", 0.0), ("num_beams", 1), ("use_cache", True), ("num_return_sequences", 1))
MAX_GEN_TOKS = 256  # if a task does not say; as in lm-eval's hf


@register_model("tt")
class TT(TemplateLM):  # type: ignore[misc]  # lm-eval is optional
    """``--model tt --model_args path=RUN``. Values and answers are those of lm-eval's ``hf`` for the same weights."""

    backend = "causal"

    def __init__(
        self,
        path: str,
        *,
        device: str | None = None,
        dtype: str | None = None,
        base: str | Sequence[str] | None = None,
        adapter: bool = True,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        tell: Callable[[str], None] | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        """Read the tokenizer; the weights load with the first request.

        Args:
            path: a run, a model directory, an adapter or a hub id, as in ``tt_train.load``; ``base`` and ``adapter``
                are those of ``load``.
            dtype: fp32, bf16 or fp16; by default that of the run or of the files.
            batch_size: texts of a batch; ``auto`` (the default) makes batches of about the same number of tokens.
            max_length: tokens that the model reads; by default as many as its config says.
            add_bos_token: whether contexts begin with the bos token; by default as the tokenizer's files say.
            tell: is called with a sentence about what is not as usual, once for each.
            progress: is called with (what was done, parts done, parts).
        """
        super().__init__()
        self.path, self._told = path, set[str]()
        self._tell = tell or (lambda text: print(text, file=sys.stderr))
        options = ModelOptions(
            device=device or "auto", dtype=None if dtype == "auto" else dtype, adapter=adapter,
            base=(base,) if isinstance(base, str) else tuple(base or ()), batch_size=_size(batch_size),
            max_length=max_length,
        )  # fmt: skip
        self.scorer, self.origin = open_model(path, options, tell=self.tell, progress=progress or _bar())
        self.tokenizer = self.scorer.tokenizer
        self._reads_specials = self.tokenizer.with_special_tokens_in_text()
        self._adds_bos = self.tokenizer.adds_bos if add_bos_token is None else add_bos_token
        self._encoded = functools.lru_cache(maxsize=4096)(self._encode)

    @classmethod
    def of(cls, path: str, options: ModelOptions, **more: Any) -> "TT":
        """The same with options that are checked already."""
        return cls(path, **vars(options), **more)

    def tell(self, text: str) -> None:
        """Say ``text`` once."""
        if text not in self._told:
            self._told.add(text)
            self._tell(text)

    # ---- what lm-eval asks about the model ---------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        if self.tokenizer.eos_id is None:
            raise ConfigError([f"{self.path}: its tokenizer has neither a bos nor an eos token; lm-eval needs one"])
        return int(self.tokenizer.eos_id)

    @property
    def prefix_token_id(self) -> int:
        """The token in front of a text without context: bos, or eos if there is no bos."""
        return self.eot_token_id if self.tokenizer.bos_id is None else int(self.tokenizer.bos_id)

    @property
    def max_length(self) -> int:
        """The most tokens of a request that the model reads."""
        return self.scorer.max_length

    @property
    def tokenizer_name(self) -> str:
        """Changes with anything that changes a rendered prompt: lm-eval keeps prompts under this name."""
        return f"tt-{self.tokenizer.fingerprint[:32]}"

    def get_model_info(self) -> dict[str, Any]:
        """For the results."""
        model = self.scorer.model
        weight = model.model.embed_tokens.weight
        return {
            "model_num_parameters": sum(part.numel() for part in model.parameters()),
            "model_dtype": str(weight.dtype),
        }

    # ---- text --------------------------------------------------------------------------------------------------------

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of ``string``, in which control tokens are read as such; bos in front unless it is there already."""
        return list(self._encoded(string, add_special_tokens))

    def _encode(self, string: str, add_special_tokens: bool | None) -> tuple[int, ...]:
        bos = self._adds_bos if add_special_tokens is None else add_special_tokens and self.tokenizer.adds_bos
        if add_special_tokens is None and bos:
            bos = not string.startswith(self.tokenizer.decode([self.prefix_token_id], skip_special=False))
        return tuple(self._reads_specials.encode(string, add_bos=bos, add_eos=False))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as the model's template writes it, up to its answer or within its last message."""
        if not self.tokenizer.has_chat_template:
            raise ConfigError([f"{self.path}: its tokenizer has no chat template; leave out --apply-chat-template"])
        try:
            return self._render(chat_history, add_generation_prompt)
        except tt_data.TemplateError:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            found = self._render(others, add_generation_prompt)
            self.tell(f"{self.path}: its chat template takes no system message, which is left out")
            return found

    def _render(self, messages: list[dict[str, str]], opens_answer: bool) -> str:
        text = self.tokenizer.render(messages, add_generation_prompt=opens_answer)
        if opens_answer:
            return text
        last = messages[-1]["content"]
        start = text.rfind(last.strip())
        if start < 0:
            raise ConfigError([f"{self.path}: its chat template changes the last message, which cannot be continued"])
        end = start + len(last.lstrip())
        return text[:end] if text[start:end] == last.lstrip() else text[: start + len(last.strip())]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the template, for the results."""
        if chat_template is False or chat_template is None:
            return None
        return self.tokenizer.templates.get(chat_template if isinstance(chat_template, str) else "default")

    # ---- requests ----------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability, whether each token is the likeliest) of each continuation; see ``TemplateLM``."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(self, requests: Sequence[Pair], **_: Any) -> list[tuple[float, bool]]:
        for texts, _before, after in requests:
            if not after:
                raise ConfigError([f"the continuation {texts[1]!r} has no token of its own behind its context"])
        cut = sum(len(before) + len(after) > self.max_length + 1 for _, before, after in requests)
        self._tell_cut(cut, len(requests), self.max_length)
        found = self.scorer.log_probs([(before, after) for _, before, after in requests])
        for request, score in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request[0], tuple(score))
        return [tuple(score) for score in found]  # type: ignore[misc]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text, in windows of ``max_length`` tokens that do not overlap."""
        texts = [request.args[0] for request in requests]
        windows = [list(self._windows(text)) for text in texts]
        found = iter(self.scorer.log_probs([pair for of_text in windows for pair in of_text]))
        totals = [sum(next(found).log_prob for _ in of_text) for of_text in windows]
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        ids, prefix = self.tok_encode(text), self.prefix_token_id
        if ids[:1] == [prefix]:
            self.tell(
                f"{self.path}: texts of perplexity tasks begin with two bos tokens, as in lm-eval's hf, so that "
                "figures can be compared; add_bos_token=False reads them with one"
            )
        windows = get_rolling_token_windows(
            token_list=ids, prefix_token=prefix, max_seq_len=self.max_length, context_len=1
        )
        return [make_disjoint_window(window) for window in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answer to each prompt, up to the first stop text, end token or ``max_gen_toks``."""
        groups: dict[str, list[int]] = {}  # arguments -> the requests that have them
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(index)
        answers: dict[int, str] = {}
        for indices in groups.values():
            wanted = self._wanted(requests[indices[0]].args[1])
            prompts = [self.tok_encode(requests[index].args[0]) for index in indices]
            room = self.max_length - wanted.max_new_tokens
            self._tell_cut(sum(len(prompt) > room for prompt in prompts), len(prompts), room)
            for index, found in zip(indices, self.scorer.answers(prompts, wanted), strict=True):
                answers[index] = found.text
                self.cache_hook.add_partial("generate_until", requests[index].args, found.text)
        return [answers[index] for index in range(len(requests))]

    def _wanted(self, given: dict[str, Any]) -> Wanted:
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(given, MAX_GEN_TOKS))
        until = [str(text) for text in kwargs.pop("until") or []]
        longest, samples = kwargs.pop("max_gen_toks"), kwargs.pop("do_sample")
        temperature = float(kwargs.pop("temperature", 1.0)) if samples else 0.0
        drawn = {name: value for name in _SAMPLING if (value := kwargs.pop(name, None)) is not None}
        odd = [f"{name}={value!r}" for name, value in kwargs.items() if (name, value) not in _HARMLESS]
        if odd:
            raise ConfigError([f"generation argument {one}: not supported here; leave it out" for one in odd])
        if not samples:
            drawn = {name: value for name, value in drawn.items() if name == "repetition_penalty"}
        return Wanted(max_new_tokens=longest, stop=tuple(until), sampling=Sampling(temperature=temperature, **drawn))

    def _tell_cut(self, cut: int, number: int, room: int) -> None:
        if cut:
            self.tell(
                f"{self.path}: {cut:,} of {number:,} requests are longer than {room:,} tokens and lost their beginning"
            )


def _size(given: int | str | None) -> int | None:
    """Rows of a batch; None for ``auto``."""
    if given is None or str(given).startswith("auto"):
        return None
    if not str(given).isdecimal() or int(given) < 1:
        raise ConfigError([f"batch_size: expected a number from 1 on, or auto, got {given!r}"])
    return int(given)


def _bar() -> Callable[[str, int, int], None]:
    """A bar for each kind of request, on a terminal."""
    bars: dict[str, tqdm] = {}

    def progress(what: str, done: int, total: int) -> None:
        bar = bars.get(what) or bars.setdefault(what, tqdm(total=total, desc=what, disable=not sys.stderr.isatty()))
        bar.update(done - bar.n)
        if done == total:
            bars.pop(what).close()

    return progress
