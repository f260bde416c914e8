"""Time decoding and prefill beside what a user would run instead: llama.cpp, and PyTorch.

    python benchmarks/peers.py --json runs/bench/peers.json    (CPU: 10 GB of memory, 5 of disk)
    python benchmarks/peers.py --formats bf16,int8,int4 --rounds 3
    python benchmarks/peers.py --model SMOLLM2 --formats bf16,int8,int4    # a whole model: minutes

LLaMA2-7B's shapes cut to `--layers`, with the whole head; random weights, the same for all; one
text. With `--model` a dense folder's whole model in bfloat16, with experts of neurons at random and
routers at random, which are of no use but to be timed. Ours is dense, and with each share of
`--sparsity` of the experts skipped, see decode.py.
llama.cpp (the package llama-cpp-python) runs the dense model from a GGUF file, which it quantises
itself (lte_jax.export_gguf makes it, with the package gguf); PyTorch runs transformers' Llama. Of
those that are not installed, a line says so.

In each round all take their turn, so that what disturbs the machine disturbs all; a time is a
median. Decoding is of `--new-tokens` after a prompt of `--prompt`, without prefill; ours also
chooses each token, which the others are spared. Prefill is of a text of `--prefill`, from an empty
cache to the logits after it. All have `--threads`, on the same cores. The floor of decoding is the
bytes a step reads (weights, cached keys and values) over the best bandwidth of all rounds. "Of
equal bits" is a time over that of llama.cpp with as many bits: BF16, Q8_0 or Q4_0.
"""

from __future__ import annotations

import abc
import argparse
import ctypes
import importlib
import importlib.util
import logging
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from decode import decoder, random_model, started
from ffn import bandwidth, listed, publish
from tqdm import tqdm

import lte_jax
from lte_jax import export_gguf, kernels, moefication
from lte_jax.config import LTEConfig
from lte_jax.errors import UserError, cli_errors
from lte_jax.model import Transformer

# Peer -> modules it needs; the first one's version is told.
PEERS = {"llama.cpp": ("llama_cpp", "gguf"), "PyTorch": ("torch", "transformers")}
QUANTISED = {"Q8_0": 7, "Q4_0": 2, "Q4_K_M": 15}  # llama.cpp's file types: llama.h
EQUAL = {"bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}  # llama.cpp's of as many bits
QUIET_S = 0.05  # between two measurements: threads of the last one still spin


class Contestant(abc.ABC):
    """A program with a model, and the times it took."""

    program: str
    format: str
    sparsity: float | None = None  # None: dense; else asked for

    def __init__(self, flags):
        self.flags, self.decode_s, self.prefill_s = flags, [], []

    @abc.abstractmethod
    def ready(self) -> None:
        """Makes the cache hold the prompt, and no more."""

    @abc.abstractmethod
    def decode(self) -> None:
        """Makes the new tokens."""

    @abc.abstractmethod
    def prefill(self) -> None:
        """Reads the long text."""

    @abc.abstractmethod
    def read_bytes(self) -> float:
        """Weights that a step reads."""

    def skipped(self) -> float:
        """The share of experts that the last decoding skipped."""
        return 0.0

    def take_turn(self) -> None:
        """One measurement of each kind."""
        self.ready()
        for run, seconds in ((self.decode, self.decode_s), (self.prefill, self.prefill_s)):
            time.sleep(QUIET_S)
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)


class Ours(Contestant):
    """lte_jax, in one format and at one sparsity."""

    program = "lte_jax"

    def __init__(self, flags, model, params, form: str, sparsity: float | None):
        super().__init__(flags)
        self.format, self.sparsity = form, sparsity
        self.decoder = decoder(model, params, sparsity, flags.implementation)
        self.state = started(model, 1, flags.prompt, flags.new_tokens)
        self.text = [np.ones(flags.prefill, np.int32)]
        self.read = 0.0

    def ready(self):
        pass  # the state with the prompt stays as it is

    def decode(self):
        size = self.flags.new_tokens
        after = self.decoder.extend(self.state, jnp.int32(size), size)[1]
        self.read = float(jax.block_until_ready(after).read) / size

    def prefill(self):
        jax.block_until_ready(self.decoder.prefill(self.text, room=1))

    def skipped(self):
        return 1.0 - self.read

    def read_bytes(self):
        total = 0.0
        for path, leaf in jax.tree_util.tree_flatten_with_path(self.decoder.params)[0]:
            keys = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
            own_head = "lm_head" in self.decoder.params  # else the embedding is the head
            if keys[0] == "embed" and own_head or "router" in keys and self.sparsity is None:
                continue  # of the embedding, a step reads a row
            of_experts = "ffn" in keys and "router" not in keys
            total += leaf.nbytes * (self.read if of_experts else 1.0)
        return total


