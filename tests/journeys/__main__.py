"""Journeys: what a stranger does first, as commands whose last line is checked.

    python tests/journeys           # a clone with an environment made from nothing: make journeys
    python tests/journeys --here    # this checkout and environment, smaller: part of `make check`

Models and texts are made up here; nothing is downloaded but the environment's packages. The
commands are those of README and docs, in steps.py. Prints each with its time; exit code 1 if any
went wrong.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import made_up
from steps import JOURNEYS, Step

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 900  # seconds for a step
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


def clone(folder: Path) -> Path:
    """The last commit of this checkout, alone: nothing beside it, nothing installed."""
    made = folder / "clone"
    subprocess.run(["git", "clone", "--quiet", ROOT, made], check=True)
    return made


def environment(checkout: Path, out: Path, here: bool) -> dict[str, str]:
    """What a stranger's shell has, and the variables that the steps name."""
    kept = ("HOME", "PATH", "LANG", "TMPDIR", "XLA_FLAGS", "JAX_PLATFORMS", "PIP_INDEX_URL")
    env = {name: os.environ[name] for name in kept if name in os.environ}
    scripts = Path(sys.executable).parent if here else checkout / ".venv/bin"
    env["PATH"] = f"{scripts}:{env['PATH']}"
    env |= {"OUT": str(out), "SMOKE": ":smoke" if here else "", "COMMA_SMOKE": ",smoke"}
    return env | {"PYTHONPATH": str(checkout)} if here else env


def fault(step: Step, cwd: Path, env: dict[str, str]) -> str:
    """Runs a step; what is wrong with it, or nothing."""
    try:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", step.command],
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=LIMIT,
        )
    except subprocess.TimeoutExpired:
        return f"not done after {LIMIT} s"
    output = ESCAPES.sub("\n", done.stdout.decode(errors="replace"))
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    wrong = ""
    if done.returncode != step.code:
        wrong = f"exit code {done.returncode}, expected {step.code}"
    elif not re.search(step.last, last):
        wrong = f"the last line is {last!r}, expected {step.last!r}"
    elif missing := [text for text in step.says if not re.search(text, output, re.MULTILINE)]:
        wrong = f"nothing in its output is {missing[0]!r}"
    elif "Traceback" in output or "PyTorch was not found" in output:
        wrong = "its output has a traceback, or asks for PyTorch"
    return wrong and "\n    ".join([wrong, *lines[-15:]])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--here", action="store_true", help="smaller, in this environment")
    parser.add_argument("--only", type=int, action="append", help="a journey's number")
    flags = parser.parse_args()
    failed, begin = 0, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="journeys-") as folder:
        out = Path(folder) / "out"
        made_up.texts(out / "texts")
        checkout = ROOT if flags.here else clone(Path(folder))
        env = environment(checkout, out, flags.here)
        for number, (title, steps) in JOURNEYS.items():
            if flags.only and number and number not in flags.only:
                continue  # the first one makes the models that the others use
            print(f"\n{number}. {title}", flush=True)
            for step in steps:
                if flags.here and step.alone or not flags.here and step.here:
                    continue
                start = time.monotonic()
                wrong = fault(step, checkout, env)
                failed += bool(wrong)
                seconds = time.monotonic() - start
                print(
                    f"{'FAIL' if wrong else 'ok':>6} {seconds:5.0f} s  {step.command}", flush=True
                )
                if wrong:
                    print(f"    {wrong}", flush=True)
    minutes = (time.monotonic() - begin) / 60
    print(f"\n{failed} steps failed, {minutes:.1f} minutes")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
