"""Many rows from a JSONL file, through one engine, into a JSONL file that survives being killed.

rows       one line -> one checked row, and its request       source    the input file, checked as a whole
journal    the output file: locked, synced, repaired          manifest  what a run depends on besides its rows
run        rows in flight, errors, counts
"""
