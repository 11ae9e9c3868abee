"""What serving costs: every figure a ratio or a difference within one run, every figure with a check.

python -m bench.serving                                  # all of it
python -m bench.serving overhead ceiling --quick         # some of it, small
"""

from robuq_core.threads import sleep_between_regions

# Here and in the servers, ours and others'. When OpenMP's threads spin, one busy neighbour on the same cores makes the
# bare model ten times slower, and a ratio to it a lie.
sleep_between_regions()
