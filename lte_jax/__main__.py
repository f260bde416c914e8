"""`python -m lte_jax COMMAND ...` is `lte-jax COMMAND ...`."""

from lte_jax.cli import main

if __name__ == "__main__":
    main(prog="python -m lte_jax")
