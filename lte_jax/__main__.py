"""`python -m lte_jax MODEL PROMPT`: a continuation of the prompt, streamed to the terminal."""

import argparse
import functools

import lte_jax
from lte_jax.errors import cli_errors


def main() -> None:
    """Flags to `lte_jax.generate_text`."""
    parser = argparse.ArgumentParser(prog="python -m lte_jax", description=__doc__)
    parser.add_argument("model", help="HF or LTE folder, or hub id")
    parser.add_argument("prompt")
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--routing", choices=["dense", "soft", "hard"])
    parser.add_argument("--implementation", default="auto", help="of the sparse FFN")
    flags = vars(parser.parse_args())
    path, prompt = flags.pop("model"), flags.pop("prompt")
    with cli_errors():
        model, params = lte_jax.load(path)
        tokenizer = lte_jax.load_tokenizer(path)
        print(prompt, end="", flush=True)
        write = functools.partial(print, end="", flush=True)
        lte_jax.generate_text(model, params, tokenizer, prompt, write=write, **flags)
        print()


if __name__ == "__main__":
    main()
