"""A folder where the commands of README and docs can be given, with all that they name, made up.

Models are small and random, of the family that stands under each hub id; data sets have a few rows,
in the columns of the hub's. Both are in hub/, a mirror.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from docs_code import ROOT
from hf_models import config_json, write_folder

from lte_jax import data

# Hub id, or a folder's name in docs -> a case of hf_models.py.
MODELS = {
    "HuggingFaceTB/SmolLM-135M": "llama",
    "HuggingFaceTB/SmolLM2-135M": "grouped_query",
    "google/gemma-3-270m": "gemma3",
    "openai-community/gpt2": "gpt2",
    "EleutherAI/pythia-70m": "neox",
    "ibm-granite/granite-3.3-2b-base": "granite",
    "mistralai/Mistral-7B-v0.1": "mistral",
    "allenai/OLMo-2-0425-1B": "olmo2",
    "opt-125m": "opt",
    "microsoft/Phi-3-mini-4k-instruct": "phi3",
    "Qwen/Qwen3-0.6B": "qwen3",
    "ByteDance-Seed/Seed-OSS-36B-Base": "seed_oss",
    "HuggingFaceTB/SmolLM3-3B-Base": "smollm3",
    "stabilityai/stablelm-2-1_6b": "stablelm",
    "bigcode/starcoder2-3b": "starcoder2",
}
ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
# What stands for a file or folder of the reader's -> where it is here.
PLACES = {
    "docs/sweeps.md": {"FOLDER": "hub/HuggingFaceTB/SmolLM-135M"},
    "docs/tasks.md": {"FOLDER": "hub/tuetschek/e2e_nlg", "DATA": "hub/nyu-mll"},
}
WORDS = "the film is good bad a dull fine plot and no joy great".split()
NAMES = "Zizzi, The Mill, Aromi, Blue Spice, Cocum, The Vaults".split(", ")
AREAS = "riverside", "city centre"


def make(folder: Path) -> None:
    """Fills an empty folder."""
    for name in ("configs", "benchmarks", "train.py", "evaluate.py"):
        (folder / name).symlink_to(ROOT / name)
    for name, case in MODELS.items():
        _decoder(folder / ("hub" if "/" in name else "") / name, case)
    _encoder(folder / "hub" / ENCODER)
    texts = [{"text": f"{i} times upon a time there was a {WORDS[i % 13]}. "} for i in range(200)]
    for place in ("texts.jsonl", "others.jsonl", "texts/a.jsonl", "texts/b.jsonl"):
        _write(folder / place, texts[:80])
    _data_sets(folder / "hub", texts)


def _decoder(folder: Path, case: str) -> None:
    longest = "n_positions" if case == "gpt2" else "max_position_embeddings"
    raw = config_json(case, vocab_size=259, bos_token_id=256, eos_token_id=257, **{longest: 512})
    if "pad_token_id" in raw:
        raw["pad_token_id"] = 258
    write_folder(folder, raw)
    data.byte_tokenizer().save_pretrained(folder)


def _encoder(folder: Path) -> None:
    from transformers import BertTokenizer

    folder.mkdir(parents=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    write_folder(folder, config_json("bert", vocab_size=len(words), pad_token_id=0))
    places = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(places.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text('{"pooling_mode_mean_tokens": true}')


def _data_sets(hub: Path, texts: list[dict]) -> None:
    for split, rows in (("train", texts[:120]), ("validation", texts[120:])):
        _write(hub / f"roneneldan/TinyStories/{split}.jsonl", rows)
    _write(hub / "Salesforce/wikitext/wikitext-2-raw-v1/test.jsonl", texts)
    asked = {"question": "Is it?", "choices": ["no", "so", "yes", "it"], "subject": "high_art"}
    for split, count in (("dev", 5), ("test", 4)):
        _write(
            hub / f"cais/mmlu/all/{split}.jsonl", [asked | {"answer": i % 4} for i in range(count)]
        )
    for split, count in (("train", 64), ("validation", 40)):
        for task in ("sst2", "mrpc", "rte"):
            columns = ("sentence",) if task == "sst2" else ("sentence1", "sentence2")
            _write(hub / f"nyu-mll/glue/{task}/{split}.jsonl", _judged(count, columns))
    for split, count in (("train", 64), ("validation", 12), ("test", 12)):
        _write(hub / f"tuetschek/e2e_nlg/{split}.jsonl", map(_described, range(count)))


def _judged(count: int, columns: tuple[str, ...]) -> Iterable[dict]:
    """Sentences, or pairs of them, and whether a word of praise is in the first one."""
    rng = np.random.default_rng(count)
    for _ in range(count):
        texts = {column: " ".join(rng.choice(WORDS, 6)) for column in columns}
        first = texts[columns[0]].split()
        yield texts | {"label": int("good" in first or "great" in first)}


def _described(number: int) -> dict:
    """A meaning and its text; two in a row have the same meaning."""
    name, area = NAMES[number // 2 % len(NAMES)], AREAS[number // 2 % len(AREAS)]
    first = (f"{name} is a place to eat in the {area}.", f"In the {area} there is {name}.")
    meaning = f"name[{name}], eatType[restaurant], food[Italian], priceRange[cheap], area[{area}]"
    text = first[number % 2] + " It is a cheap restaurant, its food is Italian, and people like it."
    return {"meaning_representation": meaning, "human_reference": text}


def _write(path: Path, rows: Iterable[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
