"""The whole pipeline, from a dense checkpoint to a sparse one.

    dense --finetune--> dense --moefy--> experts and routers --router--> --adapt--> LTE folder

Models are written to the work directory atomically, and steps whose folder exists are skipped; an
interrupted stage resumes from its newest checkpoint. So running the same command again always leads
to the same result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lte_jax import (
    data,
    evaluation,
    files,
    hf,
    interrupt,
    lora,
    preflight,
    processes,
    report,
    sharding,
    stages,
    trainer,
    training_step,
)
from lte_jax import params as parameters
from lte_jax import workdir as work
from lte_jax.checkpoint import holds_step, quiet_threads
from lte_jax.config import Experiment
from lte_jax.errors import UserError
from lte_jax.kept import Kept
from lte_jax.model import Transformer, abstract_params
from lte_jax.moefication import add_routers, permute, to_experts
from lte_jax.plan import Devices, Plan
from lte_jax.processes import on_first
from lte_jax.router_init import enough_records
from lte_jax.sparsity import SparsityController
from lte_jax.workdir import Paths
from lte_jax.writers import MultiWriter, Writer, writers_of


def train(
    experiment: Experiment,
    workdir: str | Path,
    *,
    profile: bool = False,
    writers: Sequence[Writer] = (),
) -> tuple[Transformer, Any]:
    """Runs an experiment from its dense model to its LTE folder and the report.

    If the sparse stages have no steps, it ends with the dense model: a dense baseline.
    With `profile`, a few steps of each stage are traced into profile/<stage>/. `writers` receive
    the metrics, too, beside those that the run has by itself.

    Of several processes (processes.py) every one calls this, with a work directory that all see.

    Returns:
      The last model and its parameters, as stored in its folder; of several processes only the
      first has them, the others None in their place.

    Raises:
      UserError: on bad configuration, data, models or folders, if another run uses `workdir`, and
        if the loss is not finite.
      Interrupted: a SystemExit with code 143 after SIGTERM and 130 after Ctrl-C, once the state is
        saved; call again to resume. Outside the main thread, signals are not handled.
    """
    if not isinstance(experiment, Experiment):
        kind = type(experiment).__name__
        raise UserError(f"experiment is {kind}: expected an Experiment, as load_config makes it")
    paths = Paths(files.expand(workdir, "workdir"))
    with _alone(paths):
        on_first(functools.partial(work.check_same, paths, experiment))
        on_first(functools.partial(work.put_right, paths))
        processes.check_alike("settings", work.plain(experiment))
        mesh = sharding.make_mesh(experiment.mesh)
        run = _Run(experiment, paths, mesh, profile, tuple(writers))
        if not run.finished():
            run.prepare()
            run.train()
        else:
            done = f"{paths.root} holds this run, finished: its model is {run.last}"
            on_first(lambda: print(done, flush=True))
        run.clear()
        return run.report()


def report_again(workdir: str | Path) -> tuple[Transformer, Any]:
    """Evaluates the result of a finished run again and rewrites its report.

    Returns and raises what `train` does; UserError also if the run is not finished.
    """
    paths = Paths(files.expand(workdir, "workdir"))
    experiment = dataclasses.replace(work.read_experiment(paths), report=True)
    with _alone(paths):
        run = _Run(experiment, paths, sharding.make_mesh(experiment.mesh))
        if not run.finished():
            raise UserError(
                f"{paths.root} holds a run that is not finished: run its command again, which "
                "resumes it and writes the report"
            )
        return run.report(anew=True)


@dataclasses.dataclass
class _Run:
    """One run of an experiment: the steps of the pipeline, and what they share."""

    experiment: Experiment
    paths: Paths
    mesh: jax.sharding.Mesh
    profile: bool = False
    more_writers: tuple[Writer, ...] = ()

    @property
    def last(self) -> Path:
        """Folder of the last model."""
        return self.paths.lte if preflight.is_sparse(self.experiment) else self.paths.dense

    def finished(self) -> bool:
        """Whether the last model is written."""
        return self.has(self.last)

    def has(self, folder: Path) -> bool:
        """Whether a model is written, as process 0 sees it: all go the same way."""
        return on_first(functools.partial(self.paths.has, folder))

    def prepare(self) -> None:
        """Checks everything that can be checked, then claims the work directory."""
        for folder in self.paths.models:
            if self.has(folder):
                on_first(functools.partial(_verify, folder))
        inputs, devices = self.parts.inputs, Devices.at_hand(self.mesh)
        processes.check_alike("data", inputs)
        plan = Plan.of(self.experiment, self.parts.config, devices, self.parts.records)
        plan.check_memory()
        on_first(lambda: plan.check_room(self.paths))
        on_first(lambda: work.claim(self.paths, self.experiment, inputs))
        on_first(lambda: print(plan.banner(self.paths.root), flush=True))

    def train(self) -> None:
        """Runs every step that is not done yet."""
        first = jax.process_index() == 0
        own = writers_of(self.paths.root, self.experiment) if first else ()
        self.writer = MultiWriter((*own, *self.more_writers) if first else ())
        try:
            self.dense()
            self.clear()
            if preflight.is_sparse(self.experiment):
                self.experts()
                self.clear()
                self.sparse()
        except BaseException:
            with contextlib.suppress(UserError):  # on a full disk, say: the first error counts
                self.writer.close()
            raise
        self.writer.close()

    def clear(self) -> None:
        """Removes what finished steps leave, but for checkpoints that are to stay."""
        if jax.process_index() != 0:
            return
        done = [self.paths.begun_experts] if self.paths.has(self.paths.experts) else []
        for stage in () if self.experiment.checkpoint.keep_finished else self.stages():
            if self.paths.has(self.paths.lte if stage.sparse else self.paths.dense):
                done.append(self.paths.checkpoints(stage.name))
        for folder in done:
            shutil.rmtree(folder, ignore_errors=True)

    @functools.cached_property
    def parts(self) -> preflight.Parts:
        """Tokenizer, records and the dense model's config; read and checked on first access."""
        done = self.paths.dense if self.paths.has(self.paths.dense) else None
        known, cache = work.recorded(self.paths), self.paths.root / "data"
        return preflight.prepare(self.experiment, self.mesh, done, known, cache)

    @functools.cached_property
    def calibration(self) -> data.Records:
        """Training records used to group neurons, fit routers and set the final threshold."""
        records, rng = self.parts.records[0], np.random.default_rng(self.experiment.seed)
        asked, d_model = self.experiment.lte.calibration_records, self.parts.config.d_model
        chosen = enough_records(records.segments_RL, d_model, asked, rng)
        return records.take(chosen)

    def dense(self) -> None:
        """Writes the dense model, trained on the task if the experiment has a finetune stage."""
        if self.has(self.paths.dense):
            return
        shutil.rmtree(self.paths.begun_experts, ignore_errors=True)  # of another dense model
        source = self.parts.source
        if source is not None:
            model, params = self._load(source)
            if self.parts.config != model.config:  # a new head
                model = self._model(self.parts.config, None)
                shardings = sharding.param_shardings(abstract_params(model), self.mesh)
                key = jax.random.key(self.experiment.seed)
                params = parameters.adopt(model.config, params, key, shardings)
        else:
            model = self._model(self.parts.config, None)
            shardings = sharding.param_shardings(abstract_params(model), self.mesh)
            key, tokens = jax.random.key(self.experiment.seed), jnp.zeros((1, 1), jnp.int32)
            init = jax.jit(lambda: model.init(key, tokens)["params"], out_shardings=shardings)
            params = init()
        if dense := [stage for stage in self.stages() if not stage.sparse]:
            control = SparsityController.start(self.experiment.lte)
            base, params = lora.start(model.config, None, params, self.experiment)
            for stage in dense:
                params = self._fit(model, stage, params, control, None, base).params
            params = lora.merged(base, params)
        self._save(self.paths.dense, model, params, source)

    def experts(self) -> None:
        """Groups neurons into experts and initialises routers."""
        if self.has(self.paths.experts):
            return
        model, params = self._load(self.paths.dense)
        texts, lte, seed = self.calibration[:], self.experiment.lte, self.experiment.seed
        kept = Kept(self.paths.begun_experts)
        model, params, order_NEM = to_experts(model, params, lte, texts, seed=seed, kept=kept)
        params = add_routers(model, params, texts, seed=seed, kept=kept)
        self._save(self.paths.experts, model, params, self.paths.dense, order_NEM)

    def sparse(self) -> None:
        """Runs the sparse stages and writes the LTE folder."""
        model, params = self._load(self.paths.experts)
        assert model.lte is not None
        on_text = self.calibration, self.experiment.data.batch_size, self.mesh
        layers = model.config.num_layers
        base, params = lora.start(model.config, model.lte, params, self.experiment)
        control = SparsityController.start(model.lte, layers)
        if model.lte.sparsity_range:
            curve = trainer.measure_curve(model, lora.whole(base, params), *on_text)
            control = SparsityController.start(model.lte, layers, curve)
        distils = any(stage.taught for stage in self.stages())
        teacher = self._teacher(base.params if base else params) if distils else None
        for stage in self.stages()[on_first(self._begun) :]:
            if stage.sparse:
                trained = self._fit(model, stage, params, control, teacher, base)
                params, control = trained.params, trained.control
        lte = trainer.calibrated(model, lora.whole(base, params), control, *on_text)
        order_NEM, params = hf.load_expert_order(self.paths.experts), lora.merged(base, params)
        self._save(self.paths.lte, model.clone(lte=lte), params, self.paths.experts, order_NEM)

    def _begun(self) -> int:
        """Number of the last sparse stage with a saved state: nothing of those before is needed."""
        numbered = enumerate(stage.sparse and stage.name for stage in self.stages())
        begun = (n for n, name in numbered if name and holds_step(self.paths.checkpoints(name)))
        return max(begun, default=0)

    def _teacher(self, params: Any) -> Any:
        """The dense model's parameters, in expert order: the start's, if they still are that."""
        if not training_step.starts_dense(self.experiment.lte):
            order_NEM = hf.load_expert_order(self.paths.experts)
            params = permute(self._load(self.paths.dense)[1], order_NEM)
        return training_step.teacher_of(params, self.experiment.compute)

    def report(self, anew: bool = False) -> tuple[Transformer, Any]:
        """Evaluates the result, by default next to the dense model, in process 0; others wait.

        Returns:
          The last model and, in process 0, its parameters.
        """
        found: list[tuple[Transformer, Any]] = []
        on_first(lambda: found.append(self._report(anew)))
        return found[0] if found else (self._model(*hf.read_config(self.last)), None)

    def _report(self, anew: bool) -> tuple[Transformer, Any]:
        """Evaluates the result, if requested and not done.

        Writes table.md, figures and, last, results.json. If results.json exists, missing files are
        made from it.

        Returns:
          The last model and its parameters.
        """
        root, last = self.paths.root, self.last
        _verify(last)
        model, params = self._result(last)
        if not self.experiment.report:
            return model, params
        results = None if anew else report.read_again(root / "results.json")
        figures = importlib.util.find_spec("matplotlib") is not None
        if results is not None and not report.absent([results], root, figures):
            return model, params
        if results is None:
            work.check_inputs(self.paths, self.parts.inputs)
            _verify(self.paths.dense)
            alone = last == self.paths.dense or not self.experiment.report_dense
            baseline = None if alone else self._result(self.paths.dense)
            results = self._measure(model, params, baseline)
        written = report.write([results], root, figures)
        measured = f"Measured on {report.extent(results)}."
        print("", report.table([results]), measured, report.samples([results]), sep="\n")
        report.say_written(written)
        if not figures:
            print("no figures: pip install 'lte-jax[plot]', then python -m lte_jax.report")
        return model, params

    def _measure(self, model: Transformer, params: Any, baseline: Any) -> dict[str, Any]:
        results = evaluation.evaluate(
            model,
            params,
            self.parts.records[1],
            baseline=baseline,
            tokenizer=self.parts.tokenizer,
            batch_size=self.experiment.data.batch_size,
            task=self.parts.task,
            prompt=self.experiment.sample_prompt,
            sample_tokens=self.experiment.sample_tokens if model.config.head == "lm" else 0,
            sample_temperature=self.experiment.sample_temperature,
            latency_rounds=self.experiment.latency_rounds,
        )
        source = {"model": self.experiment.source.path, "data": self.experiment.data.validation}
        return results | {"environment": report.environment(), "source": source}

    def stages(self) -> tuple[stages.Stage, ...]:
        """The stages this experiment runs."""
        return stages.make(self.experiment.stages, self.experiment.lte)

    def _fit(self, model, stage, params, control, teacher, base) -> trainer.Trained:
        before = itertools.takewhile(lambda other: other.name != stage.name, self.stages())
        finished = [] if self.experiment.checkpoint.keep_finished else before
        return trainer.fit(
            model,
            stage,
            params,
            control,
            self.parts.records,
            self.experiment,
            self.paths.checkpoints(stage.name),
            self.writer,
            mesh=self.mesh,
            teacher=teacher,
            base=base,
            replaces=[self.paths.checkpoints(other.name) for other in finished],
            profile=self.paths.root / "profile" / stage.name if self.profile else None,
        )

    def _model(self, config, lte) -> Transformer:
        return training_step.trained_model(config, lte, self.experiment.compute, self.mesh.size)

    def _load(self, folder: Path) -> tuple[Transformer, Any]:
        """A model to train, in float32 but for what adapters freeze, directly on the mesh."""
        model = self._model(*hf.read_config(folder))
        shardings = sharding.param_shardings(abstract_params(model), self.mesh)
        types = lora.dtypes(model.config, model.lte, self.experiment)
        return model, hf.load_params(folder, model.config, model.lte, types, shardings)

    def _result(self, folder: Path) -> tuple[Transformer, Any]:
        """Loads a model from its folder, for evaluation."""
        config, lte = hf.read_config(folder)
        model = Transformer(config, lte, dtype=self.experiment.compute.dtype)
        return model, hf.load_params(folder, config, lte, model.dtype)

    def _save(self, folder: Path, model: Transformer, params: Any, source, order_NEM=None) -> None:
        own = source is None or self.experiment.source.tokenizer
        words = self.parts.tokenizer if own else None
        dtype = model.config.dtype if source is None else "source"  # params are float32 masters
        config, lte = model.config, model.lte
        hf.save(folder, config, lte, params, source, order_NEM, dtype=dtype, tokenizer=words)
        processes.wait(f"saved {folder.name}")
        interrupt.check(f"after {folder.name}/ was written")


@contextlib.contextmanager
def _alone(paths: Paths) -> Iterator[None]:
    """Defers signals to a safe point, and keeps other runs out of the directory."""
    one_process = jax.process_count() == 1  # with several, JAX handles the signals
    with contextlib.ExitStack() as stack:
        saved = "progress is saved; run the same command to resume"
        stack.enter_context(interrupt.handled(saved, install=one_process))
        stack.enter_context(quiet_threads())
        on_first(lambda: stack.enter_context(work.held(paths.root)))
        yield


def _verify(folder: Path) -> None:
    """Raises unless a folder of this run is unchanged since the run wrote it."""
    hf.verify(folder, digests=True, mend="remove it; the same command makes it again")
