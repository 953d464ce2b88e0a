"""Real data with imbalanced classes or wrong labels: train on it, compare methods over seeds, report.

`data` makes the splits, `models` the networks, `train` runs the methods seed by seed, `checkpoint` keeps what they have come
to, `report` tells what came out (its numbers are made in `summary`, its sentences in `words`, its plots in `plots` and `style`).
The command line's `train` is the usual way in; the functions serve scripts as well.

Needs what `pip install "absgd_fast[experiments]"` adds (scikit-learn, matplotlib, jinja2, rich). Nothing else in the
package imports this part.
"""
