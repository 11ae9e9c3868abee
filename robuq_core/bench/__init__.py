"""Speed and memory against peers: one run, one table, one JSON file.

A timing counts only if the result is right; sides are timed in turns; what cannot run here is listed with its reason.
``cases`` builds what is timed, ``peers`` holds the others, ``timing`` times, ``fresh`` measures fresh processes.
"""
