"""The Triton kernels without a GPU: compiled for two generations of them, run in the interpreter.

On a GPU they are held to the contract by test_kernels.py, as every implementation is.
`python -m tests.test_triton` prints the table of docs/kernels.md.
"""

import json
import pathlib
import re
import subprocess
import sys
import tempfile

import jax
import pytest
from lte_jax.kernels.reference import Unsupported

from lte_jax.kernels import gpu_codes, gpu_triton, triton_blocks

triton = pytest.importorskip("triton", reason="needs triton: pip install 'lte-jax[gpu]'")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1 rules compiling out", allow_module_level=True)

ROOT = pathlib.Path(__file__).resolve().parents[1]
# LLaMA2-7B: 344 experts of 32 neurons, width 4096; its vocabulary for `project`.
E, M, D, V = 344, 32, 4096, 32000
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a program may have, A100 and H100/H200
PROOFS = [
    pytest.param(kernel, arch, dtype, rows, marks=[pytest.mark.slow] if dtype == "float32" else [])
    for kernel in ("hidden", "combine", "project")
    for arch in SHARED
    for dtype in ("bfloat16", "float32")
    for rows in (1, 8, 64)
]


def compiled(kernel, arch, dtype, rows, e=E, m=M, d=D, activation="silu", flags=(True, False)):
    """Block sizes by rule, and the compiler's account of the kernel: a dict of figures."""
    if kernel == "project":
        m = V if m == M else m
    cut = triton_blocks.by_rule(kernel, rows, m, d, dtype, experts=e)
    gated, bias = flags
    constants = {
        "hidden": lambda: (
            gpu_triton.hidden_constants(rows, e, m, d, cut)
            | {
                "ACTIVATION": activation,
                "GATED": gated,
                "UP_BIAS": bias,
                "GATE_BIAS": bias and gated,
            }
        ),
        "combine": lambda: gpu_triton.combine_constants(rows, e, m, d, cut) | {"GATHER": True},
        "project": lambda: gpu_triton.project_constants(rows, m, d, cut),
    }[kernel]()
    return cut, built(kernel, constants, arch, dtype, cut.warps, cut.stages)


def built(kernel, constants, arch, dtype, warps=4, stages=3):
    """The compiler's account of a kernel with these constants."""
    from lte_jax.kernels import triton_codes, triton_kernels

    function = getattr(triton_codes if kernel.endswith("_codes") else triton_kernels, kernel)
    element = {"bfloat16": "*bf16", "float32": "*fp32"}[dtype]
    pointers = dict.fromkeys(("layer", "ids", "count", "index"), "*i32")
    pointers |= dict.fromkeys(("active", "visible"), "*i1") | {"partial": "*fp32", "sums": "*fp32"}
    pointers |= {"y": "*fp32"} if kernel == "project" else {}
    names = function.arg_names
    if kernel.endswith("_codes"):
        pointers |= {f"{name}_scales": "*bf16" for name in ("up", "gate", "one", "two", "three")}
        pointers |= dict.fromkeys(("up", "gate", "one", "two", "three", "codes"), "*u8")
        pointers["scales"] = "*bf16"
    source = triton.compiler.ASTSource(
        fn=function,
        signature={n: "constexpr" if n in constants else pointers.get(n, element) for n in names},
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in constants},
    )
    target = triton.backends.compiler.GPUTarget("cuda", arch, 32)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    binary = triton.compile(source, target=target, options=options)
    return binary.asm | usage(binary.asm["cubin"]) | {"shared": binary.metadata.shared}


def usage(cubin):
    """Registers of a thread, and bytes of its memory that they did not suffice for."""
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-res-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    figures = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", told)}
    return {"registers": figures["REG"], "spilled": figures["STACK"] + figures["LOCAL"]}


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path, monkeypatch):
    """Nothing compiled before counts, and nothing is left behind."""
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path)
        yield


@pytest.mark.parametrize(("kernel", "arch", "dtype", "rows"), PROOFS)
def test_compiles(kernel, arch, dtype, rows, record_property):
    _, made = compiled(kernel, arch, dtype, rows)
    for figure in ("registers", "spilled", "shared"):
        record_property(figure, made[figure])
    assert made["cubin"].startswith(b"\x7fELF")
    assert made["spilled"] == 0
    assert made["shared"] <= SHARED[arch]
    # Weights go to shared memory by themselves, 16 bytes at a time, while others are computed with.
    assert re.search(r"cp\.async\.cg\S* .*0x10", made["ptx"])
    tensor_cores = re.search(r"\bw?g?mma\.", made["ptx"]) is not None
    assert tensor_cores == (rows > 1 and dtype == "bfloat16")
    assert not re.search(r"\b(atom|red)\.", made["ptx"])


