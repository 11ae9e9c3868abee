"""What serving costs: every figure a ratio or a difference within one run, every figure with a check.

python -m bench.serving                                  # all of it
python -m bench.serving overhead ceiling --quick         # some of it, small
"""

import os

# Before torch is loaded, here and in the servers, ours and others': OpenMP's threads sleep between parallel regions.
# When they spin, one busy neighbour on the same cores makes the bare model ten times slower, and a ratio to it a lie.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
