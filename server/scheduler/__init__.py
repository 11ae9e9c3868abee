"""Which rows run in the next step. Pure Python: knows neither torch, nor threads, nor HTTP."""

from server.scheduler.first_come import FirstComeScheduler, QueueFull, RowKey

__all__ = ["FirstComeScheduler", "QueueFull", "RowKey"]
