"""`python -m lte_jax.serve ...` is `lte-jax serve ...`."""

from lte_jax.cli.serve import main

if __name__ == "__main__":
    main(prog="python -m lte_jax.serve")
