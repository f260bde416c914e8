"""What mkdocs adds to the site besides the files of docs/: see mkdocs.yml.

README.md is its home; other pages of the repository join it, and the links between all of them are
led to where they are on the site. The configuration's page is made from the dataclasses.
"""

import ast
import contextlib
import io
import os
import pathlib
import posixpath
import re
import tomllib
import typing

from mkdocs.structure.files import File, Files

from lte_jax import cli, config

os.environ["COLUMNS"] = "96"  # of the help of commands
ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = {  # file of the repository -> page of the site
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "kernels/README.md": "kernel-contract.md",
    "benchmarks/results/README.md": "measurements.md",
}
LINKED = PAGES | {"lte_jax/config/schema.py": "configuration.md"}
SOURCES = {page: source for source, page in PAGES.items()}
FENCED = re.compile(r"(^ *```.*?^ *```)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"""(!?\[[^\]]*\])\(([^)\s]+)\)|(src=")([^"]+)(")""")


def on_config(config, **_):
    """The repository's address, if there is one yet, is pyproject.toml's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    config.repo_url = project.get("urls", {}).get("Repository")
    return config


def on_files(files: Files, config, **_) -> Files:
    """Adds the pages that are not files of docs/."""
    made = {page: (ROOT / source).read_text() for source, page in PAGES.items()}
    made |= {"configuration.md": configuration(), "commands.md": commands()}
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page, config, **_) -> str:
    """Leads a page's links to where things are on the site."""
    here = page.file.src_uri
    source = SOURCES.get(here, f"docs/{here}")
    parts = FENCED.split(markdown)
    parts[::2] = [
        LINK.sub(lambda found: _link(found, source, here, config.repo_url), part)
        for part in parts[::2]
    ]
    return "".join(parts)


def _link(found: re.Match, source: str, here: str, repository: str | None) -> str:
    """One link or image; only its label where it leads to a file without an address."""
    label, target = (found[1], found[2]) if found[1] else (found[3], found[4])
    path, hash_, anchor = target.partition("#")
    if re.match(r"[a-z]+:", target) or not path:
        return found[0]
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    page = LINKED.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
    if page is not None:
        target = posixpath.relpath(page, posixpath.dirname(here) or ".") + hash_ + anchor
    elif not (ROOT / path).exists():
        return found[0]  # mkdocs refuses it
    elif repository:
        target = f"{repository.rstrip('/')}/blob/main/{path}{hash_}{anchor}"
    elif found[1]:
        return label.strip("!")[1:-1]
    return f"{label}({target})" if found[1] else f"{label}{target}{found[5]}"


# ---------------------------------------------------------------------------------------- commands


def commands() -> str:
    """The page of what each command's --help says; the keys of train have their own page."""
    text = ["# Commands", "What `lte-jax COMMAND --help` says.", _help()]
    for name in cli.COMMANDS:
        said = _help(name).replace("\n\n--config.KEY=VALUE, keys", "\0").partition("\0")[0]
        text.append(f"## `lte-jax {name}`\n\n{said.removesuffix('```').rstrip()}\n```")
    text.append("[All keys](configuration.md) of `train` have a page of their own.")
    return "\n\n".join(text) + "\n"


def _help(*words: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        cli.main([*words, "--help"])
    return f"```text\n{said.getvalue().strip()}\n```"


# ----------------------------------------------------------------------------------- configuration


def configuration() -> str:
    """The page of all keys: type, range, default and meaning, by section; then the files."""
    sections: dict[str, list] = {}
    for key in config.keys():
        sections.setdefault(key.name.rpartition(".")[0], []).append(key)
    text = [
        "# Configuration",
        "A file in `configs/` sets these keys, and `--config.KEY=VALUE` one of them; "
        "`python train.py --config=FILE.py --help` shows them with the values of a file. "
        "Made from `lte_jax/config/schema.py`.",
    ]
    for prefix, keys in sorted(sections.items(), key=lambda item: item[0] == ""):
        title = f"`{prefix}`" if prefix else "The rest"
        text += [
            f"## {title}",
            "" if not prefix else _dataclass(prefix).__doc__ or "",
            _table(keys),
        ]
    return "\n\n".join([*text, _presets(), _files()]) + "\n"


def _table(keys: list) -> str:
    head = "| key | default | type and range | meaning |\n|---|---|---|---|\n"
    rows = [
        (_name(key.name), f"`{key.value!r}`", config.describe(key.hint), key.meaning)
        for key in keys
    ]
    return head + "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in rows)


def _name(key: str) -> str:
    """A key as code that may be broken after its dots, on narrow screens."""
    return f"<code>{key.replace('.', '.<wbr>')}</code>"


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("*", r"\*")


def _dataclass(prefix: str) -> type:
    found = config.Experiment
    for name in prefix.split("."):
        found = config.fields.section_of(typing.get_type_hints(found, include_extras=True)[name])
    return found


def _presets() -> str:
    """In what the presets differ."""
    ours, paper = (vars(config.PRESETS[name]) for name in ("ours", "paper"))
    rows = [
        f"| `lte.{name}` | `{ours[name]!r}` | `{paper[name]!r}` |"
        for name in ours
        if ours[name] != paper[name]
    ]
    return "\n".join(
        [
            "## The two presets of `lte`",
            "",
            "`ours` is the default. `paper` has the settings of LTE's paper, plus a guard in its "
            "separability loss. They differ in:",
            "",
            "| key | `ours` | `paper` |",
            "|---|---|---|",
            *rows,
        ]
    )


def _files() -> str:
    """What each file in configs/ says of itself."""
    text, folder = ["## The files in `configs/`"], ROOT / "configs"
    for file in (*sorted(folder.glob("*.py")), *sorted(folder.glob("*/*.py"))):
        said = ast.get_docstring(ast.parse(file.read_text()))
        text.append(f"### `{file.relative_to(folder)}`\n\n```text\n{said}\n```")
    return "\n\n".join(text)
