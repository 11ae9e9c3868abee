"""Dialects of other servers: their JSON to a request, the result to their JSON. Nothing is generated or queued here."""
