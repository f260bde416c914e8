"""Makes a table of many runs: methods x sparsities x seeds, from one grid.

    python -m lte_jax.sweep --config=configs/sweeps/tinystories.py --out=runs/table --workers=2
    lte-jax sweep --config=tinystories:smoke --out=runs/smoke --config.source.path=FOLDER
    lte-jax sweep --config=GRID.py --out=runs/table --list          # the runs, by number
    lte-jax sweep --config=GRID.py --out=runs/table --run=7         # one of them, for a job array
    lte-jax sweep --config=GRID.py --out=runs/table --collect       # table and figures only

Each run is one of train.py, in OUT/<method>-<target>-<seed>. A killed sweep goes on with the same
command, and loses no finished run; several may work on one folder. A run that fails does not stop
the others; the same command tries it again. The end is table.md, figures and results.json in OUT
(docs/sweeps.md). --config.KEY=VALUE sets a key of every run; what a method sets goes before.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

from lte_jax import config, interrupt, report
from lte_jax.errors import Parser, cli_errors
from lte_jax.files import Mirror
from lte_jax.files import expand as expand_path
from lte_jax.sweep import processes, results, tables
from lte_jax.sweep.expansion import Run, expand, with_starts
from lte_jax.sweep.folder import Folder
from lte_jax.sweep.running import run_all


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Turns the flags into a grid and makes its runs; exit code 1 if some failed."""
    parser = _parser(prog)
    afterwards = "finished runs are kept, others resume; run the same command to go on"
    with cli_errors(), interrupt.handled(afterwards):
        flags, rest = parser.parse_known_args(argv)
        if wrong := [flag for flag in rest if not flag.startswith("--config.")]:
            parser.error(f"unrecognized {' '.join(wrong)} (a key is set by --config.KEY=VALUE)")
        overrides = [flag.removeprefix("--config.") for flag in rest]
        perform(flags, *config.load_sweep(flags.config, overrides))


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = Mirror.add_to(Parser(prog=prog, description=__doc__, allow_abbrev=False))
    add, count = parser.add_argument, config.flag(config.Count)
    own = ", ".join(config.packaged("sweeps"))
    add(
        "--config",
        required=True,
        metavar="GRID.py[:WORDS]",
        help=f"a file with get_sweep(), or the package's {own}; --config.KEY=VALUE overrides",
    )
    add("--out", required=True, help="folder of the runs and of what they amount to")
    add("--workers", type=count, default=1, help="runs at a time, an equal share of cores each")
    only = parser.add_mutually_exclusive_group()
    add = only.add_argument
    add("--list", action="store_true", help="print the runs and whether they are finished")
    number = config.flag(config.Whole)
    add("--run", type=number, metavar="I", help="that run only, and what it goes on from")
    add("--collect", action="store_true", help="make no run: gather those that are finished")
    known = "results.json of an earlier sweep; runs in it of the same settings are not made again"
    parser.add_argument("--known", metavar="FILE", help=known)
    parser.add_argument("--no-figures", action="store_true")
    return parser


def perform(flags: argparse.Namespace, sweep: config.Sweep, place: str) -> None:
    """Makes runs, and gathers them unless only one was asked for.

    Raises:
      SystemExit: with code 1 if runs failed; what the others measured is written before.
    """
    folder = Folder(expand_path(flags.out, "--out").absolute())
    runs = expand(sweep, place, folder.root)
    if flags.known:
        folder = dataclasses.replace(folder, known=results.known(flags.known, runs, folder))
        print(f"{len(folder.known)} of {len(runs)} runs are those of {flags.known}")
    if flags.list:
        for number, run in enumerate(runs):
            print(number, run.name, "finished" * folder.finished(run), sep="\t")
        return
    wanted = runs if flags.run is None else with_starts(runs, flags.run)
    folder.check(sweep, runs)
    failed = [] if flags.collect else run_all(wanted, folder, flags.workers)
    if flags.run is None and any(map(folder.finished, runs)) or flags.collect:
        gathered = results.collect(sweep, runs, folder)
        written = tables.write(gathered, folder.root, not flags.no_figures)
        print(tables.table(gathered), tables.notes(gathered), sep="\n")
        report.say_written(written)
    if failed:
        raise SystemExit(_told(failed, folder))


def _told(failed: Sequence[Run], folder: Folder) -> str:
    """One line on the runs that failed, for stderr."""
    logs = (str(processes.log(folder.workdir(run))) for run in failed)
    return f"{len(failed)} failed, and are tried again by the same command: {', '.join(logs)}"
