"""`python -m lte_jax.data prepare ...` is `lte-jax prepare ...`."""

from lte_jax.cli import main

if __name__ == "__main__":
    main(prog="python -m lte_jax.data", commands=("prepare",))
