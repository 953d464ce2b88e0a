"""Schedules of lambda, class weights and class vectors (docs/MATH.md §2.5).

Each schedule has the interface of torch's learning-rate schedulers, so it can stand among them in a framework's list. The
state_dict of the criterion or loss that it drives has its count too. So a checkpoint of the model and its criterion resumes it,
without one of the schedule.
"""

from __future__ import annotations

from .chained import ChainedSchedules, Schedule, vs_tla_adrw
from .counted import CountedSchedule, LossSchedule
from .lam import LamSchedule
from .loss import DRW, TLA
from .ramp import Ramp
from .two_stage import TwoStage

__all__ = [
    "DRW",
    "TLA",
    "ChainedSchedules",
    "CountedSchedule",
    "LamSchedule",
    "LossSchedule",
    "Ramp",
    "Schedule",
    "TwoStage",
    "vs_tla_adrw",
]
