#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Times rivals that come as Python packages, on the shapes of bench_learn.cpp, one thread, medians."""

import argparse
import json
import statistics
import time

import faiss
import numpy as np

ROWS, DIM, ITERATIONS = 50000, 32, 5


def timed(function, rounds):
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    faiss.omp_set_num_threads(1)
    x = np.random.default_rng(3).standard_normal((ROWS, DIM), dtype=np.float32)
    rows = []
    # By default recent versions of faiss take a slow loop for small batches; rivals get the best of both settings.
    for name, threshold in (("faiss", None), ("faiss-blas", 1)):
        if threshold is not None:
            faiss.cvar.distance_compute_blas_threshold = threshold
        for codewords in (256, 2048):

            def train():
                kmeans = faiss.Kmeans(DIM, codewords, niter=ITERATIONS, seed=1, max_points_per_centroid=ROWS)
                kmeans.train(x)

            rates = sorted(ROWS * ITERATIONS / s for s in timed(train, arguments.rounds))
            rows.append({
                "name": "train_kmeans",
                "rival": name,
                "shape": f"codewords:{codewords}/dim:{DIM}/rows:{ROWS}",
                "value": statistics.median(rates),
                "spread": (rates[-1] - rates[0]) / statistics.median(rates),
                "rounds": arguments.rounds,
                "unit": "vectors/s",
                "version": faiss.__version__,
            })
    with open(arguments.out, "w", encoding="utf-8") as file:
        json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
