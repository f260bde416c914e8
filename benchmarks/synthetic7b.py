"""Imports a LLaMA2-7B of random weights onto a mesh, and makes experts of two of its layers.

    python benchmarks/synthetic7b.py --out=/tmp/synthetic            # 13.5 GB on disk, 16 of memory
    python benchmarks/synthetic7b.py --out=/tmp/synthetic --layers=8
    python benchmarks/synthetic7b.py --out=/tmp/synthetic --small    # a tiny model: seconds

Writes the folder, bfloat16 in three shards and more, one of them in memory at a time; then two
processes, each with its own count of memory:

    import   `hf.load_params` in bfloat16 onto eight fake CPU devices, fsdp 8
    experts  grouping by co-activation and routers by ridge regression, of a model with two of the
             layers, in float32 on one device, with --records of 2,048 random tokens

"Anonymous" is memory that only the process itself can give back, sampled; "peak" the system's count
(VmHWM), with pages of files, which it takes back when it needs them. --out is removed at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lte_jax import config
from lte_jax.errors import UserError, cli_errors
from lte_jax.hf import names
from lte_jax.hf.config_json import write_config
from lte_jax.hf.folder import CONFIG, INDEX
from lte_jax.params import dimension_sizes

ROOT = Path(__file__).resolve().parents[1]
DEVICES, LAYERS = 8, 2
MOST = ("held", "anonymous", "peak")
SHARD = 2_500_000_000  # bytes, at most
TINY = {"d_model": 64, "d_ff": 128, "num_heads": 4, "num_kv_heads": 4, "head_dim": 16}
TINY |= {"vocab_size": 512, "num_layers": 4}


def model_of(flags: argparse.Namespace, layers: int | None = None) -> config.ModelConfig:
    scratch = config.load_config(str(ROOT / "configs/llama7b.py"), ["source.path="]).source.scratch
    made = dataclasses.replace(scratch, dtype="bfloat16", **(TINY if flags.small else {}))
    return dataclasses.replace(made, num_layers=min(layers or flags.layers, made.num_layers))


def write(folder: Path, model: config.ModelConfig) -> int:
    """Writes a folder of random weights; its bytes."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps(write_config(model, "bfloat16")))
    sizes, rows = dimension_sizes(model, None), names.table(model, None)
    shapes = {name: row.hf_shape(sizes) for row in rows for name in row.hf_names(sizes)}
    number = {name: 2 * int(np.prod(shape)) for name, shape in shapes.items()}
    total = sum(number.values())
    most, shards = min(SHARD, total // 3), [[]]
    for name in sorted(shapes):
        if shards[-1] and sum(number[n] for n in shards[-1]) + number[name] > most:
            shards.append([])
        shards[-1].append(name)
    where, rng = {}, np.random.default_rng(0)
    for i, held in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file({n: random(rng, shapes[n]) for n in held}, folder / file, {"format": "pt"})
        where |= dict.fromkeys(held, file)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index))
    return total


