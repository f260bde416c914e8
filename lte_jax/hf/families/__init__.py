"""The families of models that are read and written, a file for each.

A new family is a file with a `Family`, and its name in the list below.
"""

from lte_jax.hf.families import bert, gpt2, llama, mistral, qwen2, qwen3, roberta

FAMILIES = {
    family.model_type: family
    for family in (
        llama.FAMILY,
        mistral.FAMILY,
        qwen2.FAMILY,
        qwen3.FAMILY,
        gpt2.FAMILY,
        bert.FAMILY,
        roberta.FAMILY,
        roberta.XLM,
    )
}
