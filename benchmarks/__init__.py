"""Timings against the competitors: `absgd-fast bench`, or `pytest benchmarks`.

cases.py has the cases that are timed, peers.py the competitors, and run.py the procedure. Compare timings only within one run:
two runs meet different clock rates and different loads of the machine.
"""

from time import perf_counter

BEGUN = perf_counter()  # before torch is imported, which may take half a minute
