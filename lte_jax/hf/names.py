"""The table that maps our parameters to the tensors of an HF checkpoint and back.

A row joins a parameter (params.py) with the tensor's name and layout in its family (families/).
Import, export, expected shapes and error messages all derive from it, so no tensor can be read one
way and written another.

Dimension key: D model width  E experts  M neurons per expert  F = E*M  N layers  H heads
               K kv heads  C head width  V vocabulary  R hidden units of a router
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from lte_jax import params
from lte_jax.config import LTEConfig, ModelConfig
from lte_jax.hf import sentence
from lte_jax.hf.families import FAMILIES

# The dimensions of HF tensors, as config.json calls them.
_HF_DIMENSION = {
    "V": "vocab_size",
    "D": "hidden_size",
    "EM": "intermediate_size",
    "HC": "num_attention_heads*head_dim",
    "KC": "num_key_value_heads*head_dim",
    "C": "head_dim",
    "H3C": "3*num_attention_heads*head_dim",
    "K3C": "3*num_attention_heads*head_dim",
    "E": "intermediate_size/lte.expert_size",
    "P": "hidden_size",
    "S": "max_position_embeddings",
    "U": "type_vocab_size",
    "Y": "num_labels",
    "Z": "out_features",
    "R": "lte.router_rank",
}
_PARTS = 3  # of each head, where a layout has a digit: queries, keys and values


class Span(NamedTuple):
    """A range of one dimension."""

    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table; `{}` in the name is the layer, the letter N in `ours`."""

    path: str  # in our parameter tree
    ours: str  # a letter for each of our dimensions
    name: str  # of the HF tensor (of each layer)
    layout: str  # its dimensions, each a group of our letters: "EM D" is [E*M, D]. In a tensor that
    # holds several of our arrays, "D HC+[KC]+KC", one after another; the one in brackets is this.
    # Or each head holds several of them, "K1C D", of which the digit says which one this is.

    @property
    def hf(self) -> str:
        """The layout of our part alone."""
        return re.sub(r"\S*\[(\w+)\]\S*", r"\1", self.layout)

    def place(self, sizes: Mapping[str, int]) -> tuple[int, int]:
        """The axis of `to_hf` that our part shares with others, and where on it our part begins."""
        if self.digit:
            return self.hf.replace(" ", "").index(self.digit), int(self.digit)
        for axis, groups in enumerate(self.layout.split()):
            if "[" in groups:
                before = groups.split("[")[0].strip("+").split("+")
                return axis, sum(math.prod(sizes[c] for c in group) for group in before if group)
        return 0, 0

    @property
    def digit(self) -> str:
        """Which part of each head this is, or ""."""
        return next(filter(str.isdigit, self.layout), "")

    @property
    def layered(self) -> bool:
        """Whether our array stacks the tensors of all layers."""
        return self.ours.startswith("N")

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of our array."""
        return tuple(sizes[letter] for letter in self.ours)

    def hf_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of the HF tensor."""
        return tuple(
            sum(
                math.prod(_size(c, sizes) for c in group.strip("[]")) for group in groups.split("+")
            )
            for groups in self.layout.split()
        )

    def hf_names(self, sizes: Mapping[str, int]) -> list[str]:
        """The names of the tensors in our array: one per layer, or one."""
        return [self.name.format(i) for i in range(sizes["N"])] if self.layered else [self.name]

    def describe(self, sizes: Mapping[str, int]) -> str:
        """The HF shape with names: "[intermediate_size=172, hidden_size=64]"."""
        named = []
        for groups, size in zip(self.layout.split(), self.hf_shape(sizes), strict=True):
            each = (re.sub(r"\d", "3", group.strip("[]")) for group in groups.split("+"))
            terms = [_HF_DIMENSION[group] for group in each]
            named.append(f"{' + '.join(terms)}={size}")
        return f"[{', '.join(named)}]"

    def lead(self, group: str, sizes: Mapping[str, int]) -> str:
        """The dimension along which a part of an HF dimension is contiguous: the first above 1."""
        if any(map(str.isdigit, group)):
            return group[0]
        return next((letter for letter in group if sizes[letter] > 1), group[-1])

    def read(self, tensor, sizes: Mapping[str, int], cut: Mapping[str, Span]) -> np.ndarray:
        """The part `cut` of one HF tensor, in our order of dimensions (without N).

        `tensor` is anything that slices, such as a tensor on disk; only the rows and columns of
        the part are read.
        """
        ranges, shape, rest = [], [], []
        shared, begin = self.place(sizes)
        for axis, group in enumerate(self.hf.split()):
            lead = self.lead(group, sizes)
            inner = math.prod(_size(c, sizes) for c in group[group.index(lead) + 1 :])
            offset = begin if axis == shared and not self.digit else 0
            ranges.append(slice(offset + cut[lead].start * inner, offset + cut[lead].stop * inner))
            for c in group:  # the other dimensions are cut once they have been unfolded
                shape.append(cut[c].stop - cut[c].start if c == lead else _size(c, sizes))
                whole = slice(None) if c == lead else None
                rest.append(int(c) if c.isdigit() else whole or slice(*cut[c]))
        part = tensor[tuple(ranges)].reshape(shape)[tuple(rest)]
        letters = re.sub(r"[ \d]", "", self.hf)
        return part.transpose([letters.index(c) for c in self.ours.removeprefix("N")])

    def to_hf(self, array: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """Our part of the HF tensor, of one layer of our array (without N).

        Where each head has parts, the dimensions are not yet joined.
        """
        ours, groups = self.ours.removeprefix("N"), self.hf.split()
        order = [ours.index(c) for c in re.sub(r"[ \d]", "", self.hf)]
        if self.digit:
            groups = self.hf.replace(" ", "")
        shape = [math.prod(1 if c.isdigit() else sizes[c] for c in group) for group in groups]
        return array.transpose(order).reshape(shape)


def _size(c: str, sizes: Mapping[str, int]) -> int:
    return _PARTS if c.isdigit() else sizes[c]


def table(config: ModelConfig, lte: LTEConfig | None) -> tuple[Row, ...]:
    """All parameters of such a model, each once."""
    rows = params.table(config, lte)
    tensors = FAMILIES[config.family].names(config) | sentence.TENSORS
    linear = tensors["layers/ffn/router/kernel"][0].removesuffix("weight")

    def tensor(row: params.Row) -> tuple[str, str]:
        if row.path in tensors or not params.is_router(row.path):
            return tensors[row.path]
        # Parts of routers of other kinds are named as PyTorch would, beside the linear one's.
        part = row.path.removeprefix(params.ROUTER).replace("kernel", "weight").replace("/", ".")
        return linear + part, " ".join(reversed(row.letters.removeprefix("N")))

    return tuple(Row(row.path, row.letters, *tensor(row)) for row in rows)
