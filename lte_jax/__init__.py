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

import dataclasses as _dataclasses
import functools as _functools
import logging as _logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, Unpack

import jax as _jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lte_jax import checks as _checks
from lte_jax import hf as _hf
from lte_jax import moefication as _moefication
from lte_jax import quantization as _quantization
from lte_jax.config import (
    Experiment,
    LTEConfig,
    LTESettings,
    ModelConfig,
    RoutingName,
    UserError,
    from_mapping,
)
from lte_jax.errors import Given
from lte_jax.evaluation import evaluate
from lte_jax.files import expand as _expand
from lte_jax.generation import generate, generate_text
from lte_jax.hf import load_tokenizer
from lte_jax.model import Output, Transformer
from lte_jax.router_init import enough_records as _enough_records
from lte_jax.routing import dial as _dial
from lte_jax.routing import kind as _kind
from lte_jax.scoring import embed_texts
from lte_jax.selection import Routing
from lte_jax.writers import Writer

__version__ = "0.1.0"
_log = _logging.getLogger(__name__)
# Rows of R or B texts, L tokens each, as arrays or lists.
Tokens: TypeAlias = Int[Array | np.ndarray, "R L"] | Sequence[Sequence[int]]
Mask: TypeAlias = (
    Bool[Array | np.ndarray, "R L"] | Int[Array | np.ndarray, "R L"] | Sequence[Sequence[int]]
)
__all__ = [
    "Experiment",
    "LTEConfig",
    "ModelConfig",
    "Output",
    "Transformer",
    "UserError",
    "apply",
    "calibrate",
    "embed_texts",
    "evaluate",
    "generate",
    "generate_text",
    "load",
    "load_tokenizer",
    "moefy",
    "quantize",
    "save",
    "train",
]


def load(
    path_or_hub_id: Given[str | Path],
    dtype: Given[Literal["float32", "bfloat16"] | None] = None,
    *,
    verify: bool = False,
) -> tuple[Transformer, dict[str, Any]]:
    """Loads a model and its parameters from a folder or the Hugging Face hub.

        model, params = lte_jax.load("meta-llama/Llama-2-7b-hf")     # dense
        model, params = lte_jax.load("runs/demo/lte", "float32")     # what train.py made

    Args:
      path_or_hub_id: an HF folder, an LTE folder, or a hub model: "owner/name",
        "owner/name@revision", or the URL of its page.
      dtype: "float32" or "bfloat16", for parameters and computation. None: both as stored, except
        that a model stored in float16 computes in float32 on a CPU, in bfloat16 on accelerators.
      verify: check the SHA-256 of every file against the folder's manifest, which reads each file
        once more; otherwise only sizes are checked. Folders of other tools have no manifest.

    Raises:
      UserError: if it is not a model or is damaged; names the file and tensor.
    """
    if dtype is not None:
        _checks.compute_dtype(dtype)
    folder = _hf.resolve(path_or_hub_id)
    _hf.verify(folder, digests=verify)
    config, lte = _hf.read_config(folder)
    model = Transformer(config, lte, dtype=dtype or _compute_dtype(config.dtype))
    return model, _hf.load_params(folder, config, lte, dtype)


@_functools.cache  # so that the choice is logged once
def _compute_dtype(stored: str) -> str:
    """The dtype a model computes in, given the dtype of its stored weights.

    float16 is for storage only: its range is small, and XLA cannot multiply it on CPUs.
    """
    if stored in _checks.COMPUTE_DTYPES:
        return stored
    backend = _jax.default_backend()
    chosen = "float32" if backend == "cpu" else "bfloat16"
    _log.warning("weights are stored in %s; computing in %s on %s", stored, chosen, backend)
    return chosen


def save(
    path: str | Path,
    model: Transformer,
    params: Mapping[str, Any],
    *,
    source: str | Path | None = None,
    dtype: Given[Literal["float32", "bfloat16", "float16", "source"] | None] = None,
) -> None:
    """Writes an HF folder (dense model) or an LTE folder, atomically.

        lte_jax.save("my-model", model, params, source="meta-llama/Llama-2-7b-hf")

    Args:
      path: the folder; a model folder already there is replaced.
      model: from `load` or `moefy`.
      params: its parameters.
      source: folder or hub id to copy the tokenizer and other settings from; without it there is
        none, and a warning says so.
      dtype: of the stored weights except routers: float32, bfloat16 or float16. None: the dtype of
        each parameter; "source": the dtypes in `source`.

    Raises:
      UserError: if it cannot be written, or the folder holds something other than a model.
    """
    _checks.model(model, params)
    _hf.save(path, model.config, model.lte, params, source, dtype=dtype)
    if not _hf.has_tokenizer(_expand(path)):
        mend = "give source=, or tokenizer.save_pretrained(path)"
        _log.warning("%s has no tokenizer, so no text can be read with it: %s", path, mend)


