"""Dense and LTE models in the LM Evaluation Harness (lm-eval), without another model in between.

    import lm_eval
    from lte_jax.lm_eval import LMEval

    model, params = lte_jax.load("runs/mine/lte")
    lm = LMEval(model, params, lte_jax.load_tokenizer("runs/mine/lte"))
    results = lm_eval.simple_evaluate(model=lm, tasks=["arc_easy", "hellaswag"])

Texts are encoded, cut and scored as lm-eval's own `HFLM` does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lte_jax import checks
from lte_jax.errors import UserError
from lte_jax.generation import generate
from lte_jax.model import Transformer
from lte_jax.routing import dial
from lte_jax.scoring import loglikelihoods
from lte_jax.selection import Routing

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import (
        handle_stop_sequences,
        normalize_gen_kwargs,
        postprocess_generated_text,
    )
except ImportError:
    raise UserError("lte_jax.lm_eval needs lm-eval: pip install 'lte-jax[lm-eval]'") from None

MAX_NEW_TOKENS = 256  # of tasks that set no number, as in HFLM
# Settings of `generate_until` that ask for what is done anyway.
_NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "use_cache": True}


class LMEval(TemplateLM):
    """A model for `lm_eval.simple_evaluate(model=...)`.

    Args:
      model: a decoder, dense or LTE.
      params: its parameters.
      tokenizer: its tokenizer, as from `lte_jax.load_tokenizer`.
      routing: as in `lte_jax.apply`.
      threshold: in place of `model.lte.threshold`.
      sparsity: share of experts to skip, in place of a threshold, see `lte_jax.calibrate`.
      batch_size: of forward passes and generation.
      seed: of sampled generation.

    Raises:
      UserError: on a model that does not predict the next token, and on its arguments.
    """

    def __init__(
        self,
        model: Transformer,
        params: Mapping[str, Any],
        tokenizer: Any,
        *,
        routing: Routing | str | None = None,
        threshold: float | Any = None,
        sparsity: float | Any = None,
        batch_size: int | Any = 8,
        seed: int = 0,
    ):
        super().__init__()
        checks.model(model, params)
        checks.integer("batch_size", batch_size, 1)
        checks.language_model(model.config, "lm-eval")
        self.model, self.params, self.tokenizer = model, params, tokenizer
        self.batch_size, self.seed = batch_size, seed
        threshold = dial(model.lte, routing, threshold, sparsity)
        self.how = {"routing": routing, "threshold": threshold}

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end-of-text token."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: <s>, or else the end-of-text token."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else first

    @property
    def max_length(self) -> int:
        """Tokens that the model reads at most."""
        return self.model.config.max_length

    @property
    def tokenizer_name(self) -> str:
        """A name for lm-eval's cache of requests."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Token ids; special tokens as the tokenizer adds them, unless the text has them."""
        if add_special_tokens is None and string.startswith(
            self.tokenizer.decode(self.prefix_token_id)
        ):
            add_special_tokens = False
        settings = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **settings)

    def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
        found = self._score([(context, new) for _, context, new in requests])
        for (key, *_), answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", key, answer)
        return found

    def _score(self, pairs) -> list[tuple[float, bool]]:
        settings = self.how | {"batch_size": self.batch_size}
        found, _ = loglikelihoods(self.model, self.params, pairs, **settings)
        return [tuple(one) for one in found]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text; every token is predicted once, in full windows."""
        pairs, owners = [], []
        for owner, request in enumerate(requests):
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            mine = list(map(utils.make_disjoint_window, windows))
            pairs += mine
            owners += [owner] * len(mine)
        totals = [0.0] * len(requests)
        for owner, (nats, _) in zip(owners, self._score(pairs), strict=True):
            totals[owner] += nats
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """The continuation of each text, up to its first stop string or the end of the text."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        texts = [""] * len(requests)
        for numbers in groups.values():
            settings, stops = self._settings(requests[numbers[0]].args[1])
            room = self.max_length - settings["max_new_tokens"]
            prompts = {n: self.tok_encode(requests[n].args[0])[-room:] for n in numbers}
            numbers = sorted(numbers, key=lambda n: len(prompts[n]), reverse=True)
            for start in range(0, len(numbers), self.batch_size):
                batch = numbers[start : start + self.batch_size]
                new = self._generate([prompts[n] for n in batch], stops, settings)
                for n, text in zip(batch, new, strict=True):
                    texts[n] = text
                    self.cache_hook.add_partial("generate_until", requests[n].args, text)
        return texts

    def _settings(self, asked: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Settings of `lte_jax.generate`, and stop strings, from those of a request."""
        asked = normalize_gen_kwargs(dict(asked), MAX_NEW_TOKENS)
        end = self.tokenizer.decode(self.eot_token_id)
        stops = handle_stop_sequences(asked.pop("until", None), eos=end)
        settings = {"max_new_tokens": asked.pop("max_gen_toks")}
        settings["temperature"] = asked.pop("temperature") if asked.pop("do_sample") else 0.0
        settings |= {name: asked.pop(name) for name in ("top_k", "top_p") if name in asked}
        for name, value in asked.items():
            if _NEUTRAL.get(name) != value:
                raise UserError(
                    f"generation setting {name}={value!r} is not supported: expected until, "
                    "max_gen_toks, do_sample, temperature, top_k and top_p"
                )
        if settings["max_new_tokens"] >= self.max_length:
            raise UserError(
                f"max_gen_toks={settings['max_new_tokens']} leaves no room for a prompt: the "
                f"model's max_length is {self.max_length}"
            )
        ends = {*self.model.config.eos_ids, self.eot_token_id}
        return settings | {"eos_ids": sorted(ends), "seed": self.seed} | self.how, stops

    def _generate(self, prompts, stops: list[str], settings) -> list[str]:
        new: list[list[int]] = [[] for _ in prompts]

        def text_of(row: list[int]) -> str:
            return self.tokenizer.decode(row, skip_special_tokens=True)

        def stream(fresh: list[list[int]]) -> None:
            for row, more in zip(new, fresh, strict=True):
                row += more
            if all(self._has_ended(row, text_of(row), stops, settings) for row in new):
                raise _AllEnded

        try:
            generate(self.model, self.params, prompts, stream=stream, **settings)
        except _AllEnded:
            pass
        return [postprocess_generated_text(text_of(row), stops, None) for row in new]

    @staticmethod
    def _has_ended(row, text: str, stops: list[str], settings) -> bool:
        done = bool(row) and row[-1] in settings["eos_ids"]
        return done or any(stop and stop in text for stop in stops)

    def apply_chat_template(self, chat_history, add_generation_prompt: bool = True) -> str:
        """The prompt that the tokenizer's template makes of messages."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )


class _AllEnded(Exception):
    """Ends a generation whose texts all have a stop string."""
