"""A killed run does not group layers again, nor start routers again; with the same result."""

import dataclasses
import functools
import shutil

import jax
import numpy as np
import pytest
import tiny

import lte_jax
from lte_jax import hf, moefication, processes, refit, router_init
from lte_jax.kept import Kept

LIKE = {"a": jax.ShapeDtypeStruct((2,), np.float32), "b": jax.ShapeDtypeStruct((), np.int32)}


def item(number):
    return {"a": np.full(2, number, np.float32), "b": np.int32(number)}


def test_items_are_read_up_to_the_first_that_is_missing_or_damaged(tmp_path):
    kept = Kept(tmp_path / "here", "order")
    assert kept.read(LIKE) == []
    for number in (0, 1, 2, 4):
        kept.write(number, item(number))
    found = kept.read(LIKE)
    assert [x["b"] for x in found] == [0, 1, 2] and found[1]["a"].tolist() == [1, 1]
    assert kept.of("other").read(LIKE) == []
    file = tmp_path / "here/order-1.npz"
    file.write_bytes(file.read_bytes()[:-30])
    assert len(kept.read(LIKE)) == 1
    kept.write(0, {"a": np.zeros(3, np.float32), "b": np.int32(0)})
    assert kept.read(LIKE) == []


def test_without_a_folder_nothing_is_kept():
    Kept().write(0, item(0))
    assert Kept().read(LIKE) == []


def test_work_goes_on_from_what_is_kept(tmp_path):
    kept, made = Kept(tmp_path / "here"), []

    def work(number):
        made.append(number)
        if made == [0, 1, 2]:
            raise KeyboardInterrupt
        return item(number)

    spread = functools.partial(processes.spread, lambda start: range(start, 4), work, LIKE, kept)
    with pytest.raises(KeyboardInterrupt):
        spread()
    assert [x["b"] for x in spread()] == [0, 1, 2, 3] and made == [0, 1, 2, 2, 3]
    once = functools.partial(processes.once, lambda: work(7), LIKE, kept.of("once"))
    assert once()["b"] == once()["b"] == 7 and made[5:] == [7]


def test_layers_of_another_dense_model_are_not_kept(tmp_path, monkeypatch):
    experiment, grouped = tiny.experiment(tmp_path, report=False), []
    group = moefication._group  # noqa: SLF001

    def killed(*args):
        grouped.append(args)
        if len(grouped) == 2:
            raise KeyboardInterrupt
        return group(*args)

    monkeypatch.setattr(moefication, "_group", killed)
    with pytest.raises(KeyboardInterrupt):
        lte_jax.train(experiment, tmp_path / "run")
    assert (tmp_path / "run/experts.begun").exists()
    shutil.rmtree(tmp_path / "run/dense")
    lte_jax.train(experiment, tmp_path / "run")
    assert len(grouped) == 2 + tiny.CONFIG.num_layers


# What is called for a layer, or for the routers of all; and how often before the run is killed.
@pytest.mark.parametrize(
    ("module", "name", "calls"),
    [(moefication, "_group", 1), (router_init, "ridge_router", 0), (refit, "_solved", 1)],
)
def test_a_run_killed_while_it_makes_experts_goes_on(tmp_path, monkeypatch, module, name, calls):
    experiment = tiny.experiment(tmp_path, report=False)
    lte = dataclasses.replace(experiment.lte, refit=True)
    experiment = dataclasses.replace(experiment, lte=lte)
    lte_jax.train(experiment, tmp_path / "whole")
    own, seen = getattr(module, name), []

    def killed(*args):
        seen.append(args)
        if len(seen) == calls + 1:
            raise KeyboardInterrupt
        return own(*args)

    monkeypatch.setattr(module, name, killed)
    with pytest.raises(KeyboardInterrupt):
        lte_jax.train(experiment, tmp_path / "run")
    begun = tmp_path / "run/experts.begun"
    assert begun.exists() == (name != "_group" or calls > 0)
    before = len(seen)
    lte_jax.train(experiment, tmp_path / "run")
    layers = 1 if name == "ridge_router" else tiny.CONFIG.num_layers
    assert len(seen) - before == layers - calls and not begun.exists()
    for folder in ("experts", "lte"):
        one, other = (lte_jax.load(tmp_path / run / folder)[1] for run in ("whole", "run"))
        jax.tree.map(np.testing.assert_array_equal, one, other)
    orders = (hf.load_expert_order(tmp_path / run / "experts") for run in ("whole", "run"))
    np.testing.assert_array_equal(*orders)
