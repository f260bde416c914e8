"""Evaluation: perplexity, sparsity, cost per token, decoding latency and a sample text.

`evaluate` measures a model and, if given, the dense model it was made from. It returns plain data,
which report.py turns into tables and figures.

Dimension key: B batch  L length  R records  E experts  N layers  V vocabulary
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lte_jax import checks, interrupt, quantization
from lte_jax.config import RoutingName, own_threshold
from lte_jax.data import Records, eval_batches, tokenize
from lte_jax.errors import Given, UserError
from lte_jax.generation import complete, decode, generate_text
from lte_jax.generation.decoding import Decoder
from lte_jax.generation.latency import decode_latency
from lte_jax.losses import layer_means, loss_mask
from lte_jax.model import Transformer, forward
from lte_jax.objective import head_losses, predicted
from lte_jax.routing import dials
from lte_jax.routing import make as make_routing
from lte_jax.selection import Routing
from lte_jax.sparsity import bytes_per_token, flops_per_token
from lte_jax.tasks import Task

HISTOGRAM_BINS = 64  # of router scores, equal parts of [0, 1]
UNION_SIZES = (1, 2, 4, 8, 16)  # batch sizes for which the union of active experts is measured
_GIGA = 2**30  # of FLOPs, as in the paper's Table 1, and of bytes of weights


def evaluate(
    model: Transformer,
    params: Mapping[str, Any],
    records: Given[Records],
    *,
    baseline: tuple[Transformer, Mapping[str, Any]] | None = None,
    task: Task | None = None,
    tokenizer: Any = None,
    routing: Given[Routing | RoutingName | None] = None,
    threshold: Given[float | None] = None,
    sparsity: Given[float | Sequence[float] | None] = None,
    name: Given[str | None] = None,
    batch_size: Given[int] = 8,
    prompt: Given[str] = "Once upon a time",
    sample_tokens: Given[int] = 100,
    sample_temperature: float = 0.0,
    latency_rounds: int = 9,
) -> dict[str, Any]:
    """Measures quality, sparsity and cost of a model, and of its dense baseline.

        records = data.pad(data.tokenize(texts, tokenizer), length=256)
        results = lte_jax.evaluate(model, params, records, tokenizer=tokenizer)
        print(report.table([results]))

    Args:
      model: dense or LTE.
      params: its parameters.
      records: the text to predict, see `data.pad`.
      baseline: the dense model to compare with, and its parameters.
      task: that made the records, for its metrics; None: perplexity.
      tokenizer: for figures per byte and a sample text, else left out; tasks that generate need it.
      routing: of `model`, as in `lte_jax.apply`.
      threshold: in place of `model.lte.threshold`.
      sparsity: in place of a threshold, see `lte_jax.calibrate`; of several, each is measured.
      name: of `model` in the results; None: "LTE" or "dense".
      batch_size: of the forward passes, in records.
      prompt: start of the sample text.
      sample_tokens: length of the sample text, at most what the model has positions for.
      sample_temperature: 0: greedy.
      latency_rounds: number of timings; their median is reported. 0: no timing.

    Returns:
      JSON-serialisable {"tokens", "bytes", "records", "of_records", "length", "models": [...]}, the
      baseline first. Of "of_records" (None: unknown), "records" were measured, in a task of labels
      texts. Each model has "name", "token_ppl", "sparsity", "gflops_per_token", "latency_ms" and
      more. Latency is per decoded token at batch size 1, beside all experts if without a baseline.

    Raises:
      UserError: on arguments that do not fit, before anything is measured; as `perplexity` does.
    """
    _check(model, params, baseline, name, batch_size, sample_tokens, latency_rounds)
    checks.routing_of(model, routing)
    entrants = [] if baseline is None else [_Entrant("dense", *baseline)]
    at = dials(name, model.lte, routing, threshold, sparsity)
    entrants += [_Entrant(who, model, params, routing, used) for who, used in at.items()]
    sample = (tokenizer, prompt, sample_tokens, sample_temperature)
    results = _measured(entrants, records, batch_size, task, sample)
    if latency_rounds and model.config.head == "lm":
        _add_latency(results["models"], entrants, records, latency_rounds)
    return results


def _measured(entrants, records, batch_size: int, task: Task | None, sample: tuple) -> dict:
    """All of the results but latency; refuses bad records and prompts before it measures."""
    tokenizer, entries, model = sample[0], [], entrants[0].model
    for entrant in entrants:
        entrant.check(records, *sample[:3])
    num_bytes = None if tokenizer is None or task else scored_bytes(records, tokenizer)
    for e in entrants:
        entries.append(e.measured(records, batch_size, num_bytes, task))
        if task is not None and task.decoding is not None:
            entries[-1] |= e.written(records, batch_size, task, tokenizer)
        entries[-1] |= e.sample(*sample)
    results = {"tokens": _count_predicted(records), "bytes": num_bytes, "models": entries}
    number, length = records.tokens_RL.shape
    results |= {"records": number, "of_records": records.whole, "length": length}
    if task is not None:
        labelled = "labels" in records.more  # several texts may share a record
        texts = int(predicted(model, records[:]).sum()) if labelled else number
        whole = None if labelled else records.whole
        results |= {"task": task.name, "records": texts, "of_records": whole}
    if records.examples:
        results["references"] = [list(example.references) for example in records.examples]
    return results


@dataclasses.dataclass(frozen=True)
class _Entrant:
    """A model to measure, with its routing and threshold; None: the model's own."""

    name: str
    model: Transformer
    params: Mapping[str, Any]
    routing: Routing | str | None = None
    threshold: float | Any = None

    def check(self, records: Records | Any, tokenizer: Any, prompt: str | Any, tokens: int) -> None:
        """Refuses records and prompts that do not fit the model."""
        _check_records(self.model, records, self.routing, self.threshold)
        if tokenizer is None or not tokens:
            return
        if not isinstance(prompt, str):
            raise UserError(f"prompt is {type(prompt).__name__}: expected a text")
        length, most = len(tokenize([prompt], tokenizer)[0]), self.model.config.max_length
        if not 0 < length < most:
            raise UserError(
                f"prompt {prompt[:50]!r} has {length} tokens: expected 1 to {most - 1}, because "
                f"the model's max_length is {most}"
            )

    def measured(
        self, records: Records, batch_size: int, num_bytes: int | None, task: Task | None
    ) -> dict[str, Any]:
        """The results, except sample text and latency."""
        settings = {"routing": self.routing, "threshold": self.threshold, "batch_size": batch_size}
        settings |= {"num_bytes": num_bytes, "label": self.name, "task": task}
        quality = perplexity(self.model, self.params, records, **settings)
        config, lte, dtype = self.model.config, self.model.lte, self.model.dtype
        sparsity, widths = quality["sparsity"], quantization.widths(self.params, dtype)
        return {
            "name": self.name,
            "config": dataclasses.asdict(config),
            "lte": None if lte is None else dataclasses.asdict(lte),
            "threshold": self._threshold(),
            "dtype": quantization.format_of(self.params) or dtype,
            **quality,
            "gflops_per_token": flops_per_token(config, lte, sparsity) / _GIGA,
            "gbytes_per_token": bytes_per_token(config, lte, sparsity, *widths) / _GIGA,
        }

    def _threshold(self) -> float | None:
        """The threshold in use, of several layers their mean; None for a dense model."""
        used = own_threshold(self.model.lte) if self.threshold is None else self.threshold
        return None if self.model.lte is None else float(np.mean(used))

    def written(
        self, records: Records, batch_size: int, task: Task, tokenizer: Any
    ) -> dict[str, Any]:
        """What the model writes after the task's prompts, and its metrics."""
        if tokenizer is None or not records.examples:
            raise UserError(
                f"task {task.name!r} generates: expected a tokenizer, and records of the task "
                "with their examples"
            )
        prompts, references = map(list, zip(*records.examples, strict=True))
        settings = {"routing": self.routing, "threshold": self.threshold, "label": self.name}
        settings |= task.decoding or {}
        texts = complete(self.model, self.params, tokenizer, prompts, batch_size, **settings)
        first = {"prompt": decode(tokenizer, prompts[0].tolist()) + "\n", "text": texts[0]}
        return {"metrics": task.score(texts, references), "texts": texts, "sample": first}

    def sample(self, tokenizer: Any, prompt: str, tokens: int, temperature: float) -> dict:
        """A continuation of the prompt by up to `tokens`, as far as the model has positions."""
        if tokenizer is None or not tokens:
            return {}
        room = self.model.config.max_length - len(tokenize([prompt], tokenizer)[0])
        settings = {"routing": self.routing, "threshold": self.threshold}
        settings |= {"temperature": temperature, "max_new_tokens": min(tokens, room)}
        text = generate_text(self.model, self.params, tokenizer, prompt, **settings)
        return {"sample": {"prompt": prompt, "text": text}}


