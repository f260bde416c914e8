"""Sweeps: methods x sparsities x seeds from one grid, as runs, a table and figures.

    grid (config/grid.py) --expansion--> runs --running--> work directories --results--> table

expansion.py makes the grid's runs, folder.py knows what of them is done, processes.py is a run of
train.py as a process, running.py does what is left side by side, results.py measures nothing: it
gathers the runs' own reports. command.py is `python -m lte_jax.sweep`.

Of results.json, search.py reads which value of a key gives a sparsity, and page.py makes a section
of docs/results.md, with what the paper says (claims.py).
"""