def compiled_codes(kernel, arch, dtype, rows, form, k=D, o=D, e=E, m=M):
    """As `compiled`, of codes; "three" are of o outputs each."""
    if kernel == "hidden":
        cut = triton_blocks.by_rule(f"hidden {form}", rows, m, k, dtype)
        constants = gpu_codes.hidden_constants(rows, e, m, k, form, cut)
        constants |= {"ACTIVATION": "silu", "GATED": True, "UP_BIAS": False, "GATE_BIAS": False}
    elif kernel == "three":
        cut = triton_blocks.by_rule(f"combine {form}", rows, 3 * o, k, dtype)
        constants = gpu_codes.three_constants(rows, k, [o] * 3, form, cut)
    else:  # the down projection of experts, or one matrix
        e, k = (e, m) if kernel == "combine" else (1, k)
        cut = triton_blocks.by_rule(f"combine {form}", rows, o, k, dtype, experts=e)
        constants = gpu_codes.combine_constants(rows, e, k, o, form, cut)
        constants |= {"GATHER": kernel == "combine"}
    function = {"hidden": "hidden_codes", "three": "combine_three_codes"}.get(kernel)
    return cut, built(function or "combine_codes", constants, arch, dtype, cut.warps, cut.stages)


@pytest.mark.parametrize("form", ["int8", "int4", "int6"])
@pytest.mark.parametrize("rows", [1, 8, 64])
@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("kernel", ["hidden", "combine", "linear", "three"])
def test_codes_compile(kernel, arch, rows, form):
    _, made = compiled_codes(kernel, arch, "bfloat16", rows, form)
    assert made["spilled"] == 0
    assert made["shared"] <= SHARED[arch]
    assert re.search(r"cp\.async\.cg\S* .*0x10", made["ptx"])
    assert (re.search(r"\bw?g?mma\.", made["ptx"]) is not None) == (rows > 1)
    assert not re.search(r"\b(atom|red)\.", made["ptx"])


