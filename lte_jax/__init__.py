"""lte_jax: a dense Transformer learns to use only the experts it needs.

    import lte_jax

    model, params = lte_jax.load("HuggingFaceTB/SmolLM-135M")        # or a folder
    model, params = lte_jax.moefy(model, params, calibration=tokens)  # experts and routers
    out = lte_jax.apply(model, params, tokens)                        # hard routing
    out.logits, out.scores, out.sparsity

Training takes an experiment (`lte_jax.config`), as `python train.py` does. Dimension key of all
modules: B batch  L length  D model width  E experts  M neurons per expert  N layers  H heads
K kv heads  C head width  V vocabulary.
"""

from __future__ import annotations

import functools as _functools
import logging as _logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax as _jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lte_jax import checks as _checks
from lte_jax import hf as _hf
from lte_jax import moefy as _moefy
from lte_jax.config import Experiment, LTEConfig, ModelConfig, UserError, from_mapping
from lte_jax.evaluation import evaluate
from lte_jax.generate import generate, generate_text
from lte_jax.hf import load_tokenizer
from lte_jax.model import Output, Transformer
from lte_jax.router_init import enough_records as _enough_records
from lte_jax.routing import Routing

__version__ = "0.1.0"
_log = _logging.getLogger(__name__)
__all__ = [
    "Experiment",
    "LTEConfig",
    "ModelConfig",
    "Output",
    "Transformer",
    "UserError",
    "apply",
    "evaluate",
    "generate",
    "generate_text",
    "load",
    "load_tokenizer",
    "moefy",
    "save",
    "train",
]


def load(
    path_or_hub_id: str | Path, dtype: str | None = None, *, verify: bool = False
) -> tuple[Transformer, dict[str, Any]]:
    """A model and its parameters, from a folder or the Hugging Face hub.

        model, params = lte_jax.load("meta-llama/Llama-2-7b-hf")     # dense
        model, params = lte_jax.load("runs/demo/lte", "float32")     # what train.py made

    Args:
      path_or_hub_id: an HF folder, an LTE folder, or a model of the hub: "owner/name",
        "owner/name@revision", or the address of its page.
      dtype: "float32" or "bfloat16", to hold parameters and compute in. None: parameters stay as
        they are stored, and so does the computation, except that a model stored in float16
        computes in float32 on a CPU and in bfloat16 on an accelerator.
      verify: compare the contents of every file with the folder's manifest, which reads all of
        them once more; without it their sizes are compared. Folders of others have none.

    Raises:
      UserError: where it is neither, or is damaged; names the file and tensor.
    """
    if dtype is not None:
        _checks.compute_dtype(dtype)
    folder = _hf.resolve(path_or_hub_id)
    _hf.verify(folder, digests=verify)
    config, lte = _hf.read_config(folder)
    model = Transformer(config, lte, dtype=dtype or _compute_dtype(config.dtype))
    return model, _hf.load_params(folder, config, lte, dtype)


@_functools.cache  # what it decides is said once
def _compute_dtype(stored: str) -> str:
    """What a model computes in whose weights are stored in a type: the same, where that can be.

    float16 is a type for storing: it has too small a range, and XLA has no products of it on CPUs.
    """
    if stored in _checks.COMPUTE_DTYPES:
        return stored
    backend = _jax.default_backend()
    chosen = "float32" if backend == "cpu" else "bfloat16"
    _log.warning("weights stored in %s: computing in %s, on a %s", stored, chosen, backend)
    return chosen


def save(
    path: str | Path,
    model: Transformer,
    params: Mapping[str, Any],
    *,
    source: str | Path | None = None,
    dtype: str | None = None,
) -> None:
    """Writes an HF folder (dense model) or an LTE folder, whole or not at all.

        lte_jax.save("my-model", model, params, source="meta-llama/Llama-2-7b-hf")

    Args:
      path: the folder; an older model folder there is replaced.
      model: as from `load` or `moefy`.
      params: its parameters.
      source: folder or hub id whose tokenizer and further settings are taken over.
      dtype: of the stored weights, routers aside: float32, bfloat16 or float16. None: each as
        its parameter; "source": each as in `source`.

    Raises:
      UserError: where it cannot be written, or holds something that is not a model.
    """
    _checks.model(model, params)
    _hf.save(path, model.config, model.lte, params, source, dtype=dtype)


