"""Trains what a file in configs/ describes, from the dense model to the last stage.

    python train.py --config=configs/demo.py --workdir=runs/demo
    python train.py --config=configs/llama7b.py:paper --config.lte.expert_size=64 --workdir=runs/7b

Started again with the same --workdir, it goes on where it stopped.
"""

import lte_jax
from lte_jax import config, errors


def main() -> None:
    """Flags to an experiment; all that is worth testing or importing is in the package."""
    parser = errors.Parser(description=__doc__)
    parser.add_argument("--workdir", required=True, help="folder of checkpoints, metrics, results")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="trace a few steps of each stage into WORKDIR/profile",
    )
    with errors.cli_errors():
        flags, experiment = config.parse_flags(parser)
        lte_jax.train(experiment, flags.workdir, profile=flags.profile)


if __name__ == "__main__":
    main()
