"""Faults in what is learnt and computed: losses, routers, stages, optimizer, layers, pipeline."""

from mutant import Mutant

MUTANTS: list[Mutant] = [
    Mutant(
        "the efficiency loss ignores its power",
        "lte_jax/losses.py",
        "astype(jnp.float32) ** power, axis",
        "astype(jnp.float32), axis",
        "tests/test_stages.py::test_padding_counts_in_no_loss_and_no_statistic",
    ),
]
