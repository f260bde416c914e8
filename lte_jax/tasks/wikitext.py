"""WikiText: perplexity per token as papers on pruning measure it, and perplexity per word.

Per token: the test split joined by blank lines and tokenised once, cut into blocks without overlap;
the mean loss over all blocks. The first token of a block is not predicted, and what is left over at
the end is dropped. Source: github.com/locuslab/wanda, lib/eval.py. Per word: every token is
predicted once, in the windows of lm-eval's rolling log-likelihood, over the number of words between
spaces. These are two tasks, because their figures do not compare.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from lte_jax import checks
from lte_jax.data import read_texts, tokenize
from lte_jax.errors import UserError
from lte_jax.scoring import loglikelihoods
from lte_jax.tasks.measurement import Measured, Run, mean, place


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Perplexity of a running text.

    Attributes:
      name: as in `--tasks`.
      hub: its data set on the Hugging Face hub.
      folder: where it lies in a folder of several data sets.
      words: per word between spaces, not per token.
      split: of the data set.
      join: what stands between its records.
      context: tokens of a block, if the model reads as many.
    """

    name: str
    hub: str
    folder: str
    words: bool = False
    split: str = "test"
    join: str = "\n\n"
    context: int = 2048

    def measure(self, run: Run) -> tuple[dict[str, Measured], float]:
        """The perplexity, named with its context and stride, and the share of experts skipped.

        Raises:
          UserError: on a model without a head of next tokens, and on a text shorter than one block.
        """
        length = min(run.length or self.context, run.model.config.max_length)
        source = place(run.source, self.hub, self.folder)
        [text] = read_texts(source, limit=run.limit, split=self.split, join=self.join)
        [ids] = tokenize([text], run.tokenizer)
        checks.token_ids(ids, run.model.config.vocab_size, source)
        if len(ids) < max(length, 2):
            raise UserError(
                f"{source}: {len(ids)} tokens, fewer than one block of {length}: give --length"
            )
        pairs = _windows(ids, length) if self.words else _blocks(ids, length)
        scores, sparsity = loglikelihoods(run.model, run.params, pairs, **run.how)
        predicted_R = np.array([len(new) for _, new in pairs])
        loss_R = -np.array([score.nats for score in scores])
        if self.words:
            number = len(text.split())
            value = math.exp(loss_R.sum() / number)
            return {f"perplexity / word, context {length}": Measured(value, None, number)}, sparsity
        loss = mean(loss_R / predicted_R)
        value = math.exp(loss.value)
        error = None if loss.error is None else value * loss.error
        name = f"perplexity / token, context and stride {length}"
        return {name: Measured(value, error, len(pairs))}, sparsity


def _blocks(ids: np.ndarray, length: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Blocks of `length` tokens, of which the first is given."""
    blocks = ids[: len(ids) // length * length].reshape(-1, length)
    return [(block[:1], block[1:]) for block in blocks]


def _windows(ids: np.ndarray, length: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each token but the first predicted once, the last ones with `length` tokens of context."""
    pairs = [(ids[:1], ids[1 : length + 1])]
    for start in range(length + 1, len(ids), length):
        end = min(start + length, len(ids))
        pairs.append((ids[end - length - 1 : start], ids[start:end]))
    return pairs


_HUB = "Salesforce/wikitext:wikitext-"
_TASKS = (
    Perplexity("wikitext", f"{_HUB}2-raw-v1", "wikitext-2"),
    Perplexity("wikitext_words", f"{_HUB}2-raw-v1", "wikitext-2", words=True),
    Perplexity("wikitext103", f"{_HUB}103-raw-v1", "wikitext-103"),
    Perplexity("wikitext103_words", f"{_HUB}103-raw-v1", "wikitext-103", words=True),
)
TASKS = {task.name: task for task in _TASKS}
