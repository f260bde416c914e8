"""From texts to the texts that follow them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Unpack, overload

import numpy as np

from lte_jax import checks, interrupt
from lte_jax.data import tokenize
from lte_jax.errors import Given, UserError, one_line
from lte_jax.generation.tokens import Settings, generate
from lte_jax.model import Transformer

_BYTE = re.compile("<0x[0-9A-F]{2}>")  # a token of byte fallback


@overload
def generate_text(
    model: Transformer,
    params: Mapping[str, Any],
    tokenizer: Any,
    prompt: str,
    *,
    chat: bool = False,
    write: Callable[[str], Any] | None = None,
    **settings: Unpack[Settings],
) -> str: ...
@overload
def generate_text(
    model: Transformer,
    params: Mapping[str, Any],
    tokenizer: Any,
    prompt: Sequence[str],
    *,
    chat: bool = False,
    write: None = None,
    **settings: Unpack[Settings],
) -> list[str]: ...
def generate_text(
    model: Transformer,
    params: Mapping[str, Any],
    tokenizer: Any,
    prompt: Given[str | Sequence[str]],
    *,
    chat: bool = False,
    write: Given[Callable[[str], Any] | None] = None,
    **settings: Unpack[Settings],
) -> str | list[str]:
    """The text that follows `prompt`; of a list of prompts, the list of theirs.

        lte_jax.generate_text(model, params, tokenizer, "Once upon a time", max_new_tokens=50)
        lte_jax.generate_text(model, params, tokenizer, ["Once", "Twice"], max_new_tokens=50)

    Args:
      model: dense or LTE, as from `lte_jax.load`.
      params: its parameters.
      tokenizer: as from `lte_jax.load_tokenizer`.
      prompt: a text, or several: one batch, whose texts are those that each would get alone.
      chat: each prompt is what a user says, to be put in the tokenizer's own chat template.
      write: called with each piece of the text as it comes, never half a character; of one prompt.
      **settings: those of `generate`. With `chat`, the tokenizer's end of text ends a text, too.

    Raises:
      UserError: on prompts that are no texts or empty, and as `generate` does.
    """
    checks.model(model, params)
    checks.function("write", write)
    prompts = [prompt] if isinstance(prompt, str) else _texts(prompt)
    if chat:
        given = tokenize([asked(tokenizer, p) for p in prompts], tokenizer, start=False)
        ends = {*model.config.eos_ids, tokenizer.eos_token_id} - {None}
        settings.setdefault("eos_ids", sorted(ends))
    else:
        given = tokenize(prompts, tokenizer)
    for text, ids in zip(prompts, given, strict=True):
        if not len(ids):
            raise UserError(
                f"prompt {text!r} has no tokens: write at least a word, as this tokenizer puts no "
                "token in front of a text"
            )
    if isinstance(prompt, str):
        return _written(model, params, tokenizer, given[0].tolist(), write, settings)
    if write is not None:
        raise UserError("write is of one prompt: expected a text, or write=None with a list")
    new = generate(model, params, given, **settings)
    return [_after(tokenizer, ids.tolist(), more) for ids, more in zip(given, new, strict=True)]


def _texts(prompt: Any) -> list[str]:
    if not isinstance(prompt, list | tuple) or not all(isinstance(p, str) for p in prompt):
        kinds = {type(p).__name__ for p in prompt} if isinstance(prompt, list | tuple) else ""
        raise UserError(
            f"prompt is {type(prompt).__name__}{f' of {sorted(kinds)}' if kinds else ''}: expected "
            "a string or a list of strings (for ids: generate)"
        )
    if not prompt:
        raise UserError("prompt is an empty list: expected at least one text")
    return list(prompt)


def asked(tokenizer: Any, said: str | Sequence[Mapping[str, str]]) -> str:
    """The chat of these messages ("role", "content"), or of a user's one, up to the answer.

    Raises:
      UserError: without a chat template, and where it refuses the messages.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise UserError(
            "chat: the tokenizer has no chat template: expected that of a model trained to chat; "
            "or give the prompt as plain text"
        )
    messages = [{"role": "user", "content": said}] if isinstance(said, str) else list(said)
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except ImportError:
        raise UserError(
            "chat templates are read by jinja2, which is not installed: pip install jinja2"
        ) from None
    except Exception as error:  # of the template's own
        raise UserError(f"chat: the chat template refuses it ({one_line(error)})") from None


def _written(model, params, tokenizer, given: list[int], write, settings: Settings) -> str:
    """The text that follows the ids of one prompt, in pieces to `write`."""
    if write is None:
        return _after(tokenizer, given, *generate(model, params, [given], **settings))
    ids, skip, shown = list(given), len(decode(tokenizer, given)), 0

    def show(text: str) -> None:
        nonlocal shown
        if len(text) > shown:
            write(text[shown:])
            shown = len(text)

    def stream(fresh: list[list[int]]) -> None:
        ids.extend(fresh[0])
        show(settled_text(tokenizer, ids)[skip:])

    [new] = generate(model, params, [given], stream=stream, **settings)
    text = _after(tokenizer, given, new)
    show(text)
    return text


def _after(tokenizer: Any, given: list[int], new: list[int]) -> str:
    return decode(tokenizer, given + new)[len(decode(tokenizer, given)) :]


def complete(
    model: Transformer,
    params: Mapping[str, Any],
    tokenizer: Any,
    prompts: Sequence[np.ndarray],
    batch_size: int,
    *,
    label: str = "generating",
    **settings: Any,
) -> list[str]:
    """The text that follows each prompt of token ids, `batch_size` of similar length at a time.

    The tokenizer's end of text ends a text, as do those of the model. `label` is of the progress
    bar on terminals, `settings` are those of `generate`.
    """
    from tqdm import tqdm

    ends = {*model.config.eos_ids, tokenizer.eos_token_id} - {None}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    with tqdm(total=len(prompts), desc=label, unit=" texts", disable=None, leave=False) as bar:
        for start in range(0, len(order), batch_size):
            interrupt.check("while generating")
            chosen = order[start : start + batch_size]
            filled = [*chosen, *[chosen[-1]] * (batch_size - len(chosen))]  # one program for all
            batch = [prompts[i] for i in filled]
            new = generate(model, params, batch, eos_ids=sorted(ends), **settings)
            for i, ids in zip(chosen, new, strict=False):
                texts[i] = decode(tokenizer, ids).strip()
            bar.update(len(chosen))
    return texts


def settled_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """The beginning of the text of `ids` that no further token can change.

    Half a character decodes to replacement characters at the end, which are held back. So is a run
    of byte-fallback tokens ("<0x41>"): it is decoded as a whole, and one invalid byte turns all its
    characters into replacements. Special tokens, which decoding skips, do not end a run.
    """
    end, special = len(ids), set(tokenizer.all_special_ids)
    while end and (
        ids[end - 1] in special
        or _BYTE.fullmatch(tokenizer.convert_ids_to_tokens(ids[end - 1]) or "")
    ):
        end -= 1
    return decode(tokenizer, ids[:end]).rstrip("\ufffd")


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of token ids, without special tokens and with spaces as they are."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
