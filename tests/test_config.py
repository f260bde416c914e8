"""Configs: files by path, overrides by typed keys, and one clear line for whatever is wrong.

Every mistake of a user is a row of a table: what is done, and what the line must name.
"""

import dataclasses
import functools
import math
import pathlib
import re
import runpy
import sys
import typing

import pytest

from lte_jax import config
from lte_jax.errors import Parser

ROOT = pathlib.Path(__file__).resolve().parents[1]
LLAMA = str(ROOT / "configs/llama7b.py")
TARGET = "float, strictly between 0 and 1, such as 0.7 for 70%; or None"  # in --help
START = """
from lte_jax import config

def get_config(arg=""):
    c = config.to_config_dict(config.Experiment())
"""


@pytest.mark.parametrize("variant", ["", ":smoke"])
@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.py")), ids=lambda f: f.stem)
def test_every_config_builds(file, variant):
    experiment = config.load_config(f"{file}{variant}")
    steps = sum(s.steps for s in (experiment.stages.router, experiment.stages.adapt))
    assert 0 < steps <= (20 if variant else 10**6)


@pytest.mark.parametrize("model", ["e2e.py:llama_small", "e2e.py:gpt2_small", "instruct.py:small"])
@pytest.mark.parametrize("more", ["", ",smoke"])
def test_a_control_is_dense_and_has_as_many_steps_in_all(model, more):
    sparse = config.load_config(f"{ROOT}/configs/{model}{more}")
    dense = config.load_config(f"{ROOT}/configs/{model},control{more}")
    stages = sparse.stages
    total = stages.finetune.steps + stages.router.steps + stages.adapt.steps
    assert min(stages.finetune.steps, stages.router.steps, stages.adapt.steps) > 0
    assert dense.stages.finetune == dataclasses.replace(stages.finetune, steps=total)
    assert dense.stages.router.steps == dense.stages.adapt.steps == 0
    assert dense.data == sparse.data and dense.source == sparse.source
    length = sparse.source.scratch.max_length
    assert length >= sparse.data.length > sparse.data.max_new_tokens > 0


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.py")), ids=lambda f: f.stem)
def test_config_docstring_says_command_cost_and_score(file):
    text = file.read_text().split('"""')[1]
    for part in (f"python train.py --config=configs/{file.name} --workdir=", "Cost:", "Expect"):
        assert part in text


def test_presets_of_a_config():
    assert config.load_config(LLAMA).lte.grouping == "coactivation"
    assert config.load_config(LLAMA + ":paper").lte.grouping == "kmeans"


def test_wikitext_is_one_text():
    """The set has a line a record: as a text each, perplexity would not be the paper's."""
    for file in (ROOT / "configs").glob("*.py"):
        data = config.load_config(str(file)).data
        if "wikitext" in f"{data.train} {data.validation}":
            assert data.join == "", file
    assert "wikitext" in config.load_config(LLAMA).data.train


@pytest.mark.parametrize(
    "override, expected",
    [
        ("lte.target_sparsity=0.7", 0.7),
        ("lte.target_sparsity=None", None),
        ("lte.efficiency_weight=2", 2.0),
        ("optim.eps=1e-6", 1e-6),
        ("lte.grouping=random", "random"),
        ("lte.efficiency_power=1", 1),
        ("report=False", False),
        ("data.pack=true", True),
        ("data.newline= ", " "),
        ("data.join= ", " "),
        ("data.join=none", None),
        ("data.end_token=none", "none"),
        ("data.train=a=b", "a=b"),
        ("sample_prompt=5", "5"),
        ("source.path=", ""),
        ("source.scratch.sliding_window=128", 128),
        ("source.scratch.eos_ids=1,2", (1, 2)),
        ("source.scratch.eos_ids=3", (3,)),
        ("source.scratch.eos_ids=()", ()),
        ("source.scratch.sliding_layers=" + "True,False," * 16, (True, False) * 16),
        ("source.scratch.rope_scaling=none", None),
    ],
)
def test_override(override, expected):
    value = config.load_config(LLAMA, [override])
    for name in override.partition("=")[0].split("."):
        value = getattr(value, name)
    assert value == expected and type(value) is type(expected)


