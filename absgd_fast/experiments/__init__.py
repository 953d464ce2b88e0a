"""Experiments on real data with imbalanced classes or wrong labels: train, compare methods over seeds, report.

`data` makes the splits (with `noise`, `idx`, `cifar`, `folder`), `images` hands their batches out, and `models` has the networks.
`spec` reads what a method is, `criteria` has the losses, `methods` the training methods, and `train` runs them seed by seed.
`checkpoint` saves the state of a training, `recording` its series. `report` writes the report; `summary` computes its numbers,
`words` its sentences, and `plots` its plots, whose look is in `style`. `recipes` has the tables of the papers, and `merged` the
report of several trainings. The usual way in is the command line's `train`; scripts may call the functions.

This package needs the extras of `pip install "absgd_fast[experiments]"` (scikit-learn, matplotlib, jinja2, rich, Pillow; tomli
before Python 3.11). No other part of absgd_fast imports it.
"""