def moefy(
    model: Transformer,
    params: Mapping[str, Any],
    calibration: Given[Tokens | None] = None,
    mask: Given[Mask | None] = None,
    *,
    seed: Given[int] = 0,
    **settings: Unpack[LTESettings],
) -> tuple[Transformer, dict[str, Any]]:
    """Groups the neurons of each FFN into experts and gives each FFN a router.

        model, params = lte_jax.moefy(model, params, tokens, expert_size=32, target_sparsity=0.5)

    With all experts active the result computes what the dense model does.

    Args:
      model: dense.
      params: its parameters; they are not changed.
      calibration: token ids of typical text, at least 32 tokens for each of the D + 1 router
        inputs (fewer give a warning); memory use does not grow with them. Required by the default
        settings grouping="coactivation" and router_init="ridge".
      mask: True (or > 0) where `calibration` is not padding; None: no padding.
      seed: for grouping, random router initialisation, and the choice of `calibration_records`.
      **settings: fields of `LTEConfig`.

    Raises:
      UserError: on unknown settings, settings that do not fit the model, and bad calibration data.
    """
    _checks.model(model, params)
    _checks.seed(seed)
    seed = int(seed)
    lte = from_mapping(LTEConfig, settings, "moefy")
    rows = masked = None
    if calibration is not None:
        rows = _checks.array(calibration, "calibration")
        masked = None if mask is None else _checks.array(mask, "mask")
        _checks.batch(model.config, rows, masked, name="calibration")
        if lte.calibration_records is not None:
            rng = np.random.default_rng(seed)
            asked, d_model = lte.calibration_records, model.config.d_model
            chosen = _enough_records(np.asarray(rows), d_model, asked, rng)
            rows, masked = rows[chosen], None if masked is None else masked[chosen]
    if found := _quantization.format_of(params):
        raise UserError(f"moefy: params are {found}: moefy the model first, then quantize")
    _checks.finite_params(params, "to be moefied")
    sparse, params, _ = _moefication.to_experts(model, params, lte, rows, masked, seed=seed)
    return sparse, _moefication.add_routers(sparse, params, rows, masked, seed=seed)


def quantize(
    model: Given[Transformer],
    params: Mapping[str, Any],
    format: Given[Literal["int8", "int6", "int4"]],
    calibration: Given[Tokens | None] = None,
    mask: Given[Mask | None] = None,
    *,
    scale_steps: Given[int] = 0,
) -> dict[str, Any]:
    """The parameters with weights of 8, 6 or 4 bits, for inference.

        params = lte_jax.quantize(model, params, "int8")
        params = lte_jax.quantize(model, params, "int4", calibration=tokens)    # GPTQ
        params = lte_jax.quantize(model, params, "int4", calibration=tokens, scale_steps=200)
        lte_jax.generate(model, params, tokens, max_new_tokens=50)

    Matrices of attention, experts, embedding and head are rounded, in groups of 32 inputs that
    share a scale: 8.5, 6.5 or 4.5 bits a weight (embedding and head at least 6.5). Routers are
    rounded to bfloat16; norms and biases are kept. The CPU kernels round what they multiply with to
    8 bits as well. Such parameters work wherever a model computes (`apply`, `evaluate`, `generate`)
    and in `save`; they cannot be trained or moefied.

    Args:
      model: dense or LTE.
      params: its parameters, float32 or bfloat16.
      format: "int8", "int6" or "int4".
      calibration: token ids [R, L] of typical text, some thousands: weights are rounded so that
        what the model computes on it changes little (gptq.py). None: each to what is nearest.
      mask: True (or > 0) where `calibration` is not padding; None: no padding.
      scale_steps: of training for the scales afterwards, each on 8 rows of `calibration`, so that
        what the head reads stays what it was (scales.py); a step costs five passes over its rows.

    Raises:
      UserError: if the format is unknown, the parameters are not the model's, or a matrix has a
        number of inputs that is no multiple of 32; on bad calibration data, and if there is none
        for `scale_steps`.
    """
    _checks.model(model, params)
    if found := _quantization.format_of(params):
        raise UserError(f"quantize: params are {found} already: pass those that load returns")
    _checks.integer("scale_steps", scale_steps, 0)
    if calibration is None:
        if scale_steps:
            raise UserError(f"quantize: scale_steps={scale_steps} needs calibration: pass tokens")
        return _quantization.quantize(model.config, model.lte, params, format, model.dtype)
    from lte_jax import gptq, router_init

    batches = router_init.rows(_calibration(model, calibration, mask)[:])
    rounded = gptq.quantize(model, params, format, batches)
    if not scale_steps:
        return rounded
    from lte_jax import scales  # imports Optax

    return scales.learn(model, params, rounded, batches, scale_steps)


def _calibration(model: Transformer, calibration: Any, mask: Any) -> Any:
    """Records of calibration tokens [R, L]."""
    from lte_jax import data

    rows_RL = np.asarray(_checks.array(calibration, "calibration"))
    mask_RL = None if mask is None else np.asarray(_checks.array(mask, "mask"))
    _checks.batch(model.config, rows_RL, mask_RL, name="calibration")
    segments_RL = np.ones(rows_RL.shape, np.int32) if mask_RL is None else mask_RL.astype(np.int32)
    return data.Records(rows_RL.astype(np.int32), segments_RL)


