"""The journeys' steps, as commands of bash in a checkout.

$OUT is an empty folder with made-up texts in $OUT/texts; $SMOKE is ":smoke" where steps are to be
small.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Step:
    """A command and what it must end with."""

    command: str
    last: str  # pattern of the last line of its output, standard error among it
    says: tuple[str, ...] = ()  # patterns of other lines
    code: int = 0
    alone: bool = False  # only in a clone with an environment of its own
    here: bool = False  # only without


_MINE = "python train.py --config=configs/finetune.py$SMOKE --config.source.path=$OUT/demo/dense"
_SMALL = _MINE.replace("$SMOKE", ":smoke") + " --config.report=False"
_STORIES = "--config.data.train=$OUT/texts/stories.jsonl"
_EVALUATE = "python evaluate.py --model=$OUT/mine/lte --data=$OUT/texts/stories.jsonl"
_WROTE = r"results\.json$"
_THRESHOLD = r"^threshold set to 0\.\d+ "
_SOURCES = {"parts": True, "parts/*.jsonl": False, "stories.txt": True, "stories.csv": False}
_MIX = "0.7 * $OUT/texts/stories.jsonl + 0.3 * $OUT/texts/stories.txt"

_USER = """
import sys, numpy as np, lte_jax
dense, params = lte_jax.load(sys.argv[1])
tokenizer = lte_jax.load_tokenizer(sys.argv[1])
ids = np.concatenate([tokenizer(line)["input_ids"] for line in open(sys.argv[2])])
tokens = ids[: len(ids) // 64 * 64].reshape(-1, 64)
model, params = lte_jax.moefy(dense, params, tokens, expert_size=16, target_sparsity=0.5)
out = lte_jax.apply(model, params, tokens[:8])
texts = lte_jax.generate_text(model, params, tokenizer, ["A fox", "The king"], max_new_tokens=8)
lte_jax.save(sys.argv[3], model, params, source=sys.argv[1])
print(len(texts), "texts, sparsity", round(float(out.sparsity), 2))
"""
_METRICS = """
import json, sys
lines = [json.loads(line) for line in open(sys.argv[1])]
print(*sorted({key for line in lines for key in line}))
"""

JOURNEYS: dict[int, tuple[str, tuple[Step, ...]]] = {
    0: (
        "The first commands",
        (
            Step("make", r"make clean +remove"),
            Step("make env", r".", (r"a minute or two$",), alone=True),
            Step("make demo && mv runs/demo $OUT/demo", _WROTE, alone=True),
            Step(
                "python train.py --config=configs/demo.py:smoke --workdir=$OUT/demo",
                _WROTE,
                here=True,
            ),
        ),
    ),
    1: (
        "LTE on my own checkpoint",
        (
            Step(
                f"{_MINE} --workdir=$OUT/mine {_STORIES} --config.lte.target_sparsity=0.7",
                _WROTE,
                (r"^\| LTE \|", _THRESHOLD),
            ),
            Step(
                f"{_EVALUATE} --dense=$OUT/mine/dense --out=$OUT/eval", _WROTE, (r"^\| dense \|",)
            ),
            Step('lte-jax generate $OUT/mine/lte "A fox"', r"tokens/s", (r"^A fox",)),
        ),
    ),
    2: (
        "README's headline table, of models that I do not have",
        (
            Step("make tinystories", r"^make: ", (r"error: .*MODELS",), code=2, alone=True),
            Step(
                "python benchmarks/tinystories.py --models=$OUT/none",
                r"error: .*/none has no babyllama/config\.json",
                code=2,
            ),
        ),
    ),
    3: (
        "My own texts",
        (
            *(
                Step(
                    f'{_SMALL} --workdir=$OUT/run-{i} --config.data.train="$OUT/texts/{name}"',
                    _THRESHOLD,
                    alone=alone,
                )
                for i, (name, alone) in enumerate(_SOURCES.items())
            ),
            Step(f'{_SMALL} --workdir=$OUT/run-mix --config.data.train="{_MIX}"', _THRESHOLD),
            Step(
                f"{_SMALL} --workdir=$OUT/run-bad {_STORIES} --config.data.column=story",
                r"^error: .*story.*text",
                code=2,
            ),
        ),
    ),
    4: (
        "What a run will do and need",
        (
            Step(
                f"{_SMALL} --workdir=$OUT/run-plan {_STORIES} --config.stages.adapt.steps=0",
                _THRESHOLD,
                (r"^model +llama, \d", r"^disk +.* are free", r"^memory +", r"^experts +\d"),
            ),
            Step(
                f"{_SMALL} --workdir=$OUT/run-plan {_STORIES} --config.stages.adapt.steps=0",
                r"run-plan holds this run, finished",
            ),
            Step(
                f"{_SMALL} --workdir=$OUT/run-batch {_STORIES} --config.optim.microbatches=3",
                r"^error: config\.optim\.microbatches=3 does not divide",
                code=2,
            ),
        ),
    ),
    5: (
        "Help and documentation",
        (
            Step(
                "python train.py --config=configs/finetune.py --help",
                r".",
                (r"lte\.target_sparsity", r"stages\.router\.steps"),
            ),
            Step("python -m pytest -q tests/test_docs_blocks.py", r"passed", alone=True),
            Step("make docs", r".", alone=True),
        ),
    ),
    6: (
        "The command line, from anywhere",
        (
            Step("cd $OUT && lte-jax --version", r"^lte-jax \d+\.\d+\.\d+ \(jax"),
            Step(
                "cd $OUT && lte-jax train --config=demo:smoke --workdir=demo2 --config.seed=1",
                _WROTE,
            ),
            Step(
                "cd $OUT && printf 'A fox\\nThe king\\n' | lte-jax generate mine/lte "
                "--max-new-tokens=8 --dtype=bfloat16 --threshold=0.6",
                r"tokens/s",
                (r"^A fox", r"^The king"),
            ),
            Step(
                "cd $OUT && lte-jax convert mine/lte half --dtype=bfloat16 && "
                "lte-jax generate half 'A fox' --max-new-tokens=8",
                r"tokens/s",
            ),
            Step("lte-jax generate $OUT/demoo/lte 'A fox'", r"^error: .*demoo", code=2),
        ),
    ),
    7: (
        "In a program",
        (
            Step(
                f"cat > $OUT/user.py <<'END'{_USER}END\n"
                "python $OUT/user.py $OUT/demo/dense $OUT/texts/stories.txt $OUT/saved",
                r"^2 texts, sparsity 0\.\d+$",
            ),
            Step("lte-jax generate $OUT/saved 'A fox' --max-new-tokens=8", r"tokens/s"),
            Step(
                "sed s/expert_size=16/expert_sizes=16/ $OUT/user.py > $OUT/wrong.py && "
                "basedpyright --level error $OUT/wrong.py",
                r"^1 error",
                (r'No parameter named "expert_sizes"',),
                code=1,
            ),
        ),
    ),
    8: (
        "Following a run",
        (
            Step(
                f"cat > $OUT/metrics.py <<'END'{_METRICS}END\n"
                "python $OUT/metrics.py $OUT/mine/metrics.jsonl",
                r"learning_rate loss objective seconds sparsity sparsity_per_layer/01",
            ),
            Step("find $OUT/mine/tensorboard -name 'events*' | sort", r"tensorboard/router/events"),
        ),
    ),
    9: (
        "Measuring",
        (
            Step(
                f"{_EVALUATE} --records=8 --threshold=0.6",
                r".",
                (r"^\| LTE \|", r"^Measured on 8 of \d+ records"),
            ),
            Step(  # the first run was no small one
                "lte-jax train --config=demo:smoke --workdir=$OUT/demo3 --config.seed=2",
                _WROTE,
                alone=True,
            ),
            *(
                Step(
                    f"python evaluate.py --runs $OUT/demo2 $OUT/{other} --out=$OUT/both-{other}",
                    r"runs\.json$",
                    (r"^\| LTE .*±",),
                    alone=other == "demo3",
                    here=other == "demo",
                )
                for other in ("demo", "demo3")
            ),
        ),
    ),
}