def test_override_of_a_section_that_is_none():
    keys = ("source.scratch.rope_scaling.kind=linear", "source.scratch.rope_scaling.factor=2")
    scaling = config.load_config(LLAMA, keys).source.scratch.rope_scaling
    assert scaling == config.RopeScaling(kind="linear", factor=2.0)


def test_overrides_reach_every_key():
    """Each key of an Experiment can be set to its own default, written as on a command line."""
    written = [(key, repr(default).strip("'")) for key, _, default, _ in config.keys()]
    written = [(key, value) for key, value in written if "rope_scaling." not in key]
    assert len(written) > 80
    overrides = [f"{key}={value}".replace("\\n", "\n") for key, value in written]
    plain = ROOT / "configs/llama7b.py"
    assert config.load_config(str(plain), overrides) == config.Experiment()


BAD_OVERRIDES = {
    "lte.target_sparisty=0.7": "unknown key config.lte.target_sparisty: did you mean "
    "config.lte.target_sparsity?",
    "target_sparsity=0.7": "did you mean config.lte.target_sparsity?",
    "stages.adapt.steps.x=1": "did you mean config.stages.adapt.steps?",
    "lte=3": "config.lte is a section",
    "lte.expert_size": "config.lte.expert_size has no value",
    "lte.expert_size=1.5": "config.lte.expert_size=1.5: expected int",
    "lte.expert_size=big": "config.lte.expert_size='big': expected int",
    "lte.expert_size=0": "config.lte.expert_size=0: expected a positive integer",
    "lte.target_sparsity=0": "config.lte.target_sparsity=0.0: expected strictly between 0 and 1",
    "lte.target_sparsity=1.0": "config.lte.target_sparsity=1.0: expected strictly between 0 and 1",
    "lte.target_sparsity=70": "expected strictly between 0 and 1, such as 0.7 for 70%, or None",
    "lte.target_sparsity=nan": "config.lte.target_sparsity='nan': expected float",
    "lte.grouping=kmean": "expected one of 'kmeans', 'coactivation', 'random'",
    "lte.efficiency_power=3": "expected one of 1, 2",
    "data.end_token=eod": "config.data.end_token='eod': expected one of 'auto', 'eos', 'bos'",
    "data.pack=false": "config.data.pack=False: expected True where join='' makes one text",
    "data.pack=0": "config.data.pack=0: expected bool",
    "data.length=1": "config.data.length=1: expected 2 or more",
    "data.batch_size=0": "config.data.batch_size=0: expected a positive integer",
    "seed=True": "config.seed=True: expected int",
    "source.scratch.eos_ids=a": "expected tuple[int, ...]",
    "source.scratch.eos_ids=1,b": "expected tuple[int, ...]",
    "source.scratch.rope_scaling.kind=linear": "scratch.rope_scaling.factor is missing",
    "source.scratch.num_kv_heads=3": "config.source.scratch.num_kv_heads=3 does not divide",
    "source.scratch.sliding_layers=True,False": "expected one for each of 32 layers",
    "stages.router.steps=-1": "config.stages.router.steps=-1: expected zero or more",
    "stages.router.learning_rate=-1": "stages.router.learning_rate=-1.0: expected zero or more",
    "stages.router.warmup_ratio=2": "config.stages.router.warmup_ratio=2.0: expected within [0, 1]",
    "optim.microbatches=0": "config.optim.microbatches=0: expected a positive integer",
    "checkpoint.keep_last=0": "config.checkpoint.keep_last=0: expected a positive integer",
    "log_every=0": "config.log_every=0: expected a positive integer",
    "seed=-1": "config.seed=-1: expected zero or more",
    "seed=9223372036854775807": "expected zero or more, and less than 2**31",
    "source.compute_dtype=bfloat16": "config.source.compute_dtype was renamed to "
    "config.compute.dtype",
    "source.remat=True": "config.source.remat was renamed to config.compute.remat",
    "calibration_rows=4": "config.calibration_rows was renamed to config.lte.calibration_records",
    "lte.seed=-1": "config.lte.seed was renamed to config.seed",
    "name=mine": "config.name was removed: leave it out",
    "lte.separability_weight=-1": "config.lte.separability_weight=-1.0: expected zero or more",
    "lte.efficiency_weight=1e999": "weight=inf: expected a number, and finite in float32",
    "lte.separability_eps=1e-60": "separability_eps=1e-60: expected a positive number",
    "optim.b2=0.99999999999": "expected in [0, 1)",
    "optim.microbatches=3": "config.optim.microbatches=3 does not divide data.batch_size=16: set a "
    "batch_size of 18",
    "data.max_documents=-1": "config.data.max_documents=-1: expected a positive integer",
    "sample_tokens=-1": "config.sample_tokens=-1: expected zero or more",
    "sample_temperature=-1": "config.sample_temperature=-1.0: expected zero or more",
    "mesh.data=0": "config.mesh.data=0: expected a positive integer, or -1",
    "source.scratch.num_kv_heads=0": "config.source.scratch.num_kv_heads=0: expected a positive",
    "source.scratch.num_heads=0": "config.source.scratch.num_heads=0: expected a positive",
    "source.scratch.head_dim=0": "config.source.scratch.head_dim=0: expected a positive",
    "source.scratch.d_model=0": "config.source.scratch.d_model=0: expected a positive",
    "source.scratch.num_layers=0": "config.source.scratch.num_layers=0: expected a positive",
    "source.scratch.vocab_size=-1": "config.source.scratch.vocab_size=-1: expected a positive",
    "source.scratch.rope_theta=0": "rope_theta=0.0: expected a positive number",
    "source.scratch.norm_eps=-1e-5": "norm_eps=-1e-05: expected a positive number",
    "source.scratch.eos_ids=2,32000": "eos_ids=32000 is outside the vocabulary: expected an id "
    "below vocab_size=32000",
    "source.scratch.eos_ids=2,-1": "config.source.scratch.eos_ids[1]=-1: expected zero or more",
    "source.scratch.pad_id=32000": "config.source.scratch.pad_id=32000 is outside the vocabulary",
    "source.scratch.d_model=2147483647": "parameters: expected at most 1e+12",
    "source.scratch.num_layers=1000000000": "expected a positive integer, at most 10000",
    "seed=0x" + "f" * 5000: "config.seed=(thousands of digits): expected zero or more",
    "seed=" + "9" * 5000: "config.seed='999",
    "seed=" + "(" * 100_000: "config.seed='(((",
    "seed={[]}": "config.seed='{[]}': expected int",
    "source.scratch.rope_scaling={'kind': 'linear', 'factor': 0}": "rope_scaling.factor=0.0: "
    "expected a positive number",
    "source.scratch.rope_scaling={'kind': 'llama3', 'factor': 2, 'low_freq_factor': 4}": "rope_"
    "scaling.low_freq_factor=4.0 is not below high_freq_factor=4.0",
}


