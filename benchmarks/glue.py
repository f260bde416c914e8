"""Compares LTE with dense fine-tuning on tasks of GLUE, with a real encoder, by seeds.

    python benchmarks/glue.py --out=runs/glue-table
    python benchmarks/glue.py --tasks=mrpc --seeds=1 --targets=0.8     # a first look: 14 minutes

For each task and seed the encoder is fine-tuned (configs/glue.py:TASK,minilm). From there on, with
the same number of further steps, go on:

  dense control   the dense model, at the learning rate of LTE's last stage
  LTE             the preset `ours`, at each target: router stage, then adapt

Metrics are of the validation split, under hard routing. "against control" is the mean difference to
the control of the same seed, with its standard error over the seeds. Two runs go side by side, a
core each; a killed table resumes where it was. Writes table.md and results.json to --out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import resource
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path

import lte_jax
from lte_jax import config, report, tasks
from lte_jax.errors import UserError, cli_errors
from lte_jax.files import Mirror, atomic_write
from lte_jax.sweep import processes
from lte_jax.tasks.measurement import place

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "glue.py"
MODEL = "sentence-transformers/all-MiniLM-L6-v2"


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of train.py: dense where `target` is None; others go on from that with `start`."""

    task: str
    seed: int
    target: float | None = None
    start: bool = False

    @property
    def name(self) -> str:
        """The name of its folder."""
        what = "start" if self.start else "control" if self.target is None else f"{self.target:g}"
        return f"{self.task}-{self.seed}-{what}"

    @property
    def folder(self) -> str:
        """The name of the folder of its model."""
        return "dense" if self.target is None else "lte"


def overrides(run: Run, flags: argparse.Namespace, stages) -> Iterator[str]:
    """What a run changes of configs/glue.py; `stages` are the config's own."""
    # Going on, the data come in another order: a control that saw them again in the order of the
    # start would know the first ones by heart.
    yield f"seed={run.seed if run.start else run.seed + 1000}"
    yield "report=False"
    yield "checkpoint.keep_last=1"  # 45 runs would fill a disk
    yield "checkpoint.keep_best=0"
    yield "checkpoint.keep_finished=False"
    yield f"source.path={flags.model if run.start else flags.out.absolute() / start(run) / 'dense'}"
    if flags.data is not None:
        task = tasks.find(run.task)
        yield f"data.train={os.path.abspath(place(flags.data, task.hub, task.folder))}"
    if run.target is not None:
        yield "stages.finetune.steps=0"
        yield f"lte.target_sparsity={run.target}"
        return
    yield "stages.router.steps=0"
    yield "stages.adapt.steps=0"
    if not run.start:
        yield f"stages.finetune.steps={stages.router.steps + stages.adapt.steps}"
        yield f"stages.finetune.learning_rate={stages.adapt.learning_rate}"


def start(run: Run) -> str:
    """The name of the run that this one goes on from."""
    return Run(run.task, run.seed, start=True).name


def result(run: Run, flags: argparse.Namespace) -> dict:
    """The row of a run, trained and measured unless already done."""
    path, begin = flags.out / run.name / "measured.json", time.monotonic()
    words = f"{run.task},minilm" + (",smoke" if flags.smoke else "")
    stages = config.load_config(f"{CONFIG}:{words}").stages
    settings = [f"{CONFIG.name}:{words}", *overrides(run, flags, stages)]
    if not path.exists():
        if processes.train(f"{CONFIG}:{words}", flags.out / run.name, settings[1:]):
            raise SystemExit(f"{run.name} failed, see {processes.log(flags.out / run.name)}")
        folder = flags.out / run.name / run.folder
        model, params = lte_jax.load(folder)
        tokenizer = lte_jax.load_tokenizer(folder)
        how = {"tokenizer": tokenizer, "batch_size": 32}
        rows = tasks.measure([run.task], model, params, flags.data, **how)
        row = dataclasses.asdict(run) | {"settings": settings}
        row |= {"metrics": {r["metric"]: r["value"] for r in rows}}
        row |= {"sampling_errors": {r["metric"]: r["error"] for r in rows}}
        row |= {"records": rows[0]["records"], "sparsity": rows[0]["sparsity"]}
        row["seconds"] = round(time.monotonic() - begin)
        atomic_write(path, json.dumps(row))
        words = ", ".join(f"{name} {value:.2f}" for name, value in row["metrics"].items())
        print(f"{run.name}: {words}, {row['sparsity']:.1%} skipped, {row['seconds']} s", flush=True)
    row = json.loads(path.read_text())
    if row["settings"] != settings:
        raise UserError(f"{path} was made with other settings: expected another --out")
    return row


