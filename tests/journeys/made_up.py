"""Made-up texts: short stories from a few words, in each format that a user may have them in."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

WHO = "a fox, an old man, the girl, my friend Tom, a little bird, the king".split(", ")
DID = "found, lost, wanted, painted, carried home, gave away".split(", ")
WHAT = "a red ball, the last apple, some bread, a warm hat, the key, a letter".split(", ")
END = "and was glad., but it rained., so they sang., and went to sleep.".split(", ")


def story(rng: random.Random, sentences: int = 8) -> str:
    """A few sentences, no two stories alike."""
    words = (
        f"{rng.choice(WHO)} {rng.choice(DID)} {rng.choice(WHAT)} {rng.choice(END)}"
        for _ in range(sentences)
    )
    return " ".join(line[0].upper() + line[1:] for line in words)


def texts(folder: Path, count: int = 600) -> None:
    """Writes stories.jsonl, stories.txt, stories.csv, and the folder parts/ of JSON lines."""
    rng = random.Random(0)
    stories = [story(rng) for _ in range(count)]
    (folder / "parts").mkdir(parents=True)

    def lines(some: list[str]) -> str:
        return "".join(json.dumps({"text": text}) + "\n" for text in some)

    (folder / "stories.jsonl").write_text(lines(stories))
    (folder / "stories.txt").write_text("\n\n".join(stories) + "\n")
    with (folder / "stories.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [("title", "text"), *((f"No. {i}", s) for i, s in enumerate(stories))]
        )
    for part in range(3):
        (folder / f"parts/{part}.jsonl").write_text(lines(stories[part::3]))
