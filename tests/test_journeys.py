"""The commands of README and docs, one after the other, as someone new would give them."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.long
def test_every_step_ends_as_it_should():
    command = [sys.executable, "tests/journeys", "--here"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
