# SPDX-License-Identifier: MIT
"""What is measured, for the Python side: the same shapes as support/data.hpp and bench_learn.cpp."""

import re
from typing import NamedTuple


class Shape(NamedTuple):
    depths: int
    codewords: int
    dim: int

    def label(self, rows: int, with_depths: bool = True) -> str:
        depths = f"depths:{self.depths}/" if with_depths else ""
        return f"{depths}codewords:{self.codewords}/dim:{self.dim}/rows:{rows}"

    @property
    def file(self) -> str:
        return f"codebook_{self.depths}x{self.codewords}x{self.dim}.npy"


PAPER = Shape(8, 2048, 32)
LIGHT = Shape(10, 256, 32)
SMALL = (Shape(3, 256, 8), Shape(3, 128, 8), Shape(4, 64, 8), Shape(5, 16, 8), Shape(3, 16, 4))

KMEANS_ROWS, KMEANS_ITERATIONS = 32768, 5
EMA_ROWS = 4096
"""What the dense kernel reads for a token: keys and values of 8 heads of 128 channels, 2 bytes each."""
DENSE_BYTES = 2 * 8 * 128 * 2
CONTEXTS = (4096, 32768, 131072)
SHORT_APPEND, LONG_APPEND = "tokens:1024", "tokens:32768"
"""Codebooks taken in turn, so that none stays in the caches near the core."""
COPIES = 4


def sizes_of(label: str) -> dict[str, int]:
    """The numbers in a label: {"codewords": 2048, "dim": 32, "rows": 64}."""
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)\b", label)}
