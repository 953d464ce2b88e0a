"""Experiments on real data with imbalanced classes or wrong labels: train, compare methods over seeds, report.

`data` makes the splits and `models` the networks. `methods` has the training methods, and `train` runs them seed by seed.
`checkpoint` saves the state of a training. `report` writes the report; `summary` computes its numbers, `words` its sentences, and
`plots` its plots, whose look is in `style`. The usual way in is the command line's `train`; scripts may call the functions.

This package needs the extras of `pip install "absgd_fast[experiments]"` (scikit-learn, matplotlib, jinja2, rich). No other part
of absgd_fast imports it.
"""
