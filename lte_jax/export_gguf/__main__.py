"""`python -m lte_jax.export_gguf ...` is `lte-jax export-gguf ...`."""

from lte_jax.cli.export_gguf import main

if __name__ == "__main__":
    main(prog="python -m lte_jax.export_gguf")
