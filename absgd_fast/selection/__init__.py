"""Choosing lambda by held-out samples: `select`, its result `Selection`, and its candidates.

candidates.py (what is tried), split.py (what is held out), rule.py (what is stopped and what wins), run.py (one training),
contest.py (all of them), record.py (the scores on disk), progress.py, result.py, select.py.
"""

from .candidates import Candidate, default_candidates
from .result import Selection
from .select import select

__all__ = ["Candidate", "Selection", "default_candidates", "select"]
