#!/usr/bin/env python
"""Times what is here against what one would use otherwise, side by side in one run.

    python scripts/benchmark.py attention --preset qisa-16
        every attention of the registry against the classical one, inside the same GPT, on the same batch
    python scripts/benchmark.py generate
        text token by token, with a key/value cache and without one
    python scripts/benchmark.py scaling
        the cost of a layer against width, length, heads and qubits, with fitted exponents beside those of theory
    python scripts/benchmark.py peers
        folded circuits against PennyLane's TorchLayer, and against the published algorithm gate by gate
    python scripts/benchmark.py devices
        circuits on devices against PennyLane's own TorchLayer, same device, method, circuit and inputs
    python scripts/benchmark.py grover
        the amplification layer against softmax attention, and sparse products against dense ones with the same matrix
    python scripts/benchmark.py page --output docs/benchmark.md
        a page made of what the others have written

Each prints a table and writes JSON and PNG. The contestants take turns, and what is told is the median over the rounds
of the ratio of their times in the same round, so that a machine whose speed drifts slows all alike. What is timed is
checked first: things that do not compute the same kind of result end the run with status 1.
"""

import sys

from lightning_modules.benchmarks.command import main

if __name__ == "__main__":
    sys.exit(main(description=__doc__))
