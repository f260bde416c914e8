"""Faults where users' files and habits are met.

Each was there once and came to light on real or hostile files. The numbers and letters that begin
the names are those of the list in which they were filed.
"""

import clear_lines
import front_door
import hostile_files
import lost_runs
import quietly_worse
import stops
import strange_folders
import wrong_numbers

MUTANTS = [
    *wrong_numbers.MUTANTS,
    *lost_runs.MUTANTS,
    *quietly_worse.MUTANTS,
    *stops.MUTANTS,
    *hostile_files.MUTANTS,
    *strange_folders.MUTANTS,
    *clear_lines.MUTANTS,
    *front_door.MUTANTS,
]
