"""What is finished of a long computation, kept in a folder: a killed one goes on from there."""

from __future__ import annotations

import dataclasses
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lte_jax.files import replacing_file


@dataclasses.dataclass(frozen=True)
class Kept:
    """Items 0, 1, ... of a computation, each a tree of arrays; without a folder none are kept.

    The folder is for one computation on one input. Who gives it removes it afterwards.
    """

    folder: Path | None = None
    name: str = "item"

    def of(self, name: str) -> Kept:
        """Other items in the same folder."""
        return dataclasses.replace(self, name=name)

    def read(self, like: Any) -> list[Any]:
        """The items that are there, up to the first that is missing, damaged or no tree `like`."""
        leaves, structure = jax.tree.flatten(like)
        found: list[Any] = []
        while self.folder is not None:
            try:
                with self._file(len(found)).open("rb") as raw, np.load(raw) as file:
                    arrays = list(file.values())
            except (OSError, ValueError, EOFError, zipfile.BadZipFile):
                break
            if [(x.shape, x.dtype) for x in arrays] != [(x.shape, x.dtype) for x in leaves]:
                break
            found.append(jax.tree.unflatten(structure, arrays))
        return found

    def write(self, number: int, tree: Any) -> None:
        """Keeps an item.

        Raises:
          UserError: if it cannot be written.
        """
        if self.folder is None:
            return
        self.folder.mkdir(exist_ok=True)
        with replacing_file(self._file(number)) as half, half.open("wb") as file:
            np.savez(file, *map(np.asarray, jax.tree.leaves(tree)))

    def _file(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{self.name}-{number}.npz"


NOWHERE = Kept()