def _add_latency(entries, entrants: Sequence[_Entrant], records: Records, rounds: int) -> None:
    """Adds times per token, and their ratio to the first: the baseline, or all experts active."""
    decoders = [Decoder.of(e.model, e.params, e.routing, e.threshold) for e in entrants]
    if entrants[0].model.lte is not None:
        decoders.insert(0, Decoder.of(entrants[0].model, entrants[0].params, "dense"))
    first = records.tokens_RL[0][records.segments_RL[0] == 1]
    found = decode_latency(decoders, first, rounds=rounds)
    for entry, times in zip(entries, found[-len(entries) :], strict=True):
        entry |= times


def perplexity(
    model: Transformer,
    params: Mapping[str, Any],
    records: Given[Records],
    *,
    routing: Given[Routing | RoutingName | None] = None,
    threshold: Given[float | None] = None,
    batch_size: Given[int] = 8,
    num_bytes: int | None = None,
    task: Task | None = None,
    label: str = "evaluating",
) -> dict[str, Any]:
    """Loss and perplexity of the model on `records`, and the sparsity of its routing.

    Args:
      model: dense or LTE.
      params: its parameters.
      records: token t + 1 is predicted wherever it belongs to the same text as token t.
      routing: as in `lte_jax.apply`.
      threshold: in place of `model.lte.threshold`.
      batch_size: of the forward passes, in records.
      num_bytes: of the predicted text in UTF-8, for the figures per byte.
      task: that made the records; metrics of labels take the place of token_ppl.
      label: of the progress bar on terminals; names the model in errors.

    Returns:
      loss (nats per token), token_ppl; with `num_bytes` also bits_per_byte and byte_ppl; sparsity
      and sparsity_per_layer (0 and None if all experts run); score_histogram, the number of router
      scores in each of 64 equal parts of [0, 1]; union_sparsity, from batch size to the fraction
      of experts that no record of a batch needs.

    Raises:
      UserError: on records, routing or threshold that do not fit the model, and if parameters or
        the loss are not finite.
    """
    from tqdm import tqdm

    _check_records(model, records, routing, threshold)
    if task is None:
        checks.language_model(model.config, "perplexity")
    checks.finite_params(params, label)
    batch_size = min(batch_size, len(records))
    totals: Any = None
    logits: list[np.ndarray] = []
    with tqdm(total=len(records), desc=label, unit=" records", disable=None, leave=False) as bar:
        for batch in eval_batches(records, batch_size):
            interrupt.check("while measuring")
            sums = _measure(model, params, batch, threshold, routing=routing)
            sums = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
            if "logits" in sums:
                logits.append(sums.pop("logits"))
            totals = sums if totals is None else jax.tree.map(np.add, totals, sums)
            bar.update(batch_size)
    summary = _summary(model, totals, num_bytes, label)
    if task is None or task.decoding is not None:
        return summary
    del summary["token_ppl"]  # the loss is of labels
    whole = records[:]
    texts_RS, logits_RSY = predicted(model, whole), np.concatenate(logits)[: len(records)]
    return {"metrics": task.score(logits_RSY[texts_RS], whole["labels"][texts_RS])} | summary


