"""Times decoding, of several models in turn."""

from __future__ import annotations

import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lte_jax import interrupt
from lte_jax.generation.decoding import Decoder

_LATENCY_TOKENS = 32  # length of the prompt, and of the timed continuation


def decode_latency(
    decoders: Sequence[Decoder], prompt: np.ndarray, *, rounds: int = 9
) -> list[dict[str, float]]:
    """The time per decoded token at batch size 1, of each decoder, by interleaved rounds.

    `latency_ms` is the median, `latency_ratio` that of its ratios to the first decoder's, round by
    round, and `latency_noise` half of the range that holds the middle half of these.

    Args:
      decoders: they take turns, so that other load on the machine affects all alike.
      prompt: token ids; only the first few are used.
      rounds: timings of each decoder.
    """
    tokens = min(_LATENCY_TOKENS, *(d.model.config.max_length // 2 for d in decoders))
    decoders = [decoder.replace(eos_ids=()) for decoder in decoders]
    states = [decoder.prefill([np.asarray(prompt)[:tokens]], room=tokens) for decoder in decoders]
    times: list[list[float]] = [[] for _ in decoders]
    for turn in range(rounds + 1):
        for decoder, state, seconds in zip(decoders, states, times, strict=True):
            interrupt.check("while timing")
            start = time.perf_counter()
            jax.block_until_ready(decoder.extend(state, jnp.int32(tokens), tokens)[0])
            if turn:  # the first compiles
                seconds.append(time.perf_counter() - start)
    times_MR, found = np.asarray(times) / tokens * 1e3, []
    for times_R in times_MR:
        low, ratio, high = np.quantile(times_R / times_MR[0], (0.25, 0.5, 0.75))
        found.append({"latency_ms": float(np.median(times_R)), "latency_ratio": float(ratio)})
        found[-1]["latency_noise"] = float(high - low) / 2
    return found
