"""What serving costs: every figure a ratio or a difference within one run, every figure with a check.

python -m bench.serving                                  # all of it
python -m bench.serving overhead ceiling --quick         # some of it, small
"""
