"""What is made of sweeps' results.json: the values that a search finds, and pages."""

import json
import math
import pathlib
import re

import numpy as np
import pytest

from lte_jax import config
from lte_jax.errors import UserError
from lte_jax.sweep import claims, page, results, search, tables

ROOT = pathlib.Path(__file__).resolve().parents[1]


def run(method, seed, quality, target=None, sparsity=None, **more):
    """A run of results.json."""
    share = sparsity if sparsity is not None else target or 0.0
    made = {"name": f"{method}-{target}-{seed}", "method": method, "target": target, "seed": seed}
    made |= {"oracle": False, "experts": bool(share), "settings": [f"seed={seed}"]}
    made |= {"quality": quality, "token_ppl": quality, "sparsity": share, "gflops_per_token": 1.0}
    return made | {"seconds": 1800.0, "commit": "0123456789abcdef"} | more


def sweep(runs, reference="", **more):
    """Results as a sweep writes them; results.py would add a summary, which nothing here reads."""
    made = {"grid": {"config": "configs/demo.py", "reference": reference}, "runs": runs}
    made |= {"metric": "perplexity per token", "missing": [], "environment": {"device": "cpu cpu"}}
    return made | more


# -------------------------------------------------------------------------------------- the search


def trials(guard, points, seeds=(0,)):
    """Runs of a curve: points are (eta, sparsity, quality); the second seed has more of both."""
    return [
        run(f"guard {guard}, eta {eta}", seed, ppl + seed, None, share + 0.02 * seed) | {
            "settings": ["a=b", f"lte.efficiency_weight={eta}", f"eps={guard}", f"seed={seed}"]
        }
        for eta, share, ppl in points
        for seed in seeds
    ]  # fmt: skip


LOW = ((0.1, 0.2, 2.0), (1, 0.5, 2.3), (10, 0.9, 3.0))
HIGH = ((0.1, 0.4, 2.3), (1, 0.6, 2.4), (10, 0.95, 2.9))


def test_a_search_reads_between_neighbours():
    others = [run("dense", 0, 1.9), run("ours", 0, 1.0, 0.75)]
    made = sweep([*others, *trials(1, LOW), *trials(2, HIGH)])
    found = search.choose(made, "lte.efficiency_weight", (0.3, 0.8))
    assert [place.others for place in found] == [{"eps": "1"}, {"eps": "2"}]
    for place, points, target in zip(found, (LOW, HIGH), (0.3, 0.8), strict=True):
        etas, shares, ppls = map(np.array, zip(*points, strict=True))
        assert math.log(place.value) == pytest.approx(np.interp(target, shares, np.log(etas)))
        assert place.quality == pytest.approx(np.interp(target, shares, ppls))
    assert found[1].between == (0.6, 0.95)


def test_a_search_takes_means_over_seeds_and_any_direction():
    fallen = tuple((eta, 1 - share, 10 - ppl) for eta, share, ppl in LOW)
    made = sweep(trials(1, fallen, (0, 1)))
    [place] = search.choose(made, "lte.efficiency_weight", (0.66,))  # halfway from 0.81 to 0.51
    assert (place.value, place.quality) == pytest.approx((0.1 * 10**0.5, 8.35))
    assert place.others == {}  # of one curve


def test_of_a_metric_more_is_better():
    scored = [r | {"metrics": {"accuracy": r["quality"]}} for r in trials(1, LOW) + trials(2, HIGH)]
    [place] = search.choose(sweep(scored), "lte.efficiency_weight", (0.8,))
    assert place.others == {"eps": "1"} and place.quality == pytest.approx(2.825)


def test_a_key_that_is_zero_is_read_linearly():
    [place] = search.choose(
        sweep(trials(1, ((0, 0.2, 2.0), (4, 0.6, 3.0)))), "lte.efficiency_weight", (0.5,)
    )
    assert (place.value, place.quality) == pytest.approx((3.0, 2.75))


def test_the_command_prints_a_row(tmp_path, capsys):
    file = tmp_path / "results.json"
    file.write_text(json.dumps(sweep(trials(0.25, LOW) + trials(0.5, HIGH))))
    search.main([str(file), "--targets=0.3,0.8"])
    said = capsys.readouterr().out
    assert "| 80% | 3.73 | eps=0.5 | 60.0% and 95.0% | 2.686 |" in said
    row = eval(f"config.Row(target='', targets=(0.3, 0.8), {said.partition('at=')[1]}"
               f"{said.partition('at=')[2]})")  # fmt: skip
    assert row.at[0.8] == ("lte.efficiency_weight=3.73", "eps=0.5")
    search.main([str(file), "--targets=0.3"])
    assert 'at={\n    0.3: ("lte.efficiency_weight=' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--targets=0.3,0.96",), "0.96 is outside of the 20.0% to 90.0% that lte.efficiency"),
        (("--targets=0.3", "--key=lte.threshold"), "no run without a target sets it"),
        (("--targets=3",), "strictly between 0 and 1"),
        ((), "required: --targets"),
    ],
)
def test_bad_input_to_the_search(words, line, tmp_path, capsys):
    file = tmp_path / "results.json"
    file.write_text(json.dumps(sweep(trials(1, LOW))))
    with pytest.raises(SystemExit) as stopped:
        search.main([str(file), *words])
    assert stopped.value.code == 2 and line in capsys.readouterr().err.splitlines()[-1]