def measured(names: Sequence[str], flags: argparse.Namespace, pool: Executor) -> list[dict]:
    """The rows of all runs, task by task; one that goes on from a start waits for that."""
    begun: dict[str, Future[dict]] = {}

    def after(run: Run) -> dict:
        begun[start(run)].result()
        return result(run, flags)

    queued = []
    for task in names:
        starts = [Run(task, seed, start=True) for seed in range(flags.seeds)]
        begun |= {run.name: pool.submit(result, run, flags) for run in starts}
        targets = (None, *flags.targets)
        rest = [Run(task, seed, target) for seed in range(flags.seeds) for target in targets]
        queued += [*(begun[run.name] for run in starts), *(pool.submit(after, run) for run in rest)]
    try:
        return [future.result() for future in queued]
    except BaseException:  # of a run that failed, or a signal: no other is begun
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def summary(rows: Sequence[dict]) -> list[dict]:
    """Means over the seeds of each task, method and metric, and the differences to the control."""
    kinds = sorted({(r["task"], r["start"], r["target"] or 0.0) for r in rows}, key=_place)
    found = []
    for task, is_start, target in kinds:
        mine = [
            r
            for r in rows
            if (r["task"], r["start"], r["target"] or 0.0) == (task, is_start, target)
        ]
        control = {r["seed"]: r for r in rows if r["task"] == task and _is_control(r)}
        for metric in mine[0]["metrics"]:
            values = [r["metrics"][metric] for r in mine]
            gaps = [r["metrics"][metric] - control[r["seed"]]["metrics"][metric] for r in mine]
            found.append(
                {
                    "task": task,
                    "method": "fine-tuned"
                    if is_start
                    else f"LTE, {target:.0%}"
                    if target
                    else "dense control",
                    "metric": metric,
                    "seeds": len(mine),
                    "sparsity": statistics.mean(r["sparsity"] for r in mine),
                    "value": statistics.mean(values),
                    "error": _error(values),
                    "gap": statistics.mean(gaps),
                    "gap_error": _error(gaps),
                }
            )
    return found


def _place(kind: tuple[str, bool, float]) -> tuple[str, bool, float]:
    return kind[0], not kind[1], kind[2]


def _is_control(row: dict) -> bool:
    return not row["start"] and row["target"] is None


def _error(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def table(rows: Sequence[dict]) -> str:
    """Markdown of `summary`."""

    def with_error(value: float, error: float | None, form: str) -> str:
        return f"{value:{form}}" + ("" if error is None else f" ± {error:.2f}")

    lines = [
        "| task | method | FFN sparsity | metric | mean of seeds | against control |",
        "|---|---|--:|---|--:|--:|",
    ]
    for r in rows:
        dense = r["method"] == "dense control"
        cells = (
            r["task"],
            r["method"],
            f"{r['sparsity']:.1%}",
            r["metric"],
            with_error(r["value"], r["error"], ".2f"),
            "" if dense else with_error(r["gap"], r["gap_error"], "+.2f"),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _numbers(text: str) -> list[float]:
    numbers = [float(word) for word in text.split(",")]
    if not all(0 < number < 1 for number in numbers):
        raise argparse.ArgumentTypeError(f"{text}: expected sparsities between 0 and 1")
    return numbers


@cli_errors()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, count = parser.add_argument, config.flag(config.Count)
    add("--out", type=Path, default=Path("runs/glue-table"))
    add("--tasks", default="sst2,mrpc,rte", help="joined by commas")
    add("--targets", type=_numbers, default=[0.8, 0.9, 0.95], help="FFN sparsities of LTE")
    add("--seeds", type=count, default=3, help="number of seeds, from 0")
    add("--model", default=MODEL, help="folder or hub id of the encoder")
    add("--data", help="folder with glue/sst2, ...; without it, the hub")
    add("--workers", type=count, default=2, help="runs side by side, a core each")
    add("--smoke", action="store_true", help="four steps a stage: a test of all parts")
    flags = Mirror.add_to(parser).parse_args()
    if os.path.isdir(flags.model):
        flags.model = os.path.abspath(flags.model)
    flags.out.mkdir(parents=True, exist_ok=True)
    import transformers.models.auto  # noqa: F401  # once, before threads do it together

    begin, names = time.monotonic(), flags.tasks.split(",")
    with processes.side_by_side(flags.workers) as pool:
        rows = measured(names, flags, pool)
    means = summary(rows)
    atomic_write(flags.out / "table.md", table(means))
    record = {"runs": rows, "summary": means, "environment": report.environment()}
    atomic_write(flags.out / "results.json", json.dumps(record, indent=1) + "\n")
    print(table(means))
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(usage.ru_utime + usage.ru_stime for usage in spent)
    runs = sum(row["seconds"] for row in rows) / 60
    print(f"{(time.monotonic() - begin) / 60:.1f} min, {cpu / 60:.1f} CPU min; in {flags.out}")
    print(f"all runs, those of earlier calls too: {runs:.0f} min, {flags.workers} side by side")


if __name__ == "__main__":
    main()
