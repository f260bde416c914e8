"""`python train.py ...` in a checkout is `lte-jax train ...`."""

from lte_jax.cli import train

if __name__ == "__main__":
    train.main()
