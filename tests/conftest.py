"""What all tests share: eight fake CPU devices, strict arithmetic, no network, the real models.

Tests run on the CPU wherever they are started, so that they neither need nor disturb an
accelerator. Those for one are asked for by name: JAX_PLATFORMS=cuda,cpu .venv/bin/pytest -k gpu
"""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads and the fork of a subprocess do not mix

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder of small real models and data beside the project; without it, a skip."""
    if not SHARED.is_dir():
        pytest.skip("needs the models and data of ../shared, which is not there")
    return SHARED
