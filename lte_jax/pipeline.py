"""From a dense checkpoint to a sparse one: the whole way, one function an arrow.

    dense --finetune--> dense --moefy--> experts and routers --router--> --adapt--> LTE folder

Every arrow leaves a folder in the work directory, whole or absent, and is not done again where its
folder stands; a stage that was interrupted goes on from its newest checkpoint. So the same command,
given again after anything, ends in the same result.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from lte_jax import data, hf, metrics, report, sharding, stages, tasks, trainer
from lte_jax.config import Experiment
from lte_jax.errors import UserError
from lte_jax.files import atomic_write
from lte_jax.model import Transformer, abstract_params
from lte_jax.moefy import add_routers, to_experts
from lte_jax.sparsity import Control

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Paths:
    """What a run leaves behind."""

    root: Path

    @property
    def experiment(self) -> Path:
        """The configuration, as JSON."""
        return self.root / "experiment.json"

    @property
    def dense(self) -> Path:
        """HF folder of the dense model that was converted."""
        return self.root / "dense"

    @property
    def experts(self) -> Path:
        """LTE folder before training: experts grouped, routers started."""
        return self.root / "experts"

    @property
    def lte(self) -> Path:
        """LTE folder of the result."""
        return self.root / "lte"

    def checkpoints(self, stage: str) -> Path:
        """Training states of a stage."""
        return self.root / "checkpoints" / stage


def train(experiment: Experiment, workdir: str | Path) -> tuple[Transformer, Any]:
    """Runs an experiment from its dense model to its LTE folder and the report on it.

    Without steps for the sparse stages it ends with the dense model: a control to compare with.

    Returns:
      The last model and its parameters, as its folder holds them.

    Raises:
      UserError: on bad configuration, data, models or folders, and where the loss is not finite.
      trainer.Interrupted: after SIGTERM, once the state is saved; call again to go on.
    """
    paths = Paths(Path(workdir))
    _claim(paths, experiment)
    mesh = sharding.make_mesh(experiment.mesh)
    tokenizer = load_tokenizer(experiment)
    writer = _writer(paths, experiment)
    try:
        run = _Run(experiment, paths, mesh, tokenizer, writer)
        run.dense()
        if any(stage.routing != "dense" for stage in run.stages()):
            run.experts()
            run.sparse()
    finally:
        writer.close()
    return run.report()


def load(
    path_or_hub_id: str | Path, dtype: str | None = None, **model_fields: Any
) -> tuple[Transformer, Any]:
    """A dense or LTE model and its parameters, from a folder or the hub.

    Args:
      path_or_hub_id: an HF folder, an LTE folder, or a hub id.
      dtype: to compute in; parameters are converted. None: what the folder stores.
      model_fields: further fields of the Transformer, such as remat=True.
    """
    folder = hf.resolve(path_or_hub_id)
    config, lte = hf.read_config(folder)
    params = hf.load_params(folder, config, lte, dtype)
    return Transformer(config, lte, dtype=dtype or config.dtype, **model_fields), params


def load_tokenizer(experiment: Experiment) -> Any:
    """The tokenizer that an experiment names: its own, its model's, or bytes."""
    source = experiment.source.tokenizer or experiment.source.path
    return hf.load_tokenizer(source) if source else data.byte_tokenizer()