# -------------------------------------------------------------------------------------- the claims


def made_up():
    """Two seeds that differ by more than the methods."""
    runs = []
    for seed, base in enumerate((2.0, 4.0)):
        runs += [run("dense, untouched", seed, base), run("dense, ReLU", seed, 1.1 * base)]
        for target in (0.5, 0.75):
            cost = 1 + target / 5
            runs.append(run("ours", seed, cost * base, target))
            runs.append(run("random routers", seed, (cost + 0.1 + 0.01 * seed) * base, target))
    return runs


def test_a_claim_is_compared_seed_by_seed():
    whole = page.whole(page.merged([sweep(made_up(), "ours")]))
    found = claims.differences(whole, "random routers", "ours")
    expected = {"mean": 10.5, "deviation": math.sqrt(0.5), "error": 0.5}
    assert found == {0.5: pytest.approx(expected), 0.75: pytest.approx(expected)}
    lines = claims.table(whole).splitlines()
    assert lines[2:] == [
        "| random routers are worse (Fig. 12) | random routers against ours | "
        "50%: +10.5 ± 0.5%; 75%: +10.5 ± 0.5% | as in the paper |"
    ]
    left = claims.untested(whole)
    assert len(left) == len(claims.CLAIMS) - 1
    assert not [says for says in left if says.startswith("random routers")]


@pytest.mark.parametrize(
    ("numbers", "alike", "words"),
    [
        ([(1.0, 0.4), (2.0, 0.4)], False, "as in the paper"),
        ([(1.0, 0.4), (2.0, 1.1)], False, "not at every sparsity"),
        ([(1.0, 0.6), (-2.0, 1.1)], False, "no difference"),
        ([(-1.0, 0.4), (-2.0, 1.1)], False, "the other way round, or no difference"),
        ([(1.0, 0.6), (-2.0, 1.1)], True, "as in the paper"),
        ([(1.0, 0.6), (-2.0, 0.9)], True, "not as in the paper"),
        ([(1.0, None)], False, "one seed"),
    ],
)
def test_verdicts(numbers, alike, words):
    found = [{"mean": mean, "error": error} for mean, error in numbers]
    assert claims.verdict(found, alike) == words


def test_the_methods_of_claims_are_in_grids():
    """But for the row that waits for a search."""
    names = set()
    for spec in ("methods", "ablations", "paper:separability"):
        names |= config.load_sweep(spec)[0].methods.keys()
    told = {claim.worse for claim in claims.CLAIMS}
    told |= {name for claim in claims.CLAIMS for name in claim.than}
    assert told - names <= {claims.SEARCHED}


# ---------------------------------------------------------------------------------------- the page

TEXT = "# Results\n\nBefore.\n\n<!-- BEGIN made-up -->\nold\n<!-- END made-up -->\n\nAfter.\n"


@pytest.fixture
def place(tmp_path):
    """A page, two sweeps that share their dense rows, and the flags of the command."""
    runs = made_up()
    dense = [r for r in runs if r["method"].startswith("dense")]
    for name, some in {"one": runs[:8], "two": [*dense, *runs[8:]]}.items():
        told = sweep(some, "ours" if name == "one" else "", missing=["late-0"])
        (tmp_path / f"{name}.json").write_text(json.dumps(told))
    (tmp_path / "page.md").write_text(TEXT)
    flags = [f"--page={tmp_path / 'page.md'}", f"--keep={tmp_path / 'kept'}"]
    return tmp_path, flags, [str(tmp_path / "one.json"), str(tmp_path / "two.json")]


