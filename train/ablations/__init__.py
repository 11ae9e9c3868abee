"""The paper's ablations on data that anyone can have: one command trains every row, measures it and writes the tables.

Rows are students of one full-precision teacher that differ in how they are quantised, and in nothing else.
"""