@dataclasses.dataclass
class _Run:
    """One run of an experiment: what its arrows share."""

    experiment: Experiment
    paths: Paths
    mesh: jax.sharding.Mesh
    tokenizer: Any
    writer: metrics.Writer

    def dense(self) -> None:
        """The dense model, trained on the task where the experiment has a finetune stage."""
        if (self.paths.dense / "config.json").exists():
            return
        source, stage = self.experiment.source, self._stage("finetune")
        if not source.path and stage is None:
            raise UserError(
                "source.path is empty and stages.finetune.steps=0: name a model, or give a model "
                "from random weights some steps to learn in"
            )
        if source.path:
            config, lte = hf.read_config(hf.resolve(source.path))
            if lte is not None:
                raise UserError(
                    f"source.path={source.path!r} holds an LTE model: expected the dense model it "
                    "was made from"
                )
            model = self._model(config, None)
            params = self._load(hf.resolve(source.path), model)
        else:
            model = self._model(source.scratch, None)
            shardings = sharding.param_shardings(abstract_params(model), self.mesh)
            key, tokens = jax.random.key(self.experiment.seed), jnp.zeros((1, 1), jnp.int32)
            init = jax.jit(lambda: model.init(key, tokens)["params"], out_shardings=shardings)
            params = init()
        if stage is not None:
            control = Control.start(self.experiment.lte)
            params = self._fit(model, stage, params, control, None).params
        self._save(self.paths.dense, model, params, source.path or None)

    def experts(self) -> None:
        """Neurons grouped into experts, routers started on training data."""
        if (self.paths.experts / "config.json").exists():
            return
        config, _ = hf.read_config(self.paths.dense)
        model = self._model(config, None)
        params = self._load(self.paths.dense, model)
        train_rows, _ = self._rows(model)
        rng = np.random.default_rng(self.experiment.seed)
        chosen = rng.permutation(len(train_rows))[: self.experiment.calibration_rows]
        rows = train_rows[np.sort(chosen)]
        model, params, order_NEM = to_experts(
            model, params, self.experiment.lte, rows["tokens"], rows["segments"]
        )
        params = add_routers(model, params, rows["tokens"], rows["segments"])
        self._save(self.paths.experts, model, params, self.paths.dense, order_NEM)

    def sparse(self) -> None:
        """The stages that make it sparse, and the LTE folder."""
        if (self.paths.lte / "config.json").exists():
            return
        model = self._model(*hf.read_config(self.paths.experts))
        assert model.lte is not None
        params, control = self._load(self.paths.experts, model), Control.start(model.lte)
        distils = any(stage.distill_weight for stage in self.stages())
        teacher = jax.tree.map(jnp.copy, params) if distils else None
        for stage in self.stages():
            if stage.routing != "dense":
                trained = self._fit(model, stage, params, control, teacher)
                params, control = trained.params, trained.control
        lte = dataclasses.replace(model.lte, threshold=float(control.threshold))
        order_NEM = hf.load_expert_order(self.paths.experts)
        self._save(self.paths.lte, model.clone(lte=lte), params, self.paths.experts, order_NEM)

    def report(self) -> tuple[Transformer, Any]:
        """Measures the result beside the dense model, if that is asked for and not done.

        Writes results.json, table.md and figures.

        Returns:
          The model that was measured and its parameters.
        """
        dtype = self.experiment.source.compute_dtype
        dense = load(self.paths.dense, dtype)
        is_sparse = (self.paths.lte / "config.json").exists()
        model, params = load(self.paths.lte, dtype) if is_sparse else dense
        done = (self.paths.root / "results.json").exists()
        if done or not self.experiment.report or jax.process_index() != 0:
            return model, params
        results = tasks.evaluate(
            model,
            params,
            self._rows(model)[1],
            baseline=dense if is_sparse else None,
            tokenizer=self.tokenizer,
            batch_size=self.experiment.data.batch_size,
            prompt=self.experiment.sample_prompt,
            sample_tokens=self.experiment.sample_tokens,
            sample_temperature=self.experiment.sample_temperature,
        )
        source = {"model": self.experiment.source.path, "data": self.experiment.data.validation}
        results |= {"environment": report.environment(), "source": source}
        figures = importlib.util.find_spec("matplotlib") is not None
        written = report.write([results], self.paths.root, figures)
        print("", report.table([results]), report.samples([results]), sep="\n")
        print("wrote", *(f"  {path}" for path in written), sep="\n")
        if not figures:
            print("no figures: pip install 'lte-jax[plot]', then python -m lte_jax.report")
        return model, params

    def stages(self) -> tuple[stages.Stage, ...]:
        """What this experiment runs."""
        return stages.make(self.experiment.stages, self.experiment.lte)

    def _stage(self, name: str) -> stages.Stage | None:
        return next((stage for stage in self.stages() if stage.name == name), None)

    def _fit(self, model, stage, params, control, teacher) -> trainer.Trained:
        return trainer.fit(
            model,
            stage,
            params,
            control,
            self._rows(model),
            self.experiment,
            self.paths.checkpoints(stage.name),
            self.writer,
            mesh=self.mesh,
            teacher=teacher,
        )

    def _rows(self, model: Transformer) -> tuple[data.Rows, data.Rows]:
        if not hasattr(self, "_built"):
            self._built = data.build(
                self.experiment.data, self.tokenizer, model.config, self.experiment.seed
            )
        return self._built

    def _model(self, config, lte) -> Transformer:
        source = self.experiment.source
        return Transformer(config, lte, dtype=source.compute_dtype, remat=source.remat)

    def _load(self, folder: Path, model: Transformer) -> Any:
        """Float32 masters, straight onto the mesh."""
        shardings = sharding.param_shardings(abstract_params(model), self.mesh)
        return hf.load_params(folder, model.config, model.lte, "float32", shardings)

    def _save(self, folder: Path, model: Transformer, params: Any, source, order_NEM=None) -> None:
        if jax.process_count() > 1:  # parts of arrays lie elsewhere: all processes take part
            params = multihost_utils.process_allgather(params, tiled=True)
        if jax.process_index() == 0:
            own = source is None or self.experiment.source.tokenizer
            tokenizer = self.tokenizer if own else None
            hf.save(folder, model.config, model.lte, params, source, order_NEM, tokenizer=tokenizer)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"saved {folder}")


def _claim(paths: Paths, experiment: Experiment) -> None:
    """Writes the configuration into a new work directory, or checks that it is the one there."""
    text = json.dumps(dataclasses.asdict(experiment), indent=1) + "\n"
    if paths.experiment.exists():
        old, new = json.loads(paths.experiment.read_text()), json.loads(text)
        different = sorted(_differences(old, new))
        if different:
            raise UserError(
                f"{paths.root} holds a run of another configuration, which differs in "
                f"{', '.join(different)}: set it as it was to go on, or name a fresh workdir"
            )
        return
    try:
        paths.root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"workdir {paths.root} cannot be made ({error.strerror}): name another place"
        ) from None
    atomic_write(paths.experiment, text)


def _differences(old: Any, new: Any, where: str = "config") -> set[str]:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return set() if old == new else {where}
    keys = old.keys() | new.keys()
    return set().union(*(_differences(old.get(k), new.get(k), f"{where}.{k}") for k in keys))


def _writer(paths: Paths, experiment: Experiment) -> metrics.Writer:
    if jax.process_index() != 0:
        return metrics.MultiWriter(())
    writers: list[metrics.Writer] = [
        metrics.TerminalWriter(experiment.data.batch_size * experiment.data.length, sys.stderr),
        metrics.JsonlWriter(paths.root / "metrics.jsonl"),
    ]
    try:
        writers.append(metrics.TensorBoardWriter(paths.root / "tensorboard"))
    except UserError as error:
        log.info("no TensorBoard metrics: %s", error)
    return metrics.MultiWriter(writers)
