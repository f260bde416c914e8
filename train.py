"""Runs the experiment of a config file, from the dense model to the last training stage.

    python train.py --config=configs/demo.py --workdir=runs/demo
    python train.py --config=configs/llama7b.py:paper --config.lte.expert_size=64 --workdir=runs/7b

Run the same command again to resume where it stopped.
"""

import lte_jax
from lte_jax import config, errors


def main() -> None:
    """Turns the flags into an experiment and runs it."""
    parser = errors.Parser(description=__doc__)
    add = parser.add_argument
    add("--workdir", required=True, help="folder for checkpoints and results")
    add("--profile", action="store_true", help="trace steps of each stage into WORKDIR/profile")
    with errors.cli_errors():
        flags, experiment = config.parse_flags(parser)
        lte_jax.train(experiment, flags.workdir, profile=flags.profile)


if __name__ == "__main__":
    main()
