"""Measures a pretrained Llama on WikiText, dense and with an oracle's best experts, untrained.

    python benchmarks/smollm2.py --model=HuggingFaceTB/SmolLM2-135M-Instruct --calibration=TEXTS

The perplexity is that of the task `wikitext` (docs/tasks.md). The experts are those of
`lte_jax.moefy`, grouped on the calibration texts; nothing is trained. For each token the oracle
computes all neurons and keeps the experts that add most to the residual stream
(lte_jax/baselines/oracle.py). So it is a bound for routers without training, not a method.
"""

from __future__ import annotations

import dataclasses

import lte_jax
from lte_jax import data, errors, report, tasks


def main() -> None:
    parser = errors.Parser(description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help="folder or hub id of a model")
    add("--calibration", required=True, help="texts that neurons are grouped on")
    add("--calibration-tokens", type=int, default=8192)
    add("--data", default="", help="folder of WikiText; default: the hub")
    add("--records", type=int, help="articles to read; default: all")
    add("--length", type=int, default=1024, help="context and stride")
    add("--sparsity", type=float, default=0.5)
    add("--batch-size", type=int, default=4)
    with errors.cli_errors():
        flags = parser.parse_args()
        model, params = lte_jax.load(flags.model, "float32")
        tokenizer, task = lte_jax.load_tokenizer(flags.model), tasks.MEASURED["wikitext"]
        texts = data.read_texts(flags.calibration, split="train")
        records = data.pack(data.tokenize(texts, tokenizer), flags.length)
        rows = max(1, flags.calibration_tokens // flags.length)
        settings = {"target_sparsity": flags.sparsity, "router": "none"}
        sparse, experts = lte_jax.moefy(
            model, params, records.tokens_RL[:rows], records.segments_RL[:rows], **settings
        )
        how = {"batch_size": flags.batch_size}
        dense = tasks.Run(model, params, tokenizer, flags.data, flags.length, flags.records, how)
        how = how | {"routing": "oracle_experts"}
        oracle = dataclasses.replace(dense, model=sparse, params=experts, how=how)
        del params, experts
        print(report.task_table(tasks.rows(task, {"dense": dense, "oracle": oracle})))


if __name__ == "__main__":
    main()
