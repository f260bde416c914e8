"""Makes a table of runs: see lte_jax/sweep/command.py."""

from lte_jax.sweep.command import main as main
