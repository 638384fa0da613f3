"""A sweep: one model, pruned by several methods with several patterns and seeds, each measured the same way.

    OUT/compare.json             what the sweep measures, and how: the same for all of its cells
    OUT/cells/dense/run.json     the dense model's measurements
    OUT/cells/NAME/              one cell: run.json, layers.jsonl, recipe.yaml, and model/ where asked for
    OUT/results.csv .md .json    all cells so far

The model is loaded once; before every cell its blocks get their dense weights back, bit for bit. All cells
of a seed are calibrated on the same windows. A cell appears whole or not at all, so a sweep that was killed
goes on with what is missing, and several processes may work in one folder (folder.py).

plan_sweep(options, folder)  -->  Plan  --run_sweep-->  cells, results
"""