@pytest.mark.parametrize("override", BAD_OVERRIDES)
def test_bad_input_override(override):
    assert BAD_OVERRIDES[override] in _complaint(LLAMA, override)


ODD = (math.nan, math.inf, -math.inf, -1, 0, 1, 2**31, 2**63 - 1, 10**400, 1e38, 1e300, -1e-300)


def test_no_number_is_worse_than_refused():
    """Every numeric key with every odd number: accepted and finite, or one line that names it."""
    tried = refused = 0
    for key, hint, *_ in config.keys():
        if not any(kind in config.fields.spell(hint) for kind in ("int", "float")):
            continue
        for value in ODD:
            tried += 1
            sections = key.split(".")
            values = functools.reduce(lambda inner, name: {name: inner}, sections[::-1], value)
            if "rope_scaling" in key:
                scaling = values["source"]["scratch"]["rope_scaling"]
                scaling |= {"kind": "linear"} | ({} if "factor" in scaling else {"factor": 2.0})
            try:
                held = config.from_mapping(config.Experiment, values)
            except config.UserError as error:
                refused += 1
                assert f"config.{key}"[: len(f"config.{sections[0]}")] in str(error)
                assert sections[-1] in str(error) and len(str(error)) <= 500
                continue
            for name in sections:
                held = getattr(held, name)
            assert math.isfinite(held) and held == type(held)(value)
            assert isinstance(held, int) or held in (-1, 0, 1) or abs(held) < 3.5e38
    assert tried > 600 and tried > refused > tried / 2


