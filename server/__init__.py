"""The HTTP server: ``app`` (routes), ``pool`` and ``fleet`` (requests, workers), ``worker`` (one process per model)."""

from robuq_core.threads import sleep_between_regions

sleep_between_regions()
