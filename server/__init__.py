"""The HTTP server: ``api`` (what a client sees), ``scheduler`` (which rows run next), ``engine`` (who runs them)."""

from robuq_core.openmp import sleep_between_regions

sleep_between_regions()
