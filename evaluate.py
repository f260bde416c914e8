"""`python evaluate.py ...` in a checkout is `lte-jax evaluate ...`."""

from lte_jax.cli import evaluate

if __name__ == "__main__":
    evaluate.main()
