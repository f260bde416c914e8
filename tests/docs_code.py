"""The code of README, CONTRIBUTING and docs/: its blocks, and its commands with their programs."""

import importlib
import pathlib
import re
import runpy
import shlex
import tomllib
from collections.abc import Callable, Iterator

from lte_jax import cli

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PAGES = ["README.md", "CONTRIBUTING.md", "kernels/README.md"]
PAGES += sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)

# Programs whose lines are only looked up or parsed, and why. Those of ours are run, see
# test_docs_commands.py; a program in neither place fails.
NOT_RUN = {
    "curl": "asks a server, as test_serve.py does",
    "make": "builds environments, or runs other tests; `make demo` alone is run",
    "pip": "needs the network; its extras are looked up in pyproject.toml",
    "pytest": "would run tests within tests; its files are looked up",
    "pre-commit": "would install hooks into this checkout",
}
OURS = ("train", "evaluate", "generate", "convert", "export-gguf", "sweep", "prepare", "benchmark")

ENDLESS = ("serve",)  # of ours, run by test_serve.py; here only parsed


def blocks(page: str, *languages: str) -> list[tuple[int, str]]:
    """Line and text of the page's blocks in one of the languages."""
    text = (ROOT / page).read_text()
    return [
        (text.count("\n", 0, found.start()) + 2, found[3])
        for found in FENCE.finditer(text)
        if found[2] in languages
    ]


def _commands() -> Iterator[tuple[str, list[str]]]:
    """Page and words of each line of the shell blocks; lines that end in a backslash are joined."""
    for page in PAGES:
        for _, block in blocks(page, "sh"):
            block = block.replace("$SLURM_ARRAY_TASK_ID", "0")  # as in a job array's first job
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words.pop(0)  # a variable of the environment
                if words:
                    yield page, words


COMMANDS = list(_commands())
WRITTEN = [f"{page}: {' '.join(words)}" for page, words in COMMANDS]


def program(words: list[str]) -> tuple[str, list[str], Callable[[], None] | None]:
    """Which of NOT_RUN or OURS a command calls, its arguments, and a function that calls it.

    That function takes them from sys.argv; of programs of others it is None.
    """
    name, *args = words
    if name == "python" and args[:1] == ["-m"]:
        name, *args = args[1:]
        if name.startswith("lte_jax"):  # lte_jax.sweep is lte-jax sweep
            package, _, command = name.partition(".")
            name, args = package.replace("_", "-"), [*filter(None, [command]), *args]
    elif name == "python":
        script, *args = args
        assert (ROOT / script).is_file(), f"no script {script}"
        kind = "benchmark" if script.startswith("benchmarks/") else script.removesuffix(".py")
        return kind, args, lambda: runpy.run_path(str(ROOT / script), run_name="__main__")
    name = name.removeprefix(".venv/bin/")
    if name == "lte-jax":
        assert name in PROJECT["scripts"]
        command, *args = args
        assert command in cli.COMMANDS, f"no command {command}"
        module = importlib.import_module(f"lte_jax.cli.{command.replace('-', '_')}")
        return command, args, module.main
    return name, args, None
