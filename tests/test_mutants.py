"""That `make mutants` tells a mutant that a test sees from one that none does."""

import importlib.util
import itertools
import pathlib
import subprocess

import pytest

MUTANTS = pathlib.Path(__file__).parent / "mutants"
TEST = "test_double.py::test_double"


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """The tool, on a checkout of one function and one test."""
    monkeypatch.syspath_prepend(MUTANTS)
    spec = importlib.util.spec_from_file_location("mutants_main", MUTANTS / "__main__.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    root = tmp_path / "checkout"
    root.mkdir()
    subprocess.run(["git", "init", "-q", root], check=True)
    (root / "double.py").write_text("def double(x):\n    return x + x  # twice\n")
    (root / "test_double.py").write_text(
        "from double import double\n\ndef test_double():\n    assert double(3) == 6\n"
    )
    monkeypatch.setattr(made, "ROOT", root)
    monkeypatch.setattr(made, "LIMIT", 3)
    return made


def test_mutants_are_killed_survive_or_say_nothing(tool, tmp_path, capsys):
    mutants = [
        tool.Mutant("zero", "double.py", "x + x", "x - x", TEST),
        tool.Mutant("comment", "double.py", "# twice", "# 2 x", TEST),
        tool.Mutant("gone", "double.py", "x * 2", "x", TEST),
        tool.Mutant("not once", "double.py", "double", "twice", "test_double.py"),
        tool.Mutant("no such file", "treble.py", "x", "y", TEST),
        tool.Mutant("no module any more", "double.py", "def double(x)", "def", TEST),
        tool.Mutant("without end", "double.py", "    return", "    while 1: x\n    return", TEST),
    ]
    before = {path.name: path.read_bytes() for path in tool.ROOT.glob("*.py")}
    assert tool.run(mutants, tmp_path / "copies") == 1
    out = capsys.readouterr().out
    assert "killed   zero  (test_double.py::test_double - assert 0 == 6" in out
    assert "survived comment" in out and "\nsurvived: comment\n" in out
    assert "'x * 2' stands 0 times in double.py: expected once" in out
    assert "its tests never end" in out
    assert "1 killed, 1 survived, 5 broken" in out
    assert before == {path.name: path.read_bytes() for path in tool.ROOT.glob("*.py")}
    assert tool.run(mutants[:1], tmp_path / "others") == 0


def test_mutants_need_tests_that_pass_without_them(tool, tmp_path, capsys):
    (tool.ROOT / "test_double.py").write_text("def test_double():\n    assert False\n")
    mutant = tool.Mutant("zero", "double.py", "x + x", "x - x", TEST)
    assert tool.run([mutant], tmp_path / "copies") == 1
    assert "the tests must pass without a mutant" in capsys.readouterr().out


def test_every_mutant_has_a_name_of_its_own(tool):
    names = [mutant.name for mutant in tool.MUTANTS]
    assert len(set(names)) == len(names)


def test_every_mutant_still_applies_and_names_a_test(monkeypatch):
    """The old text stands once where the mutant says, and the functions named as tests exist."""
    monkeypatch.syspath_prepend(MUTANTS)
    root = MUTANTS.parents[1]
    names = ("learning", "running", "families_tasks", "faults", "methods")
    lists = [importlib.import_module(name).MUTANTS for name in names]
    for mutant in itertools.chain(*lists):
        found = (root / mutant.file).read_text().count(mutant.old)
        assert found == 1, f"{mutant.name!r}: {mutant.old!r} stands {found} times in {mutant.file}"
        for test in mutant.tests.split():
            file, _, function = test.partition("::")
            named = f"def {function.partition('[')[0]}" if function else ""
            assert named in (root / file).read_text(), f"{mutant.name!r}: there is no {test}"