def random(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Of either sign and 0.0078 to 0.031 large: random bits but for the exponent's higher ones."""
    bits = rng.integers(0, 2**16, shape, np.uint16)
    bits &= np.uint16(0b1000_0000_1111_1111)
    bits |= np.uint16(0b0011_1100_0000_0000)
    return bits.view(ml_dtypes.bfloat16)


def status(name: str) -> int:
    """Bytes of memory of this process, as Linux counts them under this name."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


@contextlib.contextmanager
def peaks() -> Iterator[dict[str, int]]:
    """Bytes at most within; "before" is what the process had."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    found, over = {"before": status("RssAnon"), "anonymous": 0}, threading.Event()

    def sample() -> None:
        while not over.wait(0.01):
            found["anonymous"] = max(found["anonymous"], status("RssAnon"))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
        found["peak"] = status("VmHWM")


def imported(flags: argparse.Namespace) -> dict[str, Any]:
    """Loads the folder onto all devices, and checks that each holds its share, once."""
    import jax
    from safetensors import safe_open

    from lte_jax import hf, sharding
    from lte_jax.model import Transformer, abstract_params

    folder, mesh = flags.out / "model", sharding.make_mesh(config.MeshConfig(1, DEVICES, 1))
    model = Transformer(hf.read_config(folder)[0])
    places = sharding.param_shardings(abstract_params(model), mesh)
    jax.device_put(np.zeros(DEVICES), jax.devices()[-1]).block_until_ready()
    begin = time.monotonic()
    with peaks() as found:
        params = hf.load_params(folder, model.config, None, "bfloat16", places)
        jax.block_until_ready(params)
    seconds, arrays = time.monotonic() - begin, jax.tree.leaves(params)
    shards = [shard for array in arrays for shard in array.addressable_shards]
    held = {shard.data.unsafe_buffer_pointer(): shard.data.nbytes for shard in shards}
    for array in arrays:
        parts = {str(shard.index) for shard in array.addressable_shards}
        assert array.is_fully_replicated or len(parts) == DEVICES, "a share lies on two devices"
    name = f"model.layers.{model.config.num_layers - 1}.mlp.down_proj.weight"
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    with safe_open(folder / weight_map[name], framework="numpy") as file:
        stored_DF = file.get_tensor(name)
    down_FD = np.asarray(params["layers"]["ffn"]["down"][-1]).reshape(stored_DF.T.shape)
    assert np.array_equal(down_FD, stored_DF.T), "other weights than in the file"
    sums = {"target": sum(array.nbytes for array in arrays), "held": sum(held.values())}
    return found | sums | {"seconds": seconds, "shards": len({*weight_map.values()})}


def experts(flags: argparse.Namespace) -> dict[str, Any]:
    """Groups the neurons of the model of two layers, and starts their routers."""
    import jax

    from lte_jax import hf, moefication
    from lte_jax.model import Transformer

    made = config.load_config(str(ROOT / "configs/llama7b.py"), ["source.path="])
    lte = dataclasses.replace(made.lte, refit=False)
    length, rng = 32 if flags.small else made.data.length, np.random.default_rng(1)
    with peaks() as found:
        dense, _ = hf.read_config(flags.out / "two")
        params = hf.load_params(flags.out / "two", dense, None, "float32")
        texts = rng.integers(3, dense.vocab_size, (flags.records, length)).astype(np.int32)
        times = [clock()]
        model, params, order_NEM = moefication.to_experts(Transformer(dense), params, lte, texts)
        times.append(clock())
        params = jax.block_until_ready(moefication.add_routers(model, params, texts))
        times.append(clock())
    kernel_NDE = params["layers"]["ffn"]["router"]["kernel"]
    assert kernel_NDE.shape == (LAYERS, dense.d_model, order_NEM.shape[1])
    assert np.isfinite(np.asarray(kernel_NDE)).all()
    grouping, routers = np.diff(np.array(times), axis=0) / LAYERS
    found |= {"grouping": grouping.tolist(), "routers": routers.tolist()}
    return found | {"tokens": texts.size, "experts": order_NEM.shape[1]}


def clock() -> tuple[float, float]:
    """Seconds of this process's threads together, and of the wall."""
    return time.process_time(), time.monotonic()


def child(part: str, flags: argparse.Namespace) -> dict[str, Any]:
    """What a part finds out, in a process of its own."""
    words = [f"--out={flags.out}", f"--records={flags.records}", f"--part={part}"]
    command = [sys.executable, __file__, *words, *(["--small"] if flags.small else [])]
    env = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(DEVICES if part == "import" else 1)}
    done = subprocess.run(command, env=os.environ | env, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"{part} failed, see above")
    return json.loads(done.stdout.splitlines()[-1])


def check_room(model: config.ModelConfig, out: Path) -> None:
    """Refuses what would drive the machine out of memory or disk."""
    sizes = dimension_sizes(model, None)
    numbers = sum(np.prod([sizes[c] for c in row.ours]) for row in names.table(model, None))
    needed, lines = 2 * int(numbers), Path("/proc/meminfo").read_text().splitlines()
    free = 1024 * int(next(x.split()[1] for x in lines if x.startswith("MemAvailable")))
    disk = shutil.disk_usage(out.parent).free
    if 1.3 * needed > free or 1.3 * needed > disk:
        raise UserError(
            f"--layers={model.num_layers}: needs {1.3 * needed / 1e9:.1f} GB of memory and disk, "
            f"{free / 1e9:.1f} and {disk / 1e9:.1f} are free: expected fewer layers"
        )


def _seconds(clocks: list[float]) -> str:
    return f"{clocks[0]:.3g} s of CPU ({clocks[1]:.3g} s)"


@cli_errors()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="new folder for the models, removed at the end")
    add("--layers", type=int, default=32, help="of the model that is imported")
    add("--records", type=int, default=2, help="of calibration text; a run takes some 64")
    add("--small", action="store_true", help="a tiny model")
    add("--part", choices=["import", "experts"], help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.part:
        print(json.dumps({"import": imported, "experts": experts}[flags.part](flags)))
        return
    if flags.out.exists():
        raise UserError(f"--out={flags.out} exists: expected a new folder, which is removed")
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    model = model_of(flags)
    check_room(model, flags.out)
    try:
        write(flags.out / "model", model)
        found = child("import", flags)
        shutil.rmtree(flags.out / "model")
        whole, most = found["target"], {k: found[k] / found["target"] for k in MOST}
        print(
            f"import: {model.num_layers} layers, {whole / 1e9:.3g} GB in {found['shards']} shards, "
            f"onto {DEVICES} devices in {found['seconds']:.3g} s; of that size {most['held']:.4f} "
            f"are held, anonymous memory is at most {most['anonymous']:.3f}, and peak "
            f"{most['peak']:.3f}; {found['before'] / 1e9:.2g} GB were there before",
            flush=True,
        )
        write(flags.out / "two", model_of(flags, LAYERS))
        found = child("experts", flags)
        print(
            f"experts: {LAYERS} layers of {found['experts']} experts, {found['tokens']:,} tokens: "
            f"{_seconds(found['grouping'])} a layer to group, {_seconds(found['routers'])} for "
            "routers; "
            f"anonymous memory is at most {found['anonymous'] / 2**30:.2f} GiB, "
            f"peak {found['peak'] / 2**30:.2f} GiB"
        )
    finally:
        shutil.rmtree(flags.out, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
