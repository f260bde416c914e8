"""Compares LTE with a dense baseline and frozen routers, on pretrained models and real text.

    python benchmarks/tinystories.py --models=FOLDER            (or: make tinystories MODELS=FOLDER)

FOLDER holds the models in Hugging Face's format: babyllama/ and stories260k/, which have no hub id
(see docs/results.md). The texts are roneneldan/TinyStories: of the hub, which needs the extra
`data` and a network, or of --mirror=FOLDER (or LTE_JAX_MIRROR), which holds them under that name.
Every row is one run of train.py on configs/tinystories.py, all with the same steps and data:

  dense baseline   the dense model, fine-tuned
  LTE             the preset `ours`: router stage, then adapt
  ridge, frozen   the same experts and the routers LTE starts from, never trained; all steps adapt
  random, frozen  random routers and the best k experts of each token (paper, Fig. 12); likewise

stories260k takes half the steps. Frozen routers are compared at 75%, with --all at every target.
Perplexity is over 324 validation stories, cut at 256 tokens, under hard routing. Two runs go
side by side, a core each. A killed table resumes where it was. Writes table.md, results.json and
quality.png to --out.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path

from lte_jax.errors import UserError, cli_errors
from lte_jax.files import Mirror
from lte_jax.sweep import processes

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "tinystories.py"

DATA, STORIES = "roneneldan/TinyStories", 324
MODELS = ("babyllama", "stories260k")
TARGETS = (0.5, 0.75, 0.9)


@dataclasses.dataclass(frozen=True)
class Run:
    """One row of the table."""

    model: str
    method: str
    expert_size: int | None = None
    target: float | None = None
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name of its folder."""
        parts = (self.model, self.method, self.expert_size, self.target)
        words = "-".join(str(part) for part in parts if part is not None)
        return words.replace(", ", "-").replace(" ", "-")


def runs(router_steps: int, adapt_steps: int, every_target: bool) -> Iterator[Run]:
    """Every row, baselines first."""
    for model, sizes, share in (("babyllama", (32, 8), 1), ("stories260k", (4,), 2)):
        router, adapt = router_steps // share, adapt_steps // share
        steps = router + adapt
        frozen = (
            "stages.router.steps=0",
            f"stages.adapt.steps={steps}",
            "stages.adapt.learning_rate=1e-3",
        )
        baseline = (f"stages.finetune.steps={steps}", "stages.finetune.learning_rate=1e-4")
        yield Run(
            model,
            "dense baseline",
            None,
            None,
            (*baseline, "stages.router.steps=0", "stages.adapt.steps=0"),
        )
        for size in sizes:
            for target in TARGETS:
                lte = (f"lte.expert_size={size}", f"lte.target_sparsity={target}")
                stages = (f"stages.router.steps={router}", f"stages.adapt.steps={adapt}")
                yield Run(model, "LTE", size, target, (*lte, *stages))
                if target != 0.75 and not every_target:
                    continue
                random = ("lte.router_init=normal", "lte.routing=top_k")
                yield Run(model, "ridge, frozen", size, target, (*lte, *frozen))
                yield Run(model, "random, frozen", size, target, (*lte, *frozen, *random))


def add_models_to(parser: argparse.ArgumentParser) -> None:
    """The flags that say where models and texts are."""
    Mirror.add_to(parser)
    parser.add_argument(
        "--models", type=Path, required=True, help="folder of babyllama/ and stories260k/"
    )


def check(models: Path) -> Path:
    """The folder of the models, which can be read, as can the texts; the figure can be drawn.

    Raises:
      UserError: if not: before the first run, not after half an hour.
    """
    from lte_jax import data, hf

    folder = models.expanduser().absolute()
    for name in MODELS:
        if not (folder / name / "config.json").is_file():
            raise UserError(
                f"--models={models}: {folder} has no {name}/config.json: name the folder that "
                f"holds {' and '.join(MODELS)}, as in make tinystories MODELS=FOLDER"
            )
        hf.check_params(folder / name, hf.read_config(folder / name)[0])
        hf.load_tokenizer(folder / name)
    for split in ("train", "validation"):
        data.read_texts(DATA, limit=1, split=split)
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("the figure needs matplotlib: pip install 'lte-jax[plot]'")
    return folder


def result(run: Run, models: Path, out: Path) -> dict:
    """The row of a run, trained and measured unless already done."""
    path = out / run.name / "measured.json"
    if not path.exists():
        start = time.monotonic()
        train(run, models, out)
        row = measure(run, out) | {"seconds": round(time.monotonic() - start)}
        path.write_text(json.dumps(row))
        print(f"{run.name}: {row['perplexity']:.3f}, {row['seconds']} s", flush=True)
    return json.loads(path.read_text())


