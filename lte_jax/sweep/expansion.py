"""From a grid to its runs: each with a name that stays, its overrides and its experiment."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from lte_jax.config import Experiment, Sweep, load_config
from lte_jax.errors import UserError

# A run that goes on from another one has another seed: it would otherwise see the same texts first.
GOES_ON = 1000


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of train.py."""

    name: str  # of its folder: <method>-<target>-<seed>
    method: str
    target: float | None
    seed: int  # of the grid; a run that goes on from another one trains with a later one
    config: str  # as `load_config` takes it
    overrides: tuple[str, ...]
    after: str  # the run whose dense/ it starts from; "": none
    experiment: Experiment


def expand(sweep: Sweep, config: str, out: Path) -> tuple[Run, ...]:
    """The runs of a grid; those that others go on from before them, the first seed first.

    Args:
      sweep: the grid.
      config: where its `config` is, as `load_sweep` returns it.
      out: the folder of the sweep, absolute.

    Raises:
      UserError: on overrides that are wrong, and if two runs would have one name.
    """
    runs: dict[str, Run] = {}
    for run in _runs(sweep, config, out):
        if run.name in runs:
            raise UserError(
                f"methods {runs[run.name].method!r} and {run.method!r} both have a run named "
                f"{run.name}: expected names that differ in more than signs"
            )
        runs[run.name] = run
    return tuple(runs.values())


def _runs(sweep: Sweep, config: str, out: Path) -> Iterator[Run]:
    for seed in sweep.seeds:  # so that what is done first makes a table
        for method in sorted(sweep.methods, key=sweep.depth):
            for target in sweep.targets_of(method) or (None,):
                yield _run(sweep, config, out, method, target, seed)


def _run(sweep: Sweep, config: str, out: Path, method: str, target: float | None, seed: int) -> Run:
    row, depth = sweep.methods[method], sweep.depth(method)
    name, after = _name(method, target, seed), _name(row.after, None, seed) if row.after else ""
    overrides = [*sweep.overrides, *row.overrides]
    if target is not None:
        overrides += [row.target.replace("{target}", f"{target:g}")] if row.target else []
        overrides += row.at.get(target, ())
    overrides.append(f"seed={seed + depth * GOES_ON}")
    overrides += [f"source.path={out / after / 'dense'}"] if after else []
    try:
        experiment = load_config(config, overrides)
    except UserError as error:
        raise UserError(f"run {name}: {error}") from None
    if not experiment.report:
        raise UserError(f"run {name}: config.report=False: expected True, which measures the run")
    return Run(name, method, target, seed, config, tuple(overrides), after, experiment)


def _name(method: str, target: float | None, seed: int) -> str:
    words = re.sub(r"[^\w.]+", "-", method).strip("-.")
    return "-".join([words, *([f"{target:g}"] if target is not None else []), str(seed)])


def with_starts(runs: Sequence[Run], number: int) -> list[Run]:
    """A run by its place in the grid, after those that it goes on from.

    Raises:
      UserError: if there is no such place.
    """
    if not 0 <= number < len(runs):
        raise UserError(
            f"--run={number}: the grid has {len(runs)} runs: expected 0 to {len(runs) - 1} "
            "(--list shows them)"
        )
    known, chain = {run.name: run for run in runs}, [runs[number]]
    while chain[0].after:
        chain.insert(0, known[chain[0].after])
    return chain
