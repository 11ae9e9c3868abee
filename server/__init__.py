"""The HTTP server: ``api`` (what a client sees), ``scheduler`` (which rows run next), ``engine`` (who runs them)."""
