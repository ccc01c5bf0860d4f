"""How often the intervals of a fit hold the truth, on ladders made from a known law.

python -m tests.scaling.coverage
"""

import argparse

import numpy as np

from llada_megatron.scaling.fit import fit
from llada_megatron.scaling.laws import CHINCHILLA
from tests.scaling.ladder import KNOWN, chinchilla, grid, scattered

SCATTER = 0.004
LARGER = {"N": np.array([4e9]), "D": np.array([8e10])}


def coverage(width, ladders, draws):
    """Of how many ladders of width x width runs intervals hold a parameter, and a larger run's loss."""
    columns = grid(N=np.geomspace(1e7, 1e9, width), D=np.geomspace(2e8, 2e10, width))
    held = {name: 0 for name in [*KNOWN, "larger run"]}
    for seed in range(ladders):
        found = fit(CHINCHILLA, columns, scattered(chinchilla(**columns), SCATTER, seed), draws=draws)
        intervals = found.intervals() | {"larger run": found.run_intervals(LARGER)[0]}
        truth = KNOWN | {"larger run": scattered(chinchilla(**LARGER), SCATTER, seed + ladders)[0]}
        for name, (low, high) in intervals.items():
            held[name] += low <= truth[name] <= high
    return {name: count / ladders for name, count in held.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ladders", type=int, default=40)
    parser.add_argument("--draws", type=int, default=100)
    args = parser.parse_args()
    for width in (3, 4):
        print(f"{width} x {width}", coverage(width, args.ladders, args.draws))
