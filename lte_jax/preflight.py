"""Checks everything that can be checked before the first training step.

A misspelt file, a size that does not divide or a prompt that does not fit costs seconds here, but
hours after training. What is read here, the run uses.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from lte_jax import data, files, hf, lora, plan, sharding, stages, tasks
from lte_jax.config import Experiment, MeshConfig, ModelConfig, num_experts
from lte_jax.errors import UserError
from lte_jax.hf.config_json import write_config
from lte_jax.hf.folder import COMPANIONS
from lte_jax.model import Transformer, abstract_params
from lte_jax.processes import on_first
from lte_jax.routing import make as make_routing
from lte_jax.writers import wandb_for

LEARNED = "bpe"  # as source.tokenizer
_MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
)


@dataclasses.dataclass(frozen=True)
class Parts:
    """The inputs of a run, read and checked against each other."""

    config: ModelConfig  # of the dense model
    source: Path | None  # folder of the initial dense model; None: random weights
    tokenizer: Any
    records: tuple[data.Records, data.Records]  # training, validation
    task: tasks.Task | None  # None: language modelling
    inputs: dict[str, Any]  # name -> [number, digest] of everything read


def prepare(
    experiment: Experiment,
    mesh: jax.sharding.Mesh,
    dense: Path | None,
    known: Mapping[str, Any],
    cache: Path | None = None,
) -> Parts:
    """Reads the model's config, the tokenizer and the texts, and checks that they fit together.

    Args:
      experiment: to run.
      mesh: to run it on.
      dense: the finished dense model of this run; None: there is none yet.
      known: the inputs recorded when the run started; the end token is taken from them.
      cache: the folder for records if data.cache is set.

    Raises:
      UserError: on anything that would fail later.
    """
    if experiment.wandb:
        wandb_for(experiment.wandb)
    if dense is None:
        _check_memory(experiment, mesh)
    source = None if dense is not None else _source(experiment)
    folder = dense or source
    config = hf.read_config(folder)[0] if folder else experiment.source.scratch
    if folder is None:
        write_config(config, config.dtype)  # raises if its family cannot express it
    else:
        hf.check_params(folder, config)
    name = experiment.data.task
    task = tasks.find(name).adapted(experiment.data) if name else None
    if task is not None and folder == source:
        config = task.dense_config(config)
    _check_purpose(experiment, config)
    if experiment.source.activation and folder == source:
        config = dataclasses.replace(config, activation=experiment.source.activation)
    _check_sizes(experiment, config, mesh)
    tokenizer, named = _tokenizer(experiment, task)
    _check_sample(experiment, config, tokenizer)
    if "end_token" in known:
        end = known["end_token"]
    elif task is not None:
        end = tokenizer.eos_token_id if task.decoding else None
    else:
        end = _end_token(experiment, tokenizer, config, folder, mesh)
    if folder is None and end is not None and not config.eos_ids:
        config = dataclasses.replace(config, eos_ids=(end,))  # which the model learns
    records = _records(experiment, task, tokenizer, config, end, cache)
    inputs: dict[str, Any] = {"end_token": end} | {
        f"rows/{name}": [len(part), part.digest()]
        for name, part in zip(("train", "validation"), records, strict=True)
    }
    if named:
        inputs |= _fingerprints("tokenizer", hf.resolve(named), COMPANIONS)
    if source is not None:
        inputs |= _fingerprints("source", source, _MODEL_FILES)
    return Parts(config, source, tokenizer, records, task, inputs)


def of_texts(experiment: Experiment) -> tuple[ModelConfig, Any, int | None]:
    """What it takes to prepare an experiment's texts: config, tokenizer, end of documents.

    No weights are read unless the end is to be measured (data.end_token="auto").

    Raises:
      UserError: if its texts cannot be prepared, or the source has no config or no tokenizer.
    """
    if experiment.data.task:
        raise UserError(
            f"data.task={experiment.data.task!r}: expected '': tasks make their records themselves"
        )
    if experiment.source.tokenizer == LEARNED:
        raise UserError(
            f"source.tokenizer={LEARNED!r} is learned anew by each run: expected one in a folder "
            "or on the hub"
        )
    if folder := data.prepared(experiment.data.train):
        raise UserError(f"data.train={experiment.data.train!r}: {folder} holds shards already")
    source = _source(experiment)
    config = hf.read_config(source)[0] if source else experiment.source.scratch
    _check_purpose(experiment, config)
    tokenizer, _ = _tokenizer(experiment, None)
    mesh = sharding.make_mesh(MeshConfig())  # that of this machine, not of the run's
    return config, tokenizer, _end_token(experiment, tokenizer, config, source, mesh)


def _end_token(
    experiment: Experiment,
    tokenizer: Any,
    config: ModelConfig,
    folder: Path | None,
    mesh: jax.sharding.Mesh,
) -> int | None:
    """The token that ends training texts: of shards, as they have it, else see `data.end_token`."""
    shards = data.prepared(experiment.data.train)
    if shards is not None and experiment.data.end_token == "auto":
        return data.manifest(shards)["end_token"]

    def load() -> tuple[Transformer, Any]:  # the dense model, for inference
        model = Transformer(config, dtype=experiment.compute.dtype)
        shardings = sharding.param_shardings(abstract_params(model), mesh)
        return model, hf.load_params(folder, config, None, model.dtype, shardings)

    return data.end_token(experiment.data, tokenizer, config, load if folder else None)


def _check_memory(experiment: Experiment, mesh: jax.sharding.Mesh) -> None:
    """Refuses what cannot fit the devices, before weights are fetched and texts are read."""
    try:
        config = plan.foreseen(experiment)
    except UserError:  # which `_source` tells, after what else it checks
        return
    _check_purpose(experiment, config)
    for lte in (None, experiment.lte if is_sparse(experiment) else None):
        sharding.param_shardings(abstract_params(Transformer(config, lte)), mesh)
    plan.Plan.of(experiment, config, plan.Devices.at_hand(mesh)).check_memory()


def _check_purpose(experiment: Experiment, config: ModelConfig) -> None:
    if not experiment.data.task and (config.head != "lm" or not config.causal):
        raise UserError(
            f"source.path={experiment.source.path!r} is an encoder (family {config.family!r}): set "
            f"data.task, one of {', '.join(tasks.TASKS)}"
        )


def _tokenizer(experiment: Experiment, task: tasks.Task | None) -> tuple[Any, str]:
    """The tokenizer, and the folder or hub id that it comes from; "" if it is made here."""
    named = experiment.source.tokenizer or experiment.source.path
    if experiment.source.tokenizer == LEARNED:
        return _learned(experiment, task), ""
    return (hf.load_tokenizer(named), named) if named else (data.byte_tokenizer(), "")


def _records(experiment, task, tokenizer, config, end, cache) -> tuple[data.Records, data.Records]:
    if task is not None:
        return task.build(experiment.data, tokenizer, config, experiment.seed)
    folder = data.prepared(experiment.data.train)
    if folder is None and experiment.data.cache and cache is not None:
        folder = cache
        on_first(lambda: _fill(cache, experiment, tokenizer, config, end))
    if folder is not None:
        return data.opened(folder, experiment.data, tokenizer, config, experiment.seed, end)
    return data.build(experiment.data, tokenizer, config, experiment.seed, end)


def _fill(
    cache: Path, experiment: Experiment, tokenizer: Any, config: ModelConfig, end: int | None
) -> None:
    """Prepares an experiment's texts in a folder, unless they are there; others make room."""
    what, seed = (cache, experiment.data, tokenizer, config), experiment.seed
    try:
        data.prepare(*what, seed=seed, end=end)
    except data.OtherRecords:
        shutil.rmtree(cache)
        data.prepare(*what, seed=seed, end=end)