def test_a_section_of_a_page(place):
    folder, flags, files = place
    page.main(["made-up", *files, *flags, "--no-figures"])
    text = (folder / "page.md").read_text()
    before, after = text.split("<!-- BEGIN made-up -->")[0], text.split("<!-- END made-up -->")[1]
    assert (before, after) == ("# Results\n\nBefore.\n\n", "\n\nAfter.\n") and "\nold\n" not in text
    assert "12 runs of `configs/demo.py`, 6.0 hours of training on cpu; commit 01234567" in text
    assert "| ours | 2 |  | +10.0% | +15.0% |" in text
    details = (folder / "kept/made-up/table.md").read_text()
    assert "| ours | 75% | 2 | 75.0% | 3.450 ± 1.150 | +15.0% | 1 |" in details
    assert "Not finished: 1 of 13 runs: late-0." in text and "as in the paper" in text
    assert "Of the paper, not run here: noisy top-k softmax" in text
    kept = json.loads((folder / "kept/made-up/results.json").read_text())
    assert len(kept["runs"]) == 12 and "settings" not in kept["runs"][0]
    assert page.section("made-up", kept) in text
    (folder / "page.md").write_text(TEXT)
    page.main(["made-up", *flags, "--no-figures"])  # of what was kept
    assert (folder / "page.md").read_text() == text


def test_its_figures_stand_beside_the_page(place):
    pytest.importorskip("matplotlib")
    folder, flags, files = place
    page.main(["made-up", *files, *flags])
    named = re.findall(r"^!\[.*\]\((.*)\)$", (folder / "page.md").read_text(), re.MULTILINE)
    assert named == ["made-up-quality.png", "made-up-cost.png", "made-up-ablation.png"]
    assert all((folder / name).stat().st_size > 1000 for name in named)


@pytest.mark.parametrize(
    ("change", "words", "line"),
    [
        (lambda told: told["runs"][0].update(quality=2.1), (), "dense, untouched-None-0 has 2.0"),
        (
            lambda told: told.update(metric="accuracy"),
            (),
            "of perplexity per token and of accuracy",
        ),
        (lambda told: told.pop("grid"), (), "no results of a sweep: expected the results.json"),
        (None, ("made-down",), "no section made-down: expected one line <!-- BEGIN made-down -->"),
        (None, ("../x",), "expected letters, digits and hyphens"),
    ],
)
def test_bad_input_to_the_page(change, words, line, place, capsys):
    folder, flags, files = place
    if change:
        told = json.loads((folder / "two.json").read_text())
        change(told)
        (folder / "two.json").write_text(json.dumps(told))
    with pytest.raises(SystemExit) as stopped:
        page.main([*(words or ("made-up",)), *files, *flags, "--no-figures"])
    assert stopped.value.code == 2 and line in capsys.readouterr().err.splitlines()[-1]
    assert (folder / "page.md").read_text() == TEXT and not (folder / "kept").exists()


def test_bad_input_nothing_was_kept(place, capsys):
    folder, flags, _ = place
    with pytest.raises(SystemExit):
        page.main(["made-up", *flags])
    assert "name the RESULTS.json of sweeps" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(UserError, match="no page"):
        page.write("made-up", page.merged([sweep(made_up())]), folder / "x.md", folder, False)


def test_the_sections_of_the_documentation_are_those_of_what_was_kept():
    text = (ROOT / "docs/results.md").read_text()
    kept = {file.parent.name: file for file in (ROOT / "benchmarks/results").glob("*/results.json")}
    assert set(re.findall(r"<!-- BEGIN (.*) -->", text)) == set(kept)
    for name, file in kept.items():
        told = page.read(file)
        assert page.put(name, page.section(name, told), text) == text, (
            f"python -m lte_jax.sweep.page {name} writes another section: run it"
        )
        assert all((ROOT / f"docs/{name}-{figure}").is_file() for figure in told["figures"])
        assert file.read_text() == page.stored(told)
        details = tables.table(page.whole(told)) + "\n" + tables.notes(page.whole(told))
        assert file.with_name("table.md").read_text() == details


def test_the_readme_has_figures_of_the_page():
    """Its table has some of the methods, and no column of seeds and dense rows."""
    told = page.read(ROOT / "benchmarks/results/babyllama/results.json")
    rows = [line.split("|") for line in tables.overview(page.whole(told)).splitlines()]
    whole = {"|".join([*cells[:2], *cells[4:]]) for cells in rows}
    text = (ROOT / "README.md").read_text()
    mine = re.search(r"^\| method \| 50% .*\n(?:\|.*\n)+", text, re.MULTILINE)
    assert mine is not None
    head, _, *lines = mine[0].splitlines()
    assert head in whole and len(lines) > 5
    assert set(lines) <= whole


def test_a_best_dense_row_is_found_again():
    """As `results.collect` finds it of all that was measured."""
    whole = page.whole(page.merged([sweep(made_up(), "ours")]))
    assert whole["dense"] == "dense, untouched"
    assert whole["summary"] == results.summary(made_up(), "dense, untouched", "ours")
