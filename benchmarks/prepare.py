"""Documents per second of `lte-jax prepare`, beside datasets.map with the same tokenizer.

    python benchmarks/prepare.py --model=FOLDER --texts=FILE.jsonl --workers=1,2

The rows of FILE ({"text": ...}) are repeated up to --documents, each with its number in front. Both
start from that JSON-lines file and end on the disk, each time in a new process and an empty folder,
in turns; imports are not counted. `datasets` (the extra `data`) reads the file into Arrow, and its
map, batched, with as many processes, writes token ids. `prepare` also digests the file, holds texts
out, packs the rest into records of --length tokens, and digests the shards. With one worker, both
use the threads of the tokenizer itself.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from lte_jax.errors import UserError, cli_errors

KINDS = ("prepare", "datasets.map")


def texts_of(file: pathlib.Path, documents: int, out: pathlib.Path) -> int:
    """Writes so many documents, made of the rows of a file; their characters."""
    texts = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    characters = 0
    with out.open("w") as lines:
        for number in range(documents):
            text = f"{number}. {texts[number % len(texts)]}"
            characters += len(text)
            lines.write(json.dumps({"text": text}) + "\n")
    return characters


def prepare(flags: argparse.Namespace, texts: str, folder: pathlib.Path) -> float:
    from lte_jax import data, hf
    from lte_jax.config import DataConfig

    config, tokenizer = hf.read_config(flags.model)[0], hf.load_tokenizer(flags.model)
    settings = DataConfig(train=texts, length=flags.length, max_validation_records=64)
    start = time.perf_counter()
    data.prepare(
        *(folder / "shards", settings, tokenizer, config),
        end=tokenizer.eos_token_id,
        processes=flags.worker,
    )
    return time.perf_counter() - start


def datasets_map(flags: argparse.Namespace, texts: str, folder: pathlib.Path) -> float:
    try:
        import datasets
    except ImportError:
        raise UserError("datasets.map needs datasets: pip install 'lte-jax[data]'") from None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(flags.model)

    def tokenized(batch):
        return tokenizer(batch["text"], return_attention_mask=False, verbose=False)

    datasets.disable_progress_bars()
    start = time.perf_counter()
    rows = datasets.load_dataset("json", data_files=texts, split="train", cache_dir=str(folder))
    count = flags.worker if flags.worker > 1 else None
    rows.map(tokenized, batched=True, num_proc=count, remove_columns=["text"])
    return time.perf_counter() - start


def measure_here(flags: argparse.Namespace) -> None:
    """One measurement, in this process; prints seconds, CPU seconds and memory as JSON."""
    work = prepare if flags.measure == "prepare" else datasets_map
    with tempfile.TemporaryDirectory(dir=flags.out) as folder:
        seconds = work(flags, str(flags.texts), pathlib.Path(folder))
    used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(usage.ru_utime + usage.ru_stime for usage in used)
    peak = max(usage.ru_maxrss for usage in used) / 1e3  # of the largest process
    print(json.dumps({"seconds": seconds, "cpu": cpu, "megabytes": peak}))


def measured(flags: argparse.Namespace, kind: str, worker: int, texts: pathlib.Path) -> dict:
    command = [sys.executable, __file__, f"--model={flags.model}", f"--texts={texts}"]
    command += [f"--measure={kind}", f"--worker={worker}", f"--length={flags.length}"]
    env = os.environ | {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([*command, f"--out={flags.out}"], env=env, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{kind} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


@cli_errors()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="folder with config and tokenizer")
    add("--texts", type=pathlib.Path, required=True, help="JSON lines with a text in each")
    add("--documents", type=int, default=100_000)
    add("--length", type=int, default=256)
    add("--workers", default="1,2", help="numbers of processes")
    add("--rounds", type=int, default=3)
    add("--only", choices=KINDS, help="measure one of them alone")
    add("--out", default=tempfile.gettempdir(), help="where temporary folders go")
    add("--measure", choices=KINDS, help=argparse.SUPPRESS)  # what a new process is to do
    add("--worker", type=int, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.measure:
        return measure_here(flags)
    with tempfile.TemporaryDirectory(dir=flags.out) as folder:
        texts = pathlib.Path(folder) / "texts.jsonl"
        characters = texts_of(flags.texts, flags.documents, texts)
        print(
            f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {flags.documents:,} documents"
        )
        print(f"of {characters / flags.documents:,.0f} characters; median of {flags.rounds}\n")
        print("| | workers | documents / s | s | CPU s | MB, largest process |")
        print("|---|--:|--:|--:|--:|--:|")
        kinds = [flags.only] if flags.only else KINDS
        cases = [(kind, int(worker)) for worker in flags.workers.split(",") for kind in kinds]
        found = {case: [] for case in cases}
        for _ in range(flags.rounds):
            for case in cases:
                found[case].append(measured(flags, *case, texts))
        for (kind, worker), each in found.items():
            middle = {k: statistics.median(one[k] for one in each) for k in each[0]}
            rate = flags.documents / middle["seconds"]
            numbers = f"{middle['seconds']:.2f} | {middle['cpu']:.2f} | {middle['megabytes']:.0f}"
            print(f"| {kind} | {worker} | {rate:,.0f} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