def is_sparse(experiment: Experiment) -> bool:
    """Whether the run ends in an LTE model, not a dense baseline."""
    return any(stage.sparse for stage in stages.make(experiment.stages, experiment.lte))


def _source(experiment: Experiment) -> Path | None:
    path = experiment.source.path
    if not path:
        if experiment.stages.finetune.steps == 0:
            raise UserError(
                "source.path is empty and stages.finetune.steps=0: name a model "
                "(--config.source.path=MODEL), or set some steps to train one from random weights"
            )
        return None
    folder = hf.resolve(path)
    if hf.read_config(folder)[1] is not None:
        raise UserError(
            f"source.path={path!r} holds an LTE model: expected the dense model it was made from"
        )
    return folder


def _learned(experiment: Experiment, task: tasks.Task | None) -> Any:
    """A tokenizer of the training texts; they decide it, so a resumed run learns the same one."""
    source, settings = experiment.source, experiment.data
    if source.path:
        raise UserError(
            f"source.tokenizer={LEARNED!r} is for a model from random weights: expected '' for the "
            f"tokenizer of source.path={source.path!r}"
        )
    if folder := data.prepared(settings.train):
        raise UserError(
            f"source.tokenizer={LEARNED!r} is learned from texts, and {folder} holds shards: "
            "expected the tokenizer that they were prepared with"
        )
    if task is not None:
        texts = task.texts(settings)
    else:
        how = settings.column, settings.newline, settings.max_documents, "train", settings.join
        texts = data.read_texts(settings.train, *how)
    return data.learned_tokenizer(texts, source.scratch.vocab_size)


def _check_sizes(experiment: Experiment, config: ModelConfig, mesh: jax.sharding.Mesh) -> None:
    lora.check(experiment, config)
    sharding.check_batch(experiment.data.batch_size, experiment.optim.microbatches, mesh)
    sparse = experiment.lte if is_sparse(experiment) else None
    num_experts(config, sparse)
    if sparse is not None:
        make_routing(sparse.routing, config, sparse)
        if sparse.router_init == "ridge":
            sparse.wanted_sparsity("lte.router_init='ridge'")
    for lte in (None, sparse):
        sharding.param_shardings(abstract_params(Transformer(config, lte)), mesh)


def _check_sample(experiment: Experiment, config: ModelConfig, tokenizer: Any) -> None:
    """Checks the report's sample text: at least one token must fit after its prompt."""
    if not (experiment.report and experiment.sample_tokens) or config.head != "lm":
        return
    [prompt] = data.tokenize([experiment.sample_prompt], tokenizer)
    if not 0 < len(prompt) < config.max_length:
        raise UserError(
            f"sample_prompt has {len(prompt)} tokens: expected 1 to {config.max_length - 1}, as "
            f"the model has {config.max_length} positions (sample_tokens=0 writes no sample)"
        )


def _fingerprints(group: str, folder: Path, patterns: tuple[str, ...]) -> dict[str, Any]:
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return on_first(  # several processes need not all read a whole model for it
        lambda: {f"{group}/{p.name}": [p.stat().st_size, files.sha256(p)] for p in sorted(found)}
    )
