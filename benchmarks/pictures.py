"""Draws the pictures of README and docs from what was measured before, and from a trained run.

    python benchmarks/pictures.py                           docs/kernels.png, docs/tinystories.png
    make demo && python benchmarks/pictures.py --model=runs/demo/lte        and docs/idea.png

kernels.png is drawn from benchmarks/results/*.json, tinystories.png from the table in
docs/results.md. idea.png is a layer of a model at work: the experts that run for each token.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
sys.path.insert(1, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np
import report
import tinystories

import lte_jax
from lte_jax import figures, style
from lte_jax.errors import UserError, cli_errors

ROOT = pathlib.Path(__file__).resolve().parents[1]


def idea(folder: pathlib.Path, text: str, layer: int, path: pathlib.Path) -> float:
    """Dense beside LTE: a map of the experts that run for each token; returns the share skipped.

    Tokens that the tokenizer adds to the text are left out.
    """
    model, params = lte_jax.load(folder)
    if model.lte is None or not 1 <= layer <= model.config.num_layers:
        raise UserError(f"{folder}, layer {layer}: expected an LTE model that has such a layer")
    tokenizer = lte_jax.load_tokenizer(folder)
    tokens_L = np.asarray(tokenizer.encode(text))
    scores_LE = np.asarray(lte_jax.apply(model, params, tokens_L[None]).scores[layer - 1, 0])
    shown_L = ~np.isin(tokens_L, tokenizer.all_special_ids)
    run_EL = (scores_LE > model.lte.threshold)[shown_L].T
    run_EL = run_EL[np.argsort(-run_EL.sum(1), kind="stable")]  # those that run most on top
    pieces = [tokenizer.decode([token]) for token in tokens_L[shown_L].tolist()]
    low, high = run_EL.sum(0).min(), run_EL.sum(0).max()
    panels = {
        f"Dense: all {len(run_EL)} experts run": np.ones_like(run_EL),
        f"LTE: {low} to {high} of {len(run_EL)}, token by token": run_EL,
    }
    with style.applied():
        figure, grid = style.panels(2, height=3.2)
        for axes, (title, run) in zip(grid, panels.items(), strict=True):
            figures.draw_experts(axes, run, pieces)
            axes.set_title(title)
        grid[1].set_ylabel("")
        style.save(figure, path)
    return 1 - run_EL.mean()


def draw(out: pathlib.Path) -> None:
    """kernels.png and tinystories.png, of what the repository holds."""
    report.figure(report.RESULTS, out / "kernels.png")
    measured = tinystories.rows((ROOT / "docs" / "results.md").read_text())
    tinystories.figure(measured, out / "tinystories.png")


@cli_errors()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=pathlib.Path, help="an LTE folder, to draw idea.png")
    parser.add_argument("--text", default="def read(self, size=-1):")
    parser.add_argument("--layer", type=int, default=3, help="counted from 1")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "docs")
    flags = parser.parse_args()
    flags.out.mkdir(parents=True, exist_ok=True)
    draw(flags.out)
    if flags.model:
        skipped = idea(flags.model, flags.text, flags.layer, flags.out / "idea.png")
        print(f"layer {flags.layer} skips {skipped:.1%} of its experts on {flags.text!r}")


if __name__ == "__main__":
    main()
