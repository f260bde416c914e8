"""The families of models that are read and written, a file for each.

A new family is a file with a `Family`, and its name in the list below.
"""

from lte_jax.hf.families import (
    bert,
    distilbert,
    gemma,
    gpt2,
    gpt_neox,
    granite,
    llama,
    ministral,
    mistral,
    olmo2,
    opt,
    phi3,
    qwen2,
    qwen3,
    roberta,
    seed_oss,
    smollm3,
    stablelm,
    starcoder2,
)

FAMILIES = {
    family.model_type: family
    for family in (
        llama.FAMILY,
        mistral.FAMILY,
        qwen2.FAMILY,
        qwen3.FAMILY,
        phi3.FAMILY,
        smollm3.FAMILY,
        seed_oss.FAMILY,
        ministral.FAMILY,
        gemma.FAMILY,
        gemma.GEMMA3,
        granite.FAMILY,
        olmo2.FAMILY,
        olmo2.OLMO3,
        gpt2.FAMILY,
        opt.FAMILY,
        gpt_neox.FAMILY,
        starcoder2.FAMILY,
        stablelm.FAMILY,
        bert.FAMILY,
        distilbert.FAMILY,
        roberta.FAMILY,
        roberta.XLM,
    )
}
