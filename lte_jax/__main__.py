"""`python -m lte_jax MODEL PROMPT`: a continuation of the prompt, streamed to the terminal."""

from lte_jax.generate import main

main()
