"""The fuzzer at a fixed seed; and that the fuzzer sees what it is there to see."""

import pathlib
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow
FUZZ = pathlib.Path(__file__).parent / "fuzz"
# Those that are quick.
KINDS = "config weights lte tokenizer texts settings flags api".split()


def fuzz(*flags):
    command = [sys.executable, str(FUZZ), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=1200)


def test_hostile_input_ends_in_success_or_one_line():
    """What `make fuzz` tries for ten minutes, with another SEED each time."""
    done = fuzz("--seed", 0, "--cases", 500, "--kinds", *KINDS)
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr
    [total] = [line for line in done.stdout.splitlines() if line.startswith("| all |")]
    tried, refused, succeeded, failed = map(int, total.split("|")[2:6])
    assert (tried, failed) == (500, 0)
    assert refused > 100 and succeeded > 50  # hurt enough, and not too much


def test_the_fuzzer_sees_every_sort_of_failure():
    # A seed that draws each sort once or twice.
    done = fuzz("--seed", 7566, "--cases", 11, "--kinds", "canary")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "| canary | 11 | 0 | 0 | 11 |" in done.stdout
    seen = set(re.findall(r"^\d+ x .*?: ([a-z ]+)$", done.stdout, re.MULTILINE))
    assert seen == set(
        "exception,exit,recursion,warning,empty,in the box,outside,program,memory,crash,hang".split(
            ","
        )
    ), done.stdout