@pytest.mark.parametrize(
    ("kernel", "dtype", "m"), [("linear", "float32", M), ("hidden", "bfloat16", 128)]
)
def test_codes_of_many_rows_do_not_spill(kernel, dtype, m):
    assert compiled_codes(kernel, 90, dtype, 64, "int8", m=m)[1]["spilled"] == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize(("b", "t", "k", "group", "c"), [
    (1, 2048, 32, 1, 128), (8, 8192, 32, 1, 128), (1, 2048, 8, 4, 80), (1, 8192, 4, 2, 256),
    (1, 32768, 1, 8, 256), (1, 2048, 1, 71, 64),
])  # fmt: skip
def test_attention_compiles(arch, dtype, b, t, k, group, c):
    constants = gpu_triton.attend_constants(b, t, k, group, c, dtype)
    assert 1 <= constants["SPLITS"] <= max(1, t // (2 * constants["BLOCK_T"]))
    made = built("attend", constants, arch, dtype, gpu_triton.attend_warps(group))
    assert made["spilled"] == 0 and 2 * made["shared"] <= SHARED[arch]  # two programs at a time
    assert re.search(r"cp\.async\.cg\S* .*0x10", made["ptx"])
    assert "mma" in made["ptx"] or dtype == "float32"
    constants = gpu_triton.merge_constants(b * k * group, c, constants["SPLITS"])
    assert built("merge", constants, arch, dtype)["spilled"] == 0


@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("rows", [1, 8, 64])
@pytest.mark.parametrize("widths", [(4096, 4096, 4096), (4096, 1024, 1024), (576, 192, 192)])
def test_three_matrices_compile_as_one_does(arch, rows, widths):
    """Which of them a program reads is not known to the compiler; its loads are as wide."""
    cut = triton_blocks.by_rule("combine", rows, D, sum(widths), "bfloat16")
    one = gpu_triton.combine_constants(rows, 1, D, sum(widths), cut) | {"GATHER": False}
    three = gpu_triton.three_constants(rows, D, widths, cut)
    how = arch, "bfloat16", cut.warps, cut.stages
    one, three = built("combine", one, *how), built("combine_three", three, *how)
    assert three["spilled"] == 0 and three["shared"] <= one["shared"]
    wide = [re.findall(r"cp\.async\.cg\S* .*0x10", made["ptx"]) for made in (one, three)]
    assert len(wide[0]) == len(wide[1]) > 0


@pytest.mark.parametrize("flags", [(True, True), (False, False), (False, True)])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
def test_kinds_of_ffn_compile(activation, flags):
    made = compiled("hidden", 90, "bfloat16", 2, activation=activation, flags=flags)[1]
    assert made["spilled"] == 0


@pytest.mark.parametrize(("e", "m", "d"), [(43, 4, 64), (43, 8, 128), (80, 64, 5120), (10, 6, 20)])
@pytest.mark.parametrize("rows", [1, 16])
def test_other_shapes_compile(rows, e, m, d):
    for kernel in ("hidden", "combine"):
        made = compiled(kernel, 80, "bfloat16", rows, e, m, d)[1]
        assert made["spilled"] == 0 and made["shared"] <= SHARED[80]


@pytest.fixture(scope="module")
def interpreted():
    pytest.importorskip("torch", reason="Triton's interpreter needs torch")
    command = [sys.executable, "-m", "tests.triton_interpreter"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_against_float64(interpreted):
    """One row to 33; every mask, kind of FFN and odd size that tests/triton_interpreter.py lists.

    bfloat16: hidden activations are rounded to it, and, for tensor cores, the weights that codes
    stand for (which the interpreter cuts off). Nothing else is: a product of two such numbers is
    exact in float32.
    """
    tolerance = {"float32": 2e-6, "bfloat16": 1e-2}
    allowed = {n: (2 if " int" in n else 1) * tolerance[n.split()[0]] for n in interpreted}
    wrong = {n: e for n, e in interpreted.items() if not e < allowed[n]}
    assert len(interpreted) > 290 and not wrong


def test_rules_stay_within_what_is_there():
    for kernel in ("hidden", "combine", "project"):
        for b in (1, 2, 8, 9, 64):
            for m, d in ((1, 16), (4, 128), (32, 4096), (43, 20), (11008, 4096)):
                cut = triton_blocks.by_rule(kernel, b, m, d, "bfloat16", experts=3)
                assert all(n >= 1 and n & (n - 1) == 0 for n in cut[:3])
                assert 1 <= cut.splits <= 3 * -(-m // cut.m)


def test_refusals_in_one_line():
    for match, kernel, b, dtype in (
        ("65 rows.*64", "hidden", 65, "float32"),
        ("float16.*float32 and bfloat16", "combine", 1, "float16"),
    ):
        with pytest.raises(Unsupported, match=match):
            triton_blocks.blocks(kernel, b, M, D, dtype)
    if jax.default_backend() == "cpu":
        assert "jax runs on cpu" in gpu_triton.unavailable()


def test_tuned_blocks_are_read(tmp_path, monkeypatch):
    path = tmp_path / "nvidia-h200.json"
    monkeypatch.setattr(triton_blocks, "tuned_path", lambda: path)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    by_rule = triton_blocks.by_rule("hidden", 5, M, D, "bfloat16")
    assert triton_blocks.blocks("hidden", 5, M, D, "bfloat16") == by_rule
    cut = by_rule._replace(stages=9)
    name = triton_blocks.key("hidden", 8, M, D, "bfloat16")
    path.write_text(json.dumps({"blocks": {name: cut._asdict()}}))
    triton_blocks.read_tuned.cache_clear()
    assert triton_blocks.blocks("hidden", 5, M, D, "bfloat16") == cut
    assert triton_blocks.blocks("hidden", 9, M, D, "bfloat16") != cut
    path.write_text('{"blocks": {"hidden": {"m": 1}}}')
    triton_blocks.read_tuned.cache_clear()
    with pytest.raises(Unsupported, match="nvidia-h200.json.*delete it"):
        triton_blocks.blocks("hidden", 1, M, D, "bfloat16")
    triton_blocks.read_tuned.cache_clear()


def table():
    """The compile proofs, as docs/kernels.md shows them."""
    yield "| kernel | weights | rows | tile, warps, stages | sm_80 | sm_90 |"
    yield "| --- | --- | ---: | --- | ---: | ---: |"
    for kernel in ("hidden", "combine", "project"):
        for dtype in ("bfloat16", "float32"):
            for rows in (1, 8, 16, 64):
                cells = []
                for arch in SHARED:
                    cut, made = compiled(kernel, arch, dtype, rows)
                    cells.append("{registers} / {shared:,} / {spilled}".format(**made))
                yield _line(kernel, dtype, rows, cut, cells)
    for form in ("int8", "int4"):
        for kernel in ("hidden", "combine", "linear"):
            for rows in (1, 8, 64):
                cells = []
                for arch in SHARED:
                    cut, made = compiled_codes(kernel, arch, "bfloat16", rows, form)
                    cells.append("{registers} / {shared:,} / {spilled}".format(**made))
                yield _line(kernel, form, rows, cut, cells)


def _line(kernel, weights, rows, cut, cells):
    tile = f"{cut.m} × {cut.d}, {cut.warps}, {cut.stages}"
    return f"| {kernel} | {weights} | {rows} | {tile} | {' | '.join(cells)} |"


if __name__ == "__main__":
    print(f"triton {triton.__version__}; registers of a thread / bytes shared / bytes spilled\n")
    for line in table():
        print(line, flush=True)
