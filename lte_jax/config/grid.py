"""The grid of a sweep: methods, targets and seeds as frozen data, and how its file is read.

A file in configs/sweeps/ has a function `get_sweep(arg="")`:

    from lte_jax import config

    def get_sweep(arg=""):
        return config.Sweep(
            config="configs/demo.py",
            methods={"dense": config.Row(("stages.router.steps=0", "stages.adapt.steps=0"), ()),
                     "ours": config.Row()},
            targets=(0.5, 0.75),
            seeds=(0, 1, 2),
        )
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

from lte_jax.config.experts import PRESETS
from lte_jax.config.fields import Checked, Target, Whole
from lte_jax.config.loading import find, run_file, split
from lte_jax.errors import UserError, nearest

FOLDER = "sweeps"  # of configs/
# Overrides of runs that are there for their quality: the report measures only that, of the last
# model alone (the dense one has a row of its own), and one checkpoint is kept until the run ends.
QUALITY_ONLY = (
    "sample_tokens=0",
    "latency_rounds=0",
    "eval_every=0",
    "report_dense=False",
    "checkpoint.keep_last=1",
    "checkpoint.keep_best=0",
    "checkpoint.keep_finished=False",
)


@dataclasses.dataclass(frozen=True)
class Row(Checked):
    """A method of a sweep, by what its runs change; it has a row of the table for each target."""

    overrides: tuple[str, ...] = ()  # "key=value" each, of the Experiment
    # None: the sweep's; (): it has none, as a dense row, or one of a fixed efficiency weight.
    targets: tuple[Target, ...] | None = None
    target: str = "lte.target_sparsity={target}"  # the override that sets its target; "": none does
    # More overrides of single targets, such as the efficiency weight that a search has found.
    at: Mapping[float, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    after: str = ""  # the method whose dense/ it starts from, of the same seed; "": source.path
    oracle: bool = False  # whether it knows what a served model cannot know

    def _check_together(self):
        if self.target and "{target}" not in self.target:
            raise UserError(
                f"target={self.target!r}: expected an override with {{target}} where the number "
                "goes, such as lte.target_sparsity={target}, or '': none"
            )
        if self.targets is not None and len({*self.targets}) < len(self.targets):
            raise UserError(f"targets={self.targets}: expected each once")


@dataclasses.dataclass(frozen=True)
class Sweep(Checked):
    """Every method at each of its targets with every seed, on one configuration."""

    config: str  # a file and its words, "configs/demo.py:smoke", of the grid file's checkout
    methods: Mapping[str, Row]  # name -> what its runs change, in the order of the table
    targets: tuple[Target, ...] = ()  # of the methods that name none of their own
    seeds: tuple[Whole, ...] = (0,)  # the same for all methods, which are compared seed by seed
    overrides: tuple[str, ...] = ()  # of all runs; those of a method go before
    reference: str = ""  # the method that others are compared with; "": none

    def _check_together(self):
        if not self.methods:
            raise UserError("methods is empty: expected a config.Row for each name")
        for key in ("targets", "seeds"):
            if len({*getattr(self, key)}) < len(getattr(self, key)):
                raise UserError(f"{key}={getattr(self, key)}: expected each once")
        if not self.seeds:
            raise UserError("seeds=(): expected at least one, such as (0, 1, 2)")
        if self.reference and self.reference not in self.methods:
            hint = nearest(self.reference, self.methods)
            raise UserError(f"reference={self.reference!r}: {hint}")
        for name, row in self.methods.items():
            self._check_row(name, row)

    def _check_row(self, name: str, row: Row) -> None:
        where = f"methods[{name!r}]"
        if row.targets is None and not self.targets:
            raise UserError(
                f"{where}.targets is the sweep's, which has none: expected targets of the sweep or "
                "of the method; () is for a method without"
            )
        if unused := [target for target in row.at if target not in self.targets_of(name)]:
            raise UserError(
                f"{where}.at[{unused[0]}]: expected one of the method's targets, "
                f"{', '.join(map(str, self.targets_of(name))) or 'of which it has none'}"
            )
        if row.after and (row.after not in self.methods or self.targets_of(row.after)):
            starts = [other for other in self.methods if not self.targets_of(other)]
            hint = nearest(row.after, starts) if starts else "no method has targets=()"
            raise UserError(
                f"{where}.after={row.after!r}: expected a method of one run a seed (targets=()): "
                f"{hint}"
            )
        seen, before = [name], row.after
        while before in self.methods:  # an unknown one is its own method's mistake
            if before in seen:
                raise UserError(f"{where}.after={row.after!r}: leads back to {before!r}")
            seen.append(before)
            before = self.methods[before].after

    def targets_of(self, method: str) -> tuple[float, ...]:
        """The targets of a method; (): it has none."""
        own = self.methods[method].targets
        return self.targets if own is None else own

    def depth(self, method: str) -> int:
        """The number of runs that a run of the method goes on from."""
        before = self.methods[method].after
        return 1 + self.depth(before) if before else 0


def preset(name: str) -> tuple[str, ...]:
    """The overrides that make a preset of the preset `ours`, for a row that stands beside it."""
    ours = dataclasses.asdict(PRESETS["ours"])
    wanted = dataclasses.asdict(PRESETS[name])
    return tuple(f"lte.{key}={value}" for key, value in wanted.items() if value != ours[key])


def load_sweep(spec: str, overrides: Iterable[str] = ()) -> tuple[Sweep, str]:
    """The sweep that a file in configs/sweeps/ describes, and where its `config` is.

    Args:
      spec: path of the file, and after a colon the argument of get_sweep, as in `load_config`; or
        the name of one of the package's own.
      overrides: "key=value" each, added to those of all runs.

    Returns:
      The sweep, and its `config` as `load_config` takes it: the file of that name in the first
      folder, of those above the grid's file, that has it; else what is written there.

    Raises:
      UserError: if the file is missing, fails (with the line) or returns something else, or the
        sweep's values do not fit together.
    """
    path, arg = split(spec)
    file = find(path, FOLDER)
    made = run_file(file, "get_sweep", arg, Sweep)
    sweep = dataclasses.replace(made, overrides=(*made.overrides, *overrides))
    named, words = split(sweep.config)
    above = (folder / named for folder in Path(file).resolve().parents)
    place = str(next((place for place in above if place.is_file()), named))
    return sweep, f"{place}:{words}" if words else place
