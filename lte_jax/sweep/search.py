"""Reads off a sweep which value of a key gives each sparsity, such as the paper's weight eta.

    python -m lte_jax.sweep.search runs/paper-search/results.json --targets=0.5,0.75,0.9

Runs without a target that differ in that key alone, and the seed, are a curve. Between neighbours
on it, of which one skips less than a target and one more, sparsity and quality are taken to be
linear in the key's logarithm (in the key itself where a value is not positive). If several curves
or places have a target, the best quality decides. It is printed as a table, and as the `at` of a
config.Row.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lte_jax import config
from lte_jax.errors import Parser, UserError, cli_errors
from lte_jax.sweep.results import Entry, read


@dataclasses.dataclass(frozen=True)
class Found:
    """The value of a key for a target."""

    target: float
    value: float
    others: Mapping[str, str]  # settings in which its curve differs from others
    between: tuple[float, float]  # sparsities of the neighbours
    quality: float


def choose(results: Mapping[str, Any], key: str, targets: Sequence[float]) -> list[Found]:
    """The best value of `key` for each target, of the runs of `results` that have it.

    Raises:
      UserError: if no run has the key, or a target is outside of what was reached.
    """
    curves: dict[tuple[tuple[str, str], ...], dict[float, list[Entry]]] = {}
    for run in results["runs"]:
        settings = {k: v for k, _, v in (setting.partition("=") for setting in run["settings"])}
        if run["target"] is None and run["experts"] and key in settings:
            value = float(settings.pop(key))
            rest = tuple(sorted(item for item in settings.items() if item[0] != "seed"))
            curves.setdefault(rest, {}).setdefault(value, []).append(run)
    if not curves:
        raise UserError(f"--key={key}: no run without a target sets it: expected a key of the grid")
    shared = set.intersection(*map(set, curves))
    sign = -1 if "metrics" in results["runs"][0] else 1  # of a metric more is better
    chosen = []
    for target in targets:
        places = [
            Found(target, value, dict(x for x in rest if x not in shared), between, quality)
            for rest, curve in curves.items()
            for value, between, quality in _places(curve, target)
        ]
        if not places:
            reached = [run["sparsity"] for curve in curves.values() for run in _all(curve)]
            raise UserError(
                f"--targets: {target:g} is outside of the {min(reached):.1%} to {max(reached):.1%} "
                f"that {key} reached: add values to the grid, or leave it out"
            )
        chosen.append(min(places, key=lambda place: sign * place.quality))
    return chosen


def _all(curve: Mapping[float, list[Entry]]) -> Iterator[Entry]:
    return itertools.chain.from_iterable(curve.values())


def _places(
    curve: Mapping[float, list[Entry]], target: float
) -> Iterator[tuple[float, tuple[float, float], float]]:
    """Value, sparsities of the neighbours and quality wherever a curve passes a target."""
    mean = lambda value, key: statistics.fmean(run[key] for run in curve[value])  # noqa: E731
    for low, high in itertools.pairwise(sorted(curve)):
        start, end = mean(low, "sparsity"), mean(high, "sparsity")
        if start == end or not min(start, end) <= target <= max(start, end):
            continue
        share = (target - start) / (end - start)
        value = low * (high / low) ** share if low > 0 else low + share * (high - low)
        quality = (1 - share) * mean(low, "quality") + share * mean(high, "quality")
        yield value, (start, end), quality


def table(found: Sequence[Found], key: str, metric: str) -> str:
    """What was chosen, as Markdown and as a row's `at`."""
    lines = [f"| target | {key} | with | between | {metric}, interpolated |"]
    lines.append("|--:|--:|---|---|--:|")
    row = []
    for place in found:
        others = [f"{name}={value}" for name, value in place.others.items()]
        less, more = place.between
        cells = (f"{place.target:.0%}", f"{place.value:.3g}", ", ".join(others))
        cells += (f"{less:.1%} and {more:.1%}", f"{place.quality:.3f}")
        lines.append(f"| {' | '.join(cells)} |")
        overrides = ", ".join(f'"{text}"' for text in (f"{key}={place.value:.3g}", *others))
        row.append(f"    {place.target:g}: ({overrides},),")
    return "\n".join([*lines, "", "at={", *row, "},"]) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the values of a key that the targets ask for."""
    parser = Parser(prog="python -m lte_jax.sweep.search", description=__doc__, allow_abbrev=False)
    parser.add_argument("results", metavar="RESULTS.json", help="of a sweep")
    targets = config.flag(tuple[config.Inside, ...])
    parser.add_argument("--targets", type=targets, required=True, help="such as 0.5,0.75,0.9")
    parser.add_argument("--key", default="lte.efficiency_weight", help="default: %(default)s")
    with cli_errors():
        flags = parser.parse_args(argv)
        results = read(flags.results)
        found = choose(results, flags.key, flags.targets)
        print(table(found, flags.key, results["metric"]), end="")


if __name__ == "__main__":
    main()
