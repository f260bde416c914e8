"""Writes dense models as GGUF files, which llama.cpp and the programs built on it read.

    from lte_jax import export_gguf
    export_gguf.export("model.gguf", model, params, tokenizer, dtype="bfloat16")

The file's format is the package gguf's (the extra `gguf`), the names of tensors and keys are those
of llama.cpp. A file holds a model and its tokenizer, in float32, bfloat16 or float16; llama.cpp's
own tools quantise it. Norms and biases are float32, as llama.cpp wants them. An LTE model has no
GGUF: nothing that reads one knows routers.
"""

from lte_jax.export_gguf.file import FAMILIES, check, export

__all__ = ["FAMILIES", "check", "export"]
