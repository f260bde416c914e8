"""`python -m lte_jax.sweep ...` is `lte-jax sweep ...`."""

from lte_jax.sweep.command import main

if __name__ == "__main__":
    main(prog="python -m lte_jax.sweep")