def moefy(
    model: Transformer,
    params: Mapping[str, Any],
    calibration: Int[np.ndarray, "R L"] | Any = None,
    mask: Bool[np.ndarray, "R L"] | Int[np.ndarray, "R L"] | Any = None,
    *,
    seed: int | Any = 0,
    **settings: Any,
) -> tuple[Transformer, dict[str, Any]]:
    """Groups the neurons of each FFN into experts and gives each FFN a router.

        model, params = lte_jax.moefy(model, params, tokens, expert_size=32, target_sparsity=0.5)

    With all experts on it computes what the dense model computes.

    Args:
      model: dense.
      params: its parameters; they are not changed.
      calibration: token ids of typical text, 32 tokens or more for each of the model's D + 1
        router inputs (a warning says where there are fewer); any number fits into memory. Needed
        for the default settings grouping="coactivation" and router_init="ridge".
      mask: True (or > 0) where `calibration` is not padding; None: everywhere.
      seed: of the grouping, of random router starts, and of the choice of `calibration_records`.
      settings: fields of `LTEConfig`.

    Raises:
      UserError: on settings that do not exist or do not fit the model, and on calibration data
        that is none.
    """
    _checks.model(model, params)
    _checks.seed(seed)
    seed = int(seed)
    lte = from_mapping(LTEConfig, settings, "moefy")
    if calibration is not None:
        calibration = _checks.array(calibration, "calibration")
        mask = None if mask is None else _checks.array(mask, "mask")
        _checks.batch(model.config, calibration, mask, name="calibration")
        if lte.calibration_records is not None:
            rng = np.random.default_rng(seed)
            asked, d_model = lte.calibration_records, model.config.d_model
            chosen = _enough_records(np.asarray(calibration), d_model, asked, rng)
            calibration, mask = calibration[chosen], None if mask is None else mask[chosen]
    _checks.finite_params(params, "to be moefied")
    sparse, params, _ = _moefy.to_experts(model, params, lte, calibration, mask, seed=seed)
    return sparse, _moefy.add_routers(sparse, params, calibration, mask, seed=seed)


def apply(
    model: Transformer,
    params: Mapping[str, Any],
    tokens: Int[Array | np.ndarray, "B L"] | Any,
    *,
    routing: Routing | str | None = None,
    mask: Bool[Array | np.ndarray, "B L"] | Int[Array | np.ndarray, "B L"] | Any = None,
    threshold: Float[Array, ""] | float | Any = None,
) -> Output:
    """The forward pass; can be jitted (model and routing static) and differentiated in `params`.

        out = lte_jax.apply(model, params, tokens)
        out.logits     # [B, L, V] float32
        out.scores     # [N, B, L, E] router scores, None under dense routing
        out.sparsity   # share of the experts of real tokens that did not run

    Args:
      model: dense or LTE.
      params: its parameters.
      tokens: token ids, an array or lists of one length.
      routing: "dense", "soft", "hard", "straight_through" or "top_k" (see lte_jax.routing). None:
        hard for an LTE model, dense for a dense one.
      mask: True at real tokens, or int segment ids (0 padding) of rows that hold several texts.
        Padding may lie anywhere: a token's position is the number of real ones before it.
      threshold: within [0, 1]; scores above it run. None: that of the model.

    Raises:
      UserError: on arguments that do not fit the model or each other; under `jax.jit` values are
        not known, and only shapes and types are looked at.
    """
    _checks.model(model, params)
    tokens = _checks.array(tokens, "tokens")
    mask = None if mask is None else _checks.array(mask, "mask")
    return model.apply({"params": params}, tokens, routing=routing, mask=mask, threshold=threshold)


def train(
    experiment: Experiment, workdir: str | Path, *, profile: bool = False
) -> tuple[Transformer, dict[str, Any]]:
    """Runs an experiment, dense model to LTE folder; called again, it goes on where it stopped.

        from lte_jax import config
        experiment = config.load_config("configs/demo.py", ["lte.target_sparsity=0.75"])
        model, params = lte_jax.train(experiment, "runs/demo")

    Leaves in `workdir` the folders dense/, experts/ and lte/, checkpoints/, metrics.jsonl,
    tensorboard/, and the report: results.json, table.md and figures. With `profile` also
    profile/<stage>/, a trace of a few steps of each stage (`tensorboard --logdir` shows it).

    Raises:
      UserError: on bad configuration, data, models or folders, and where the loss is not finite.
      SystemExit: with code 143 after SIGTERM and 130 after Ctrl-C, once what is in hand is saved
        (in the main thread; elsewhere, signals do what they did before).
    """
    from lte_jax import pipeline  # with Orbax and Optax: only training needs them

    return pipeline.train(experiment, workdir, profile=profile)