@functools.partial(jax.jit, static_argnames=("model", "routing"))
def _measure(model, params, batch, threshold, *, routing) -> dict[str, Any]:
    """Sums over one batch, with the weights needed to turn them into means."""
    token_mask_BL = batch["segments"] > 0
    out = forward(model, params, batch, routing=routing, threshold=threshold)
    nll, _ = head_losses(model, params, out, batch, {"predicted": jnp.float32(1)})
    sums = {"nll": nll, "predicted": jnp.sum(predicted(model, batch))}
    if model.config.head == "classes":
        sums["logits"] = out.logits
    if out.scores is None:
        return sums
    bins_NBLE = jnp.clip(out.scores * HISTOGRAM_BINS, 0, HISTOGRAM_BINS - 1).astype(jnp.int32)
    bins_NBLE = jnp.where(token_mask_BL[None, :, :, None], bins_NBLE, HISTOGRAM_BINS)
    sums["histogram"] = jnp.bincount(bins_NBLE.ravel(), length=HISTOGRAM_BINS + 1)[:-1]
    if not make_routing(routing, model.config, model.lte).skips:  # all experts run
        return sums
    sums["real"] = jnp.sum(token_mask_BL, dtype=jnp.float32)
    sums["skipped_N"] = (1.0 - layer_means(out.active, token_mask_BL)) * sums["real"]
    sums["union"] = {}
    if out.active.dtype != bool:  # shares of matrices: nothing to unite
        return sums
    # What a kernel can skip at these batch sizes (Fig. 15).
    for size in (size for size in UNION_SIZES if size <= len(token_mask_BL)):
        together_1L = jnp.all(token_mask_BL[:size], axis=0, keepdims=True)
        needed_N1LE = jnp.any(out.active[:, :size], axis=1, keepdims=True)
        weight = jnp.sum(together_1L, dtype=jnp.float32)
        skipped = (1.0 - jnp.mean(layer_means(needed_N1LE, together_1L))) * weight
        sums["union"][size] = {"skipped": skipped, "weight": weight}
    return sums


