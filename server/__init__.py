"""The HTTP server: ``app`` (routes), ``pool`` and ``fleet`` (requests and workers), ``worker`` (a process with a model)."""

from robuq_core.openmp import sleep_between_regions

sleep_between_regions()