class LlamaCpp(Contestant):
    """llama.cpp with a GGUF file."""

    program = "llama.cpp"

    def __init__(self, flags, file: pathlib.Path):
        import llama_cpp

        super().__init__(flags)
        self.format, self.library, self.file, self.held = file.stem, llama_cpp, file, 0
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = max(flags.prompt + flags.new_tokens, flags.prefill)
        settings.n_batch = settings.n_ubatch = settings.n_ctx
        settings.n_threads = settings.n_threads_batch = flags.threads
        how = llama_cpp.llama_model_default_params()
        model = llama_cpp.llama_model_load_from_file(os.fsencode(file), how)
        self.context = model and llama_cpp.llama_init_from_model(model, settings)
        if not self.context:
            raise UserError(f"llama.cpp cannot load {file}: is there memory for it?")
        self.memory = llama_cpp.llama_get_memory(self.context)

    def _feed(self, length: int):
        tokens = (self.library.llama_token * length)(*[1] * length)
        batch = self.library.llama_batch_get_one(tokens, length)
        if self.library.llama_decode(self.context, batch):
            raise UserError(f"llama.cpp cannot run {self.file}")
        self.library.llama_synchronize(self.context)
        self.held += length

    def ready(self):
        self.library.llama_memory_seq_rm(self.memory, 0, self.flags.prompt, -1)
        self.held = min(self.held, self.flags.prompt)
        if self.held < self.flags.prompt:
            self._feed(self.flags.prompt - self.held)

    def decode(self):
        for _ in range(self.flags.new_tokens):
            self._feed(1)

    def prefill(self):
        self.library.llama_memory_clear(self.memory, True)
        self.held = 0
        self._feed(self.flags.prefill)

    def read_bytes(self):
        import gguf

        stored = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(self.file).tensors}
        return sum(stored.values()) - stored["token_embd.weight"] * ("output.weight" in stored)


