"""Timings against what else there is: `absgd-fast bench`, or `pytest benchmarks`.

cases.py says what is timed, peers.py who takes part, run.py how it is done. Timings compare only within one run: two
runs meet another clock rate and other neighbours on the machine.
"""

from time import perf_counter

BEGUN = perf_counter()  # before torch is imported, which may take half a minute
