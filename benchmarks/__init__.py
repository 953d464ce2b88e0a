"""Timings against the competitors: `absgd-fast bench`, or `pytest benchmarks`.

cases.py has the cases that are timed, peers.py the competitors, one_case.py the procedure, and run.py the command. Compare
timings only within one run: two runs meet different clock rates and different loads of the machine.
"""

from time import perf_counter

BEGUN = perf_counter()  # before torch is imported, which may take half a minute