def train(run: Run, models: Path, out: Path) -> None:
    """Trains the model of a row, or goes on with it."""
    # There are many runs: no reports, and little validation, only at the end of a stage.
    spared = ("report=False", "eval_every=1000", "data.max_validation_records=16")
    overrides = (f"source.path={models / run.model}", *run.overrides, *spared)
    if processes.train(f"{CONFIG}:{run.model}", out / run.name, overrides):
        raise SystemExit(f"{run.name} failed, see {processes.log(out / run.name)}")


def measure(run: Run, out: Path) -> dict:
    """Perplexity and sparsity of a finished run, on the validation stories."""
    import lte_jax
    from lte_jax import data, evaluation

    folder = out / run.name / ("dense" if run.target is None else "lte")
    model, params = lte_jax.load(folder)
    tokenizer = lte_jax.load_tokenizer(folder)
    texts = data.read_texts(DATA, newline=" ", limit=STORIES, split="validation")
    rows = data.pad(data.tokenize(texts, tokenizer), 256)
    measured = evaluation.perplexity(model, params, rows, batch_size=27)
    return {
        "model": run.model,
        "method": run.method,
        "expert_size": run.expert_size,
        "target": run.target,
        "perplexity": measured["token_ppl"],
        "sparsity": measured["sparsity"],
    }


def table(results: list[dict]) -> str:
    """Markdown; the change is against the dense baseline of the same model."""
    lines = [
        "| model | method | experts of | target | FFN sparsity | perplexity | against dense |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    baseline = {r["model"]: r["perplexity"] for r in results if r["target"] is None}
    for r in results:
        dense = r["target"] is None
        cells = (
            r["model"],
            r["method"],
            "" if dense else str(r["expert_size"]),
            "" if dense else f"{r['target']:.0%}",
            "0%" if dense else f"{r['sparsity']:.1%}",
            f"{r['perplexity']:.3f}",
            "" if dense else f"{r['perplexity'] / baseline[r['model']] - 1:+.1%}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def rows(text: str) -> list[dict]:
    """The rows of `table`, read from a text that holds it, to the digits that it shows."""
    found = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 7 and cells[0] in MODELS:
            row = dict(zip(("model", "method"), cells, strict=False))
            row["expert_size"] = int(cells[2]) if cells[2] else None
            row["target"] = float(cells[3].rstrip("%")) / 100 if cells[3] else None
            row["sparsity"] = float(cells[4].rstrip("%")) / 100
            found.append(row | {"perplexity": float(cells[5])})
    return found


def figure(results: list[dict], path: Path) -> None:
    """Perplexity against sparsity: a panel per model and expert size, a line per method."""
    from lte_jax import figures, style

    panels = {}
    for model, size in dict.fromkeys(
        (r["model"], r["expert_size"]) for r in results if r["target"]
    ):
        mine = [r for r in results if r["model"] == model and r["expert_size"] in (None, size)]
        models = [
            {
                "name": r["method"] if r["target"] else "dense",
                "sparsity": r["sparsity"],
                "token_ppl": r["perplexity"],
            }
            for r in mine
        ]
        panels[f"{model}, experts of {size}"] = [{"models": models}]
    with style.applied():
        style.save(figures.quality_panels(panels, log=True), path)


@cli_errors()
def main() -> None:
    from lte_jax import report

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_models_to(parser)
    parser.add_argument("--out", type=Path, default=Path("runs/tinystories-table"))
    parser.add_argument("--router-steps", type=int, default=270)
    parser.add_argument("--adapt-steps", type=int, default=30)
    parser.add_argument("--workers", type=int, default=2, help="runs side by side, a core each")
    parser.add_argument("--all", action="store_true", help="frozen routers at every target")
    flags = parser.parse_args()
    flags.models = check(flags.models)
    flags.out.mkdir(parents=True, exist_ok=True)
    start, wanted = time.monotonic(), list(runs(flags.router_steps, flags.adapt_steps, flags.all))
    with processes.side_by_side(flags.workers) as pool:
        results = list(pool.map(lambda run: result(run, flags.models, flags.out), wanted))
    text = table(results)
    (flags.out / "table.md").write_text(text)
    record = {"steps": flags.router_steps + flags.adapt_steps, "rows": results}
    record["environment"] = report.environment()
    (flags.out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    figure(results, flags.out / "quality.png")
    print(text)
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(usage.ru_utime + usage.ru_stime for usage in spent)
    wall = time.monotonic() - start
    print(f"{wall / 60:.1f} min, {cpu / 60:.1f} CPU min; written to {flags.out}")


if __name__ == "__main__":
    main()
