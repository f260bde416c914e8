"""What weights of 8, 6 and 4 bits cost a model: perplexity, and experts chosen otherwise.

    python benchmarks/quantization.py --model=runs/mine/lte --data=others.jsonl \
        --calibration=texts.jsonl
    python benchmarks/quantization.py --model=owner/name --data=FILE --length=2048 --join=""

Each format is rounded to the nearest codes and, with --calibration, by GPTQ on those texts, and
then, with --scale-steps, with scales learnt on them. All are computed in float32, so that what they
cost is rounding of weights alone. "Decisions" is the share
of (token, layer, expert) that run in one of the two models and not in the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from lte_jax.kernels.quantized import BITS

import lte_jax
from lte_jax import config, data, errors
from lte_jax.files import Mirror


def main() -> None:
    parser = Mirror.add_to(errors.Parser(description=__doc__))
    add, count = parser.add_argument, config.flag(config.Count)
    add("--model", required=True, help="folder or hub id")
    add("--data", required=True, help="texts to measure on")
    add("--calibration", help="texts for GPTQ")
    add("--calibration-tokens", type=count, default=16_384)
    add("--scale-steps", type=count, help="of training for the scales, on the texts for GPTQ")
    add("--formats", nargs="+", choices=list(BITS), default=list(BITS), help="default: all")
    add("--length", type=count, default=256, help="tokens of a record")
    add("--records", type=count, help="to measure on; default: all")
    add("--newline", default="\n", help="replaces newlines in the texts")
    add("--join", help="joins all texts into one, with this between them; default: each is padded")
    add("--batch-size", type=count, default=4)
    with errors.cli_errors():
        flags = parser.parse_args()
        model, params = lte_jax.load(flags.model, "float32")
        records = _records(flags.data, "validation", flags)
        records = _first(records, flags.records or len(records))
        measure = _Measure(model, params, records, flags.batch_size)
        print(f"{len(records)} records, {records.num_tokens} tokens of {flags.data}\n")
        print("| weights | perplexity | over float32 | decisions |\n|---|--:|--:|--:|", flush=True)
        print(f"| float32 | {measure.float:.4f} | | |", flush=True)
        ways: dict[str, dict] = {"": {}}
        if flags.calibration:
            chosen = _records(flags.calibration, "train", flags)
            chosen = _first(chosen, max(1, flags.calibration_tokens // flags.length))
            texts = {"calibration": chosen.tokens_RL, "mask": chosen.segments_RL}
            ways[", GPTQ"] = texts
            if flags.scale_steps:
                ways[", GPTQ, scales learnt"] = texts | {"scale_steps": flags.scale_steps}
        elif flags.scale_steps:
            parser.error("--scale-steps are on --calibration: give both")
        for format in flags.formats:
            for name, how in ways.items():
                rounded = lte_jax.quantize(model, params, format, **how)
                print(measure.row(format + name, rounded), flush=True)


def _records(source: str, split: str, flags) -> data.Records:
    """Texts as records; those of calibration packed."""
    texts = data.read_texts(source, "text", flags.newline, None, split, flags.join)
    documents = data.tokenize(texts, lte_jax.load_tokenizer(flags.model))
    packed = split == "train" or flags.join is not None
    return (data.pack if packed else data.pad)(documents, flags.length)


def _first(records: data.Records, count: int) -> data.Records:
    return records.take(np.arange(min(count, len(records))))


class _Measure:
    """Perplexity on records, and which experts run, beside those of the float model."""

    def __init__(self, model, params, records: data.Records, batch_size: int):
        self.model, self.records, self.batch_size = model, records, batch_size
        self.params = params
        self._apply = jax.jit(self._sums)
        self.float, _ = self._of(params)

    def row(self, name: str, rounded) -> str:
        perplexity, changed = self._of(rounded)
        decisions = "" if self.model.lte is None else f"{changed:.2%}"
        over = perplexity / self.float - 1
        return f"| {name} | {perplexity:.4f} | {over:+.2%} | {decisions} |"

    def _of(self, params) -> tuple[float, float]:
        sums = np.sum([self._apply(params, self.params, *part) for part in self._parts()], axis=0)
        loss, predicted, changed, decided = sums
        return math.exp(loss / predicted), float(changed / max(decided, 1))

    def _parts(self) -> Iterator[tuple]:
        for batch in data.eval_batches(self.records, self.batch_size):
            yield jnp.asarray(batch["tokens"]), jnp.asarray(batch["segments"])

    def _sums(self, params, floats, tokens_BL, segments_BL):
        outs = [lte_jax.apply(self.model, p, tokens_BL, mask=segments_BL) for p in (params, floats)]
        logp_BLV = jax.nn.log_softmax(outs[0].logits[:, :-1])
        next_BL1 = tokens_BL[:, 1:, None]
        same_BL = (segments_BL[:, 1:] == segments_BL[:, :-1]) & (segments_BL[:, 1:] > 0)
        logp_BL = jnp.take_along_axis(logp_BLV, next_BL1, axis=-1)[..., 0]
        changed = decided = jnp.float32(0)
        if self.model.lte is not None:
            real_1BL1 = (segments_BL > 0)[None, ..., None]
            differs_NBLE = (outs[0].active != outs[1].active) & real_1BL1
            changed, decided = (
                jnp.sum(differs_NBLE),
                jnp.sum(real_1BL1) * differs_NBLE[:, 0, 0].size,
            )
        return jnp.stack([-jnp.sum(logp_BL * same_BL), jnp.sum(same_BL), changed, decided])


if __name__ == "__main__":
    main()
