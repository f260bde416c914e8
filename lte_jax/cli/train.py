"""Runs the experiment of a config file, from the dense model to the last training stage.

    lte-jax train --config=demo --workdir=runs/demo
    lte-jax train --config=configs/llama7b.py:paper --config.lte.expert_size=64 --workdir=runs/7b
    lte-jax train --config=llama7b --plan           # whether it fits: nothing is run
    lte-jax train --config=llama7b --plan=h200:8    # on devices that you do not have

Run the same command again to resume where it stopped. `python train.py` in a checkout is the same
program. Several processes, on one host or many: docs/scale.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import lte_jax
from lte_jax import config, errors, memory, processes


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Turns the flags into an experiment and runs it."""
    memory.keep()
    parser = errors.Parser(prog=prog, description=__doc__)
    add = parser.add_argument
    add("--workdir", help="folder for checkpoints and results")
    add("--profile", action="store_true", help="trace steps of each stage into WORKDIR/profile")
    where = "KIND:NUMBER, as in h200:8; alone: the devices at hand"
    add("--plan", nargs="?", const="", metavar="DEVICES", help=f"print the plan and end; {where}")
    processes.add_flags(parser)
    with errors.cli_errors():
        flags, experiment = config.parse_flags(parser, argv)
        if flags.plan is not None:
            from lte_jax import plan  # with all of training: slow, and it starts to log

            return plan.show(experiment, flags.plan)
        if flags.workdir is None:
            parser.error("the following arguments are required: --workdir")
        with processes.joined(flags), errors.cli_errors():
            lte_jax.train(experiment, flags.workdir, profile=flags.profile)