def calibrate(
    model: Transformer,
    params: Mapping[str, Any],
    calibration: Given[Tokens],
    mask: Given[Mask | None] = None,
    *,
    batch_size: Given[int] = 8,
) -> Transformer:
    """The model with a curve of thresholds, so that it can be asked for a sparsity.

        model = lte_jax.calibrate(model, params, tokens)
        out = lte_jax.apply(model, params, tokens, sparsity=0.7)

    Training with an `lte.sparsity_range` ends with it. A model that was trained for one sparsity
    can be moved, too, but loses more the further it is from there.

    Args:
      model: with experts, under a routing by threshold.
      params: its parameters; they do not change.
      calibration: token ids of typical text, some thousands.
      mask: True (or > 0) where `calibration` is not padding; None: no padding.
      batch_size: of the forward passes, about twenty over all of it.

    Raises:
      UserError: on a dense model, a routing that no threshold decides, and bad calibration data.
    """
    from lte_jax import calibration as thresholds
    from lte_jax import data

    _checks.model(model, params)
    if model.lte is None or not _kind(model.lte.routing).by_threshold:
        raise UserError("calibrate: expected a model with experts that a threshold chooses")
    _checks.integer("batch_size", batch_size, 1)
    records = _calibration(model, calibration, mask)
    histogram = thresholds.histogram_over(
        model, params, lambda: data.eval_batches(records, min(batch_size, len(records)))
    )
    curve = thresholds.curve(model, histogram)
    return model.clone(lte=_dataclasses.replace(model.lte, curve=curve))


def apply(
    model: Transformer,
    params: Mapping[str, Any],
    tokens: Given[Tokens],
    *,
    routing: Given[Routing | RoutingName | None] = None,
    mask: Given[Mask | None] = None,
    types: Given[Tokens | None] = None,
    threshold: Given[Float[Array, ""] | float | None] = None,
    sparsity: Given[float | None] = None,
) -> Output:
    """The forward pass; works under `jax.jit` (model and routing static) and `jax.grad`.

        out = lte_jax.apply(model, params, tokens)
        out.logits     # [B, L, V] float32; of a classifier, [B, classes]
        out.hidden     # [B, L, D] what the head reads: an encoder's hidden states
        out.scores     # [N, B, L, E] router scores; None with dense routing
        out.sparsity   # fraction of experts skipped, over real tokens

    Args:
      model: dense or LTE.
      params: its parameters.
      tokens: token ids, an array or lists of equal length.
      routing: "dense", "soft", "hard", "straight_through" or "top_k" (see lte_jax.routing). None:
        hard for an LTE model, dense for a dense one.
      mask: True at real tokens, or int segment ids (0: padding) for rows that hold several texts.
        Padding may be anywhere: a token's position is the number of real tokens before it.
      types: the tokenizer's token_type_ids, for models that have them; None: all 0.
      threshold: in [0, 1]; experts with a larger score run. None: the model's own.
      sparsity: share of experts to skip, in place of a threshold: that of the model's curve, see
        `calibrate`.

    Raises:
      UserError: on arguments that do not fit the model or each other. Under `jax.jit` only shapes
        and dtypes are checked.
    """
    _checks.model(model, params)
    tokens = _checks.array(tokens, "tokens")
    mask = None if mask is None else _checks.array(mask, "mask")
    types = None if types is None else _checks.array(types, "types")
    _checks.routing_of(model, routing)
    threshold = _dial(model.lte, routing, threshold, sparsity)
    settings = {"routing": routing, "mask": mask, "types": types, "threshold": threshold}
    return model.apply({"params": params}, tokens, **settings)


def train(
    experiment: Experiment,
    workdir: str | Path,
    *,
    profile: bool = False,
    writers: Sequence[Writer] = (),
) -> tuple[Transformer, dict[str, Any]]:
    """Runs an experiment from dense model to LTE folder, or resumes where it stopped.

        from lte_jax import config
        experiment = config.load_config("configs/demo.py", ["lte.target_sparsity=0.75"])
        model, params = lte_jax.train(experiment, "runs/demo")

    Writes to `workdir` the folders dense/, experts/ and lte/, checkpoints/, metrics.jsonl,
    tensorboard/, and the report: results.json, table.md and figures. `profile` adds
    profile/<stage>/, a trace of a few steps of each stage (view with `tensorboard --logdir`).
    `writers` receive the metrics, too: any subclass of `lte_jax.writers.Writer`.

    Raises:
      UserError: on bad configuration, data, models or folders, and if the loss is not finite.
      SystemExit: with code 143 after SIGTERM and 130 after Ctrl-C, once the state is saved. Outside
        the main thread, signals are not handled.
    """
    from lte_jax import pipeline  # imports Orbax and Optax, which only training needs

    return pipeline.train(experiment, workdir, profile=profile, writers=writers)