class PyTorch(Contestant):
    """transformers' Llama in bfloat16, from a folder."""

    program, format = "PyTorch", "bf16"

    def __init__(self, flags, folder: pathlib.Path):
        import torch
        import transformers

        super().__init__(flags)
        torch.set_num_threads(flags.threads)
        self.torch, self.new_cache = torch, transformers.DynamicCache
        auto = transformers.AutoModelForCausalLM
        self.model = auto.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self.cache = self.new_cache(config=self.model.config)

    def _feed(self, length: int):
        tokens = self.torch.ones((1, length), dtype=self.torch.long)
        with self.torch.inference_mode():
            self.model(tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    def ready(self):
        missing = self.flags.prompt - self.cache.get_seq_length()
        if missing < 0:
            self.cache.crop(missing)
        elif missing > 0:
            self._feed(missing)

    def decode(self):
        for _ in range(self.flags.new_tokens):
            self._feed(1)

    def prefill(self):
        self.cache = self.new_cache(config=self.model.config)
        self._feed(self.flags.prefill)

    def read_bytes(self):
        weights = {name: p.nbytes for name, p in self.model.named_parameters()}
        apart = "lm_head.weight" in weights  # from the embedding
        return sum(weights.values()) - weights["model.embed_tokens.weight"] * apart


# ------------------------------------------------------------------------------------- the contest


def with_random_experts(folder: str) -> tuple[Transformer, dict]:
    """A dense model in bfloat16, with experts and routers at random."""
    model, params = lte_jax.load(folder, dtype="bfloat16")
    if model.lte is not None:
        raise UserError(f"--model={folder}: has experts: expected a dense model")
    start = {"grouping": "random", "router_init": "normal", "refit": False}
    lte = LTEConfig(expert_size=32, router_bias=False, **start)
    model, params, _ = moefication.to_experts(model, params, lte)
    return model, moefication.add_routers(model, params)


def contestants(flags, folder: pathlib.Path) -> Iterator[Contestant]:
    """Ours, then the peers that are installed; their files are made in `folder`."""
    if flags.model:
        model, params = with_random_experts(flags.model)
    else:
        model, params = random_model(flags.layers, "bfloat16", flags.small)
    for form in flags.formats:
        weights = params if form == "bf16" else lte_jax.quantize(model, params, form)
        for sparsity in (None, *flags.sparsity):
            yield Ours(flags, model, weights, form, sparsity)
    dense = Transformer(model.config, None, model.dtype)
    ffn = {key: value for key, value in params["layers"]["ffn"].items() if key != "router"}
    e, m = ffn["up"].shape[1:3]
    ffn = {key: w.reshape(len(w), 1, e * m, -1) for key, w in ffn.items()}
    params = params | {"layers": params["layers"] | {"ffn": ffn}}
    if "llama.cpp" in flags.peers:
        for file in _gguf_files(dense, params, flags, folder):
            yield LlamaCpp(flags, file)
    if "PyTorch" in flags.peers:
        lte_jax.save(folder / "dense", dense, params)
        yield PyTorch(flags, folder / "dense")


def _gguf_files(model, params, flags, folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """In bfloat16 and in llama.cpp's own formats."""
    import llama_cpp

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    whole = folder / "BF16.gguf"
    export_gguf.export(whole, model, params)
    yield whole
    for name, number in QUANTISED.items():
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype, settings.nthread = number, flags.threads
        file = folder / f"{name}.gguf"
        both = (os.fsencode(whole), os.fsencode(file))
        if llama_cpp.llama_model_quantize(*both, ctypes.byref(settings)):
            raise UserError(f"llama.cpp cannot make {name} of {whole}: is there room on its disk?")
        yield file


def measure(flags, folder: pathlib.Path) -> tuple[list[dict], float]:
    """The rows of the table, and the bandwidth in bytes per second."""
    taking_part = list(contestants(flags, folder))
    bytes_per_s = 0.0
    for turn in tqdm(range(flags.rounds + 1), desc="rounds", leave=False):
        for contestant in taking_part:
            contestant.take_turn()
            if not turn:  # compiles, and reads files
                contestant.decode_s.clear()
                contestant.prefill_s.clear()
        bytes_per_s = max(bytes_per_s, bandwidth(flags.threads))
    config = taking_part[0].decoder.model.config
    positions = flags.prompt + flags.new_tokens / 2
    kv_bytes = 2 * 2 * config.num_layers * config.num_kv_heads * config.head_dim * positions
    rows = [_row(c, flags, kv_bytes, bytes_per_s) for c in taking_part]
    for row in rows:
        for kind in ("decode", "prefill"):
            found = {(r["program"], r["format"], r["sparsity"]): r[f"{kind}_ms"] for r in rows}
            same, bits = (row["program"], row["format"], None), EQUAL.get(row["format"])
            row[f"{kind}_of_dense"] = row[f"{kind}_ms"] / found[same]
            equal = found.get(("llama.cpp", bits, None))
            row[f"{kind}_of_equal_bits"] = equal and row[f"{kind}_ms"] / equal
    return rows, bytes_per_s


def _row(contestant: Contestant, flags, kv_bytes: float, bytes_per_s: float) -> dict:
    decode_s = statistics.median(contestant.decode_s) / flags.new_tokens
    program = contestant.program
    return {
        "device": jax.devices()[0].device_kind,
        "implementation": kernels.resolve(flags.implementation),
        "program": program,
        "version": importlib.import_module(PEERS.get(program, ["lte_jax"])[0]).__version__,
        "format": contestant.format,
        "sparsity": contestant.sparsity,
        "skipped": contestant.skipped() if contestant.sparsity is not None else 0.0,
        "prompt": flags.prompt,
        "new_tokens": flags.new_tokens,
        "prefill": flags.prefill,
        "threads": flags.threads,
        "decode_ms": 1e3 * decode_s,
        "decode_spread_ms": [1e3 * s / flags.new_tokens for s in _ends(contestant.decode_s)],
        "floor_ms": 1e3 * (contestant.read_bytes() + kv_bytes) / bytes_per_s,
        "prefill_ms": 1e3 * statistics.median(contestant.prefill_s),
        "prefill_spread_ms": [1e3 * s for s in _ends(contestant.prefill_s)],
    }


def _ends(seconds: list[float]) -> tuple[float, float]:
    return min(seconds), max(seconds)


def table(rows: list[dict]) -> str:
    """Markdown."""
    lines = [
        "| program | format | skipped | ms / token | of equal bits | of dense | floor ms | used "
        "| prefill ms | of equal bits | of dense |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in rows:
        equal = [r[f"{kind}_of_equal_bits"] for kind in ("decode", "prefill")]
        decode, prefill = ("–" if ratio is None else f"{ratio:.3f}" for ratio in equal)
        lines.append(
            f"| {r['program']} {r['version']} | {r['format']} | {r['skipped']:.1%} "
            f"| {r['decode_ms']:.4g} | {decode} | {r['decode_of_dense']:.3f} "
            f"| {r['floor_ms']:.4g} | {r['floor_ms'] / r['decode_ms']:.0%} "
            f"| {r['prefill_ms']:.4g} | {prefill} | {r['prefill_of_dense']:.3f} |"
        )
    return "\n".join(lines)


def brief(row: dict) -> bool:
    """Whether a row is shown in the README: dense, half, and a tenth of the experts."""
    return row["sparsity"] in (None, 0.5, 0.9)


def _check(flags) -> None:
    """What is asked for is here; `peers` becomes those that take part."""
    for form in flags.formats:
        if form not in EQUAL:
            raise UserError(f"--formats={form}: valid are {', '.join(EQUAL)}")
    missing = {}
    for peer in PEERS if flags.peers is None else flags.peers:
        if peer not in PEERS:
            raise UserError(f"--peers={peer}: valid are {', '.join(PEERS)}")
        absent = [name for name in PEERS[peer] if importlib.util.find_spec(name) is None]
        if absent and flags.peers is not None:
            raise UserError(f"--peers={peer}: needs {absent[0]}, which is not installed")
        missing |= {peer: absent} if absent else {}
    for peer, absent in missing.items():
        print(f"{peer} is left out: {' and '.join(absent)} not installed")
    flags.peers = [peer for peer in flags.peers or PEERS if peer not in missing]


def _keep_to_cores(threads: int) -> None:
    """As many cores as threads, for this process: before jax counts them, at its first use."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < threads:
        raise UserError(f"--threads={threads}: there are {len(cores)} cores: expected no more")
    os.sched_setaffinity(0, cores[:threads])


@cli_errors()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--layers", type=int, default=4, help="of LLaMA2-7B's 32")
    add("--model", help="folder or hub id of a dense model, in place of random weights")
    add("--small", action="store_true", help="two layers of 64: to see that everything runs")
    add("--formats", type=listed(str), default=("bf16",), help="ours: of bf16, int8, int4")
    add("--sparsity", type=listed(float), default=(0.5, 0.75, 0.9))
    add("--peers", type=listed(str), help=f"of {','.join(PEERS)}; default: those installed")
    add("--prompt", type=int, default=128)
    add("--new-tokens", type=int, default=8)
    add("--prefill", type=int, default=512, help="length of the text that is prefilled")
    add("--threads", type=int, default=2)
    add("--implementation", default="auto", help="of our kernels")
    add("--rounds", type=int, default=10)
    add("--folder", help="for the peers' files, which are removed; default: the system's")
    add("--json", type=pathlib.Path, help="write the rows here as well")
    flags = parser.parse_args()
    _check(flags)
    _keep_to_cores(flags.threads)
    flags.layers = 2 if flags.small else None if flags.model else flags.layers
    with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
        rows, bytes_per_s = measure(flags, pathlib.Path(folder))
    publish("model" if flags.model else "peers", rows, table(rows), bytes_per_s, flags)


if __name__ == "__main__":
    main()
