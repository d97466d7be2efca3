#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Makes what all benchmarks compute on, as .npy files: vectors of a real model's keys (scaled and grouped as the paper
does), split in training and held-out ones, and residual codebooks trained on the former by faiss's k-means."""

import argparse
import json
import sys
from pathlib import Path

import faiss
import numpy as np

from shapes import LIGHT, PAPER, SMALL, Shape

DIMS = sorted({shape.dim for shape in (PAPER, LIGHT, *SMALL)})
MOST_VECTORS = 65536


def read_keys(path: Path) -> list[np.ndarray]:
    """Every `layers.N.key` of a safetensors file, float32 `[token, head, channel]`."""
    raw = path.read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:begin])
    keys = []
    for name in sorted(header):
        if name.endswith(".key"):
            first, last = header[name]["data_offsets"]
            array = np.frombuffer(raw[begin + first : begin + last], np.dtype("<f2"))
            keys.append(array.reshape(header[name]["shape"]).astype(np.float32))
    return keys


def group(keys: np.ndarray, dim: int) -> np.ndarray:
    """`[token, head, channel]` to vectors `[n, dim]`: divided by their standard deviation, strided groups."""
    scaled = keys / keys.std(axis=-1, ddof=1, keepdims=True)
    tokens, heads, channels = keys.shape
    return scaled.reshape(tokens, heads, dim, channels // dim).swapaxes(2, 3).reshape(-1, dim)


def train(x: np.ndarray, shape: Shape) -> np.ndarray:
    residual = x.copy()
    books = []
    for _ in range(shape.depths):
        kmeans = faiss.Kmeans(
            shape.dim, shape.codewords, niter=10, seed=1, min_points_per_centroid=1, max_points_per_centroid=len(x)
        )
        kmeans.train(residual)
        books.append(kmeans.centroids)
        residual -= kmeans.centroids[kmeans.index.search(residual, 1)[1][:, 0]]
    return np.stack(books)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=Path, required=True, help="safetensors file with layers.N.key")
    parser.add_argument("--out", type=Path, required=True, help="folder for the .npy files")
    arguments = parser.parse_args()
    files = [f"{part}_{dim}.npy" for part in ("held_out", "training") for dim in DIMS]
    files += [shape.file for shape in (PAPER, LIGHT, *SMALL)]
    if all((arguments.out / file).exists() for file in files):
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    faiss.omp_set_num_threads(max(1, faiss.omp_get_max_threads()))
    faiss.cvar.distance_compute_blas_threshold = 1
    keys = read_keys(arguments.sample)
    if not keys:
        sys.exit(f"prepare.py: {arguments.sample} holds no layers.N.key")
    random = np.random.default_rng(1)
    for dim in DIMS:
        split = [len(tensor) * 4 // 5 for tensor in keys]
        for part, cut in (
            ("held_out", [tensor[at:] for tensor, at in zip(keys, split)]),
            ("training", [tensor[:at] for tensor, at in zip(keys, split)]),
        ):
            vectors = np.concatenate([group(tensor, dim) for tensor in cut])
            vectors = vectors[random.permutation(len(vectors))[:MOST_VECTORS]]
            np.save(arguments.out / f"{part}_{dim}.npy", np.ascontiguousarray(vectors, np.float32))
    for shape in (PAPER, LIGHT, *SMALL):
        np.save(arguments.out / shape.file, train(np.load(arguments.out / f"training_{shape.dim}.npy"), shape))


if __name__ == "__main__":
    main()
