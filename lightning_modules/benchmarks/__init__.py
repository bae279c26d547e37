"""What `scripts/benchmark.py` measures: one subject a file, each with its options and a check of what it times.

What is timed is what users call: models, layers and generation as they come out of the registries and the public
functions. Nothing here switches anything on.
"""