def _summary(model, totals, num_bytes: int | None, label: str) -> dict[str, Any]:
    loss = float(totals["nll"] / totals["predicted"])
    if not math.isfinite(loss):
        raise UserError(
            f"model {label!r}: the loss over these records is {loss}, though all its parameters "
            f"are finite: logits overflow in {model.dtype}; check the text, or use another dtype"
        )
    summary: dict[str, Any] = {"loss": loss, "token_ppl": _exp(loss, "token", label)}
    if num_bytes:
        per_byte = float(totals["nll"]) / num_bytes
        summary["bits_per_byte"] = per_byte / math.log(2)
        summary["byte_ppl"] = _exp(per_byte, "byte", label)
    summary |= {"sparsity": 0.0, "sparsity_per_layer": None, "score_histogram": None}
    if "histogram" in totals:
        summary["score_histogram"] = [int(count) for count in totals["histogram"]]
    if "skipped_N" in totals:
        per_layer_N = (totals["skipped_N"] / totals["real"]).round(6)  # the sums are float32
        summary["sparsity"] = float(per_layer_N.mean())
        summary["sparsity_per_layer"] = per_layer_N.tolist()
        summary["union_sparsity"] = {
            str(size): float(union["skipped"] / union["weight"])
            for size, union in totals["union"].items()
            if union["weight"] > 0
        }
    return summary


def _exp(nats: float, unit: str, label: str) -> float:
    """The perplexity of a loss in nats."""
    try:
        return math.exp(nats)
    except OverflowError:
        raise UserError(
            f"model {label!r}: a loss of {nats:.6g} nats per {unit} is a perplexity too large for "
            "a float: check that text and tokenizer fit the model"
        ) from None


def scored_bytes(records: Records, tokenizer: Any) -> int:
    """UTF-8 bytes of the text that `perplexity` predicts: each text except its first token."""
    total = 0
    for tokens_L, segments_L in zip(records.tokens_RL, records.segments_RL, strict=True):
        for segment in range(1, int(segments_L.max()) + 1):
            ids = tokens_L[segments_L == segment].tolist()
            given, whole = decode(tokenizer, ids[:1]), decode(tokenizer, ids)
            total += len(whole.encode()) - len(given.encode())
    return total


def _check_records(model: Transformer, records: Any, routing: Any, threshold: Any) -> None:
    if not isinstance(records, Records):
        raise UserError(
            f"records is {type(records).__name__}: expected data.Records, which data.pad makes "
            "from lists of token ids"
        )
    checks.batch(model.config, records.tokens_RL, records.segments_RL, name="records.tokens_RL")
    make_routing(routing, model.config, model.lte)
    checks.threshold(threshold, model.config.num_layers)
    if not _count_predicted(records):
        raise UserError("records has no token to predict: expected texts of at least 2 tokens")


def _count_predicted(records: Records) -> int:
    masks = jax.tree.map(jnp.asarray, (records.segments_RL, records.more.get("answers")))
    return int(jnp.sum(loss_mask(*masks)))


def _check(model, params, baseline, name, batch_size, sample_tokens, latency_rounds) -> None:
    if not isinstance(name, str | None):
        raise UserError(f"name={name!r}: expected a text, or None")
    checks.model(model, params)
    checks.integer("batch_size", batch_size, 1)
    checks.integer("sample_tokens", sample_tokens, 0)
    checks.integer("latency_rounds", latency_rounds, 0)
    if baseline is None:
        return
    if not isinstance(baseline, tuple | list) or len(baseline) != 2:
        raise UserError(
            f"baseline is {type(baseline).__name__}: expected a dense model and its parameters, "
            "(model, params)"
        )
    checks.model(baseline[0], baseline[1], "baseline")
    if baseline[0].lte is not None:
        raise UserError("baseline is an LTE model: expected the dense model to compare with")
    mine, theirs = model.config.vocab_size, baseline[0].config.vocab_size
    if mine != theirs:
        raise UserError(
            f"the model's vocabulary has {mine} tokens, the baseline's {theirs}: use the dense "
            "model it was made from, with the same tokenizer"
        )
