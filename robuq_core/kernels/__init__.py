"""One op set, several backends with one signature; ``reference`` (torch) is the law."""
