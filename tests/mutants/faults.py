"""Faults where users' files and habits are met."""

from mutant import Mutant

MUTANTS: list[Mutant] = []
