"""The families of models that are read and written, a file for each.

A new family is a file with a `FAMILY`, and its name in the line below.
"""

from lte_jax.hf.families import gpt2, llama, mistral, qwen2, qwen3

FAMILIES = {m.FAMILY.model_type: m.FAMILY for m in (gpt2, llama, mistral, qwen2, qwen3)}
