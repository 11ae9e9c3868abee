"""Which rows run in the next step. Pure Python: knows neither torch, nor threads, nor HTTP."""

from server.scheduler.continuous import ContinuousScheduler
from server.scheduler.interface import MAX_PRIORITY, Demand, QueueFull, RowKey, Scheduler
from server.scheduler.step_time import StepTimeCurve
from server.scheduler.window import WindowScheduler

__all__ = [
    "MAX_PRIORITY",
    "ContinuousScheduler",
    "Demand",
    "QueueFull",
    "RowKey",
    "Scheduler",
    "StepTimeCurve",
    "WindowScheduler",
]
