"""What a stranger meets on a code host: its pages, workflows and forms are whole and agree."""

import pathlib
import re
import subprocess
import tomllib

import pytest
import yaml

import lte_jax

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
GITHUB = ROOT / ".github"
OWN = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "kernels/README.md"]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), *(ROOT / page for page in OWN)])
FENCED = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)


def _read(path):
    return yaml.safe_load((ROOT / path).read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_reads_alike_on_a_code_host_and_on_the_site(page):
    text = FENCED.sub("", page.read_text())
    for target in re.findall(r'\]\(([^)\s]+)\)|src="([^"]+)"', text):
        path = "".join(target).partition("#")[0]
        if path and not re.match(r"[a-z]+:", path):
            assert (page.parent / path).exists(), f"{page.name} links to {path}"
    # Without a blank line before it, a list is text of the paragraph in Python's Markdown.
    glued = re.search(r"^(?![-*] |\d+\. | |$|#|<).*\n(?:[-*] |\d+\. )\S.*", text, re.MULTILINE)
    assert not glued, glued[0]


def test_the_site_leads_to_every_page():
    def entries(nav):
        for entry in nav:
            value = entry if isinstance(entry, str) else next(iter(entry.values()))
            yield from [value] if isinstance(value, str) else entries(value)

    site, hooks = _read("mkdocs.yml"), (ROOT / "docs/site/hooks.py").read_text()
    listed = list(entries(site["nav"]))
    here = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert len(listed) == len(set(listed))
    assert here <= set(listed), "new pages of docs/ go into the nav of mkdocs.yml"
    for made in set(listed) - here:
        assert f'"{made}"' in hooks, f"{made} is neither in docs/ nor made by docs/site/hooks.py"


@pytest.mark.parametrize("file", sorted(GITHUB.glob("workflows/*")), ids=lambda file: file.name)
def test_workflows_are_whole(file):
    workflow = yaml.load(file.read_text(), Loader=yaml.BaseLoader)  # `on` is a bool otherwise
    assert {"name", "on", "jobs", "permissions"} <= workflow.keys()
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name, job in workflow["jobs"].items():
        assert {"runs-on", "timeout-minutes", "steps"} <= job.keys(), name
        for step in job["steps"]:
            assert len({"run", "uses"} & step.keys()) == 1, step
            if "uses" in step:
                assert re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"])
            for line in step.get("run", "").splitlines():
                if line.startswith("make "):
                    assert set(line.split()[1:]) <= targets, line
    versions = workflow["jobs"]["tests"]["strategy"]["matrix"]["python"]
    named = [word.split()[-1] for word in PROJECT["classifiers"] if ":: 3." in word]
    assert versions == named and PROJECT["requires-python"] == f">={versions[0]}"


@pytest.mark.parametrize("name", ["bug.yml", "idea.yml"])
def test_issue_forms_are_whole(name):
    form = _read(f".github/ISSUE_TEMPLATE/{name}")
    assert form["name"] and form["description"]
    for part in form["body"]:
        assert part["type"] in ("textarea", "input", "dropdown") and part["attributes"]["label"]
    assert len({part["id"] for part in form["body"]}) == len(form["body"])


def test_the_environment_can_do_what_readme_says():
    """`make env`, and README's line for an environment of one's own: texts of the hub among it."""
    [extras] = re.findall(r"^EXTRAS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    [own] = re.findall(r"pip install -e '\.\[([\w-]+,[\w,-]+)\]'", (ROOT / "README.md").read_text())
    assert {"data", "plot", "tasks"} == {*own.split(",")} <= {*extras.split(",")}
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    for extra in own.split(","):
        wanted = {
            re.match(r"[\w-]+", r)[0].lower() for r in PROJECT["optional-dependencies"][extra]
        }
        assert wanted <= {*pinned}, f"constraints.txt has no version of {wanted - {*pinned}}"


def test_the_citation_agrees_with_the_package():
    cited = _read("CITATION.cff")
    assert cited["cff-version"] == "1.2.0" and cited["message"] and cited["title"]
    assert cited["authors"] == [{"name": "the lte_jax authors"}]
    assert cited["version"] == PROJECT["version"] == lte_jax.__version__
    assert cited["license"] == PROJECT["license"]
    [paper] = cited["references"]
    assert paper["url"] == "https://arxiv.org/abs/2402.06126" and len(paper["authors"]) == 7
    assert cited.get("repository-code") == PROJECT.get("urls", {}).get("Repository")


def test_the_changelog_keeps_its_form():
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## \[(.+?)\]( - \d{4}-\d\d-\d\d)?$", text, re.MULTILINE)
    assert versions and versions[0][0] in ("Unreleased", PROJECT["version"])
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) <= kinds


def test_what_the_guide_for_contributors_names_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    places = [ROOT, ROOT / "lte_jax", ROOT / "lte_jax/hf", ROOT / "tests"]
    for path in re.findall(r"`([\w./]+(?:\.py|\.md|\.yml|\.txt|\.toml|\.cff|/))`", text):
        if path != "utils.py":  # named as what is not there
            assert any((place / path).exists() for place in places), path


def test_the_examples_that_the_guide_names_are_in_the_history():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for commit in re.findall(r"`(?:git show )?([0-9a-f]{7})`", text):
        found = subprocess.run(
            ["git", "-C", ROOT, "cat-file", "-e", f"{commit}^{{commit}}"], capture_output=True
        )
        if found.returncode:
            whole = subprocess.run(
                ["git", "-C", ROOT, "rev-parse", "--is-shallow-repository"],
                capture_output=True,
                text=True,
            )
            if whole.stdout.strip() != "false":
                pytest.skip("needs the whole history, which this checkout lacks")
            raise AssertionError(commit)