def test_numbers_are_checked_wherever_a_dataclass_is_made():
    for wrong in (
        {"threshold": 7.0},
        {"threshold": math.nan},
        {"calibration_records": 0},
        {"expert_size": 0},
    ):
        with pytest.raises(config.UserError, match=next(iter(wrong))):
            config.LTEConfig(**wrong)
        with pytest.raises(config.UserError, match=next(iter(wrong))):
            dataclasses.replace(config.LTEConfig(), **wrong)


def test_bad_input_section_that_a_file_made_a_number(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from ml_collections import ConfigDict\ndef get_config():\n  return ConfigDict({'lte': 3})"
    )
    assert "config.lte is 3 in the file: expected a section" in _complaint(
        str(file), "lte.threshold=0.3"
    )
    assert "config.lte=3: expected LTEConfig" in _complaint(str(file))


BAD_FILES = {
    START + "    c.lte.seed = 3\n    return c": "config.lte.seed was renamed to config.seed",
    START + "    c.source.remat = True\n    return c": "renamed to config.compute.remat",
    START.replace("Experiment()", "Experiment(name='a')"): "config.name was removed: leave it out",
    "x = 1": "FILE: expected a function get_config()",
    "def get_config(:": "FILE:1: SyntaxError",
    "import no_such_module": "FILE:1: ModuleNotFoundError: No module named 'no_such_module'",
    "def get_config():\n  return 3": "FILE: get_config() returned int: expected a ConfigDict",
    START
    + "    c.lte.expert_sise = 3": 'FILE:6: AttributeError: \'Key "expert_sise" does not exist',
    START + "    c.lte.expert_sise = 4": 'Did you mean "expert_size"',
    START
    + "    c.lte.expert_size = 'a'": "FILE:6: TypeError: Could not override field 'expert_size'",
    START + "    c.lte.target_sparsity = 1.0\n    return c": "config.lte.target_sparsity=1.0",
    "from ml_collections import ConfigDict\n"
    "def get_config():\n  return ConfigDict({'lte': {'exprt_size': 3}})": "'expert_size'?",
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_bad_input_file(text, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(text)
    line = _complaint(str(file))
    assert BAD_FILES[text].replace("FILE", str(file)) in line
    assert "separability_eps" not in line  # ConfigDict would list every key it has


@pytest.mark.parametrize(
    "spec, expected",
    [
        ("configs/llama7.py", "no config file 'configs/llama7.py': did you mean"),
        ("configs", "no config file 'configs': expected FILE.py or FILE.py:VARIANT"),
        ("dem", "no config file 'dem': did you mean 'demo'? (or one of demo, "),
        ("elsewhere/demo.py", "no config file 'elsewhere/demo.py'"),
        ("demo:smok", "unknown variant 'smok': did you mean 'smoke'?"),
        ("configs/llama7b.py:smok", "unknown variant 'smok': did you mean 'smoke'?"),
        ("configs/llama7b.py:paper,smok", "unknown variant 'smok': did you mean 'smoke'?"),
    ],
)
def test_bad_input_spec(spec, expected, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert expected in _complaint(spec)


@pytest.mark.parametrize("spec", ["demo:smoke", "demo.py:smoke", "configs/demo.py:smoke"])
def test_the_packages_configs_are_found_from_anywhere(spec, tmp_path, monkeypatch):
    own = config.load_config(str(ROOT / "configs" / "demo.py:smoke"))
    monkeypatch.chdir(tmp_path)
    assert config.load_config(spec) == own
    (tmp_path / "configs").mkdir()
    for folder in (tmp_path, tmp_path / "configs"):  # a file that exists goes before
        (folder / "demo.py").write_text(START + "    c.seed = 123\n    return c\n")
    assert spec.startswith("demo:") or config.load_config(spec).seed == 123


def test_config_file_may_use_its_own_names(tmp_path):
    """The file's globals outlive its loading, and `config` in it is the package's."""
    file = tmp_path / "mine.py"
    body = "    c.lte.expert_size = SIZE if arg else 2 * SIZE\n    return c\nSIZE = 16\n"
    file.write_text(START + body)
    assert config.load_config(str(file)).lte.expert_size == 32
    assert config.load_config(f"{file}:half").lte.expert_size == 16


def test_presets_survive_the_way_through_a_config_dict():
    for preset in config.PRESETS.values():
        experiment = config.Experiment(lte=preset)
        values = config.to_config_dict(experiment)
        assert config.from_mapping(config.Experiment, values.to_dict()) == experiment


@pytest.mark.parametrize(
    "flags, code, expected",
    [
        (["--help"], 0, f"lte.target_sparsity = 0.5  ({TARGET})"),
        (["--workdir=w", "--config=no.py"], 2, "error: no config file 'no.py'"),
        (["--workdir=", "--config=configs/demo.py:smoke"], 2, "error: workdir is empty"),
        (["--workdir=w", "--config=~/no.py"], 2, "error: no config file '/"),
        (["--workdir=w"], 2, "--config"),
        (["--workdir=w", "--config=configs/llama7b.py:smoke", "--confg.seed=1"], 2, "--confg.seed"),
        (
            ["--workdir=w", "--config=demo", "--config.lte.target_sparsity", "0.7"],
            2,
            "unrecognized 0.7 (a key is set by --config.KEY=VALUE, with =, not a space)",
        ),
        (
            ["--workdir=w", "--config=configs/llama7b.py:smoke", "--config.lte.thresold=1"],
            2,
            "error: unknown key config.lte.thresold: did you mean config.lte.threshold?",
        ),
    ],
    ids=[
        "help",
        "no-file",
        "no-workdir",
        "home",
        "no-config",
        "unknown-flag",
        "space",
        "unknown-key",
    ],
)
def test_bad_input_train_flags(flags, code, expected, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path("train.py", run_name="__main__")
    assert stopped.value.code == code
    out, err = capsys.readouterr()
    assert expected in (out if code == 0 else err)
    assert not (ROOT / "w").exists()


def _complaint(spec: str, *overrides: str) -> str:
    with pytest.raises(config.UserError) as error:
        config.load_config(spec, overrides)
    line = str(error.value)
    assert "\n" not in line
    return line


def test_sizes_that_divide_are_found_at_once():
    wide = config.ModelConfig(d_model=1, d_ff=2 * 31_607 * 31_627, num_layers=1)
    with pytest.raises(config.UserError, match=r"nearby sizes that do are 1, 2, 31607, 31627$"):
        config.num_experts(wide, config.LTEConfig(expert_size=32))


def _help(capsys, *flags):
    with pytest.raises(SystemExit) as stopped:
        config.parse_flags(Parser(), ["--help", *flags])
    assert stopped.value.code == 0
    return capsys.readouterr().out.splitlines()


def test_help_documents_every_key(capsys):
    lines = _help(capsys)
    keys = [i for i, line in enumerate(lines) if re.match(r"  [a-z0-9_.]+ = .*\(.*\)$", line)]
    assert len(keys) > 70
    for i in keys:
        assert re.match(r" {6}\w", lines[i + 1]), lines[i]  # no stray blank before the meaning
    [i] = [i for i in keys if lines[i].startswith("  data.end_token")]
    assert "appended to each training document" in lines[i + 1]  # a comment above the key


def test_help_shows_types_with_their_ranges(capsys):
    lines = _help(capsys)
    assert "  seed = 0  (int, zero or more)" in lines
    assert "  lte.efficiency_weight = 0.0  (float)" in lines
    assert "  data.max_documents = None  (int, a positive integer; or None)" in lines
    assert "  source.scratch.eos_ids = ()  (tuple[int, ...], zero or more)" in lines
    assert "  compute.dtype = 'float32'  (one of 'float32', 'bfloat16')" in lines


def test_help_of_a_config_shows_the_values_of_the_file_and_flags(capsys):
    demo = f"--config={ROOT / 'configs/demo.py'}"
    lines = _help(capsys, demo, "--workdir=w", "--config.seed=7")
    assert f"--config.KEY=VALUE, keys and their values in {demo[9:]} seed=7:" in lines
    assert "  lte.expert_size = 16  (int, a positive integer)" in lines
    assert "  seed = 7  (int, zero or more)" in lines
    paper = _help(capsys, f"{demo}:paper")
    assert f"  lte.target_sparsity = None  ({TARGET})" in paper
    with pytest.raises(config.UserError, match=r"no config file 'no.py'"):
        config.parse_flags(Parser(), ["--help", "--config", "no.py"])


def test_the_settings_of_moefy_are_the_keys_of_its_config():
    """With their types, ranges aside, for type checkers."""
    declared = typing.get_type_hints(config.LTESettings)
    assert declared == typing.get_type_hints(config.LTEConfig)
