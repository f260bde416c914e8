"""Reads prompts of growing length and goes on with them: time, memory, and the same tokens.

    python benchmarks/context.py --model=runs/smollm2 --text=FILE --lengths 2048 8192 32768

FILE is text, repeated until it is long enough. Prompts are read in turns of at most 512 tokens. For
each length: seconds to read the prompt, ms a token of what follows it (both compiled before), bytes
of the cache, and what XLA says comes and goes beside it. The shortest prompt is read three times
more, in float32: in turns and in one by the kernels, and in one by XLA, all experts computed: the
tokens afterwards have to be the same (in bfloat16, tokens that are almost equally likely may change
places). Contexts that are longer than a model was trained for cost the same time; what it then says
means little.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import lte_jax
from lte_jax import config, errors
from lte_jax.data import tokenize
from lte_jax.generation import decoding
from lte_jax.generation.decoding import Decoder, laid_out
from lte_jax.plan.needs import written


def measured(decoder: Decoder, prompt: np.ndarray, new: int, turn: int | None = None) -> dict:
    """What reading a prompt and `new` tokens after it take."""
    tokens_BT, mask_BT, length, usual = laid_out([prompt], new)
    turn = turn or usual
    operands = decoder, tokens_BT, mask_BT, length, jax.random.key(0)
    read = Decoder._prefill.lower(*operands, turn=turn).compile()  # noqa: SLF001
    begin = time.monotonic()
    state = jax.block_until_ready(read(*operands))
    seconds = time.monotonic() - begin
    first, cache = int(state.tokens_B[0]), state.cache["k"].nbytes + state.cache["v"].nbytes
    tokens_BS, state = decoder.go_on(state, jnp.int32(1), new)  # compiles
    begin = time.monotonic()
    more_BS, _ = jax.block_until_ready(decoder.go_on(state, jnp.int32(new - 2), new))
    each = (time.monotonic() - begin) / (new - 2)
    said = [first, int(tokens_BS[0, 0]), *(int(t) for t in more_BS[0, : new - 2])]
    work = read.memory_analysis().temp_size_in_bytes
    return {"said": said, "seconds": seconds, "each": each, "cache": cache, "work": work}


def main() -> None:
    parser = errors.Parser(description=__doc__)
    add, count = parser.add_argument, config.flag(config.Count)
    add("--model", required=True, help="folder or hub id")
    add("--text", required=True, type=Path, help="file of text")
    add("--lengths", type=count, nargs="+", default=[2048, 8192], help="of prompts, in tokens")
    add("--new-tokens", type=count, default=34)
    add("--quantize", choices=["int8", "int6", "int4"])
    with errors.cli_errors():
        flags = parser.parse_args()
        if flags.new_tokens < 3:
            raise errors.UserError(f"--new-tokens={flags.new_tokens}: expected 3 or more")
        model, params = lte_jax.load(flags.model, "bfloat16")
        longest = 2 * max(flags.lengths)
        model = model.clone(config=dataclasses.replace(model.config, max_length=longest))
        if flags.quantize:
            params = lte_jax.quantize(model, params, flags.quantize)
        [tokens] = tokenize([flags.text.read_text()], lte_jax.load_tokenizer(flags.model))
        tokens = np.resize(tokens, max(flags.lengths)).astype(np.int32)
        decoder = Decoder.of(model, params, eos_ids=())
        print("| prompt | read | a second | ms a token after it | cache | comes and goes |")
        print("|--:|--:|--:|--:|--:|--:|", flush=True)
        for length in sorted(flags.lengths):
            found = measured(decoder, tokens[:length], flags.new_tokens)
            rate, each = length / found["seconds"], 1000 * found["each"]
            sizes = f"{written(found['cache'])} | {written(found['work'])}"
            line = f"| {length:,} | {found['seconds']:.1f} s | {rate:,.0f} | {each:.1f} | {sizes} |"
            print(line, flush=True)
        exact, floats = lte_jax.load(flags.model, "float32")
        if flags.quantize:
            floats = lte_jax.quantize(exact, floats, flags.quantize)
        prompt, said = tokens[: min(flags.lengths)], []
        for by_kernels, turn in ((True, None), (True, len(prompt)), (False, len(prompt))):
            # In float32, XLA reads prompts faster, unless told otherwise.
            decoding.reads_prompts = lambda *_, kernels=by_kernels: kernels
            reader = Decoder.of(exact.clone(config=model.config), floats, eos_ids=())
            jax.clear_caches()
            said.append(measured(reader, prompt, flags.new_tokens, turn)["said"])
        print(
            f"\n{len(prompt):,} tokens read in turns, in one, and by XLA are followed by ", end=""
        )
        print("the same tokens." if said[0] == said[1] == said[2] else f"OTHER TOKENS: {said}")


if __name__ == "__main__":
    main()
