#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Peak memory of `rvqkv train` on 100,000 vectors, as a multiple of those vectors and the codebooks in float32."""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np

TOKENS, HEADS, HEAD_DIM, GROUP_DIM, DEPTHS, CODEWORDS = 12500, 4, 64, 32, 8, 2048


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    header, offset = {}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F16", "shape": tensor.shape, "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.tobytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--program", required=True, help="the rvqkv program")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tensors = Path(folder) / "tensors.safetensors"
        random = np.random.default_rng(5)
        shape = (TOKENS, HEADS, HEAD_DIM)
        keys, values = (random.standard_normal(shape, dtype=np.float32).astype(np.float16) for _ in range(2))
        write_safetensors(tensors, {"layers.0.key": keys, "layers.0.value": values})
        # Not os.wait4 on a child of ours: a forked child starts with this interpreter's own peak.
        measured = Path(folder) / "peak"
        subprocess.run(
            ["/usr/bin/time", "-f", "%M", "-o", measured, arguments.program, "train", tensors]
            + ["-o", Path(folder) / "out.codecs", "--tokens", f"0:{TOKENS}", "--group-dim", str(GROUP_DIM)]
            + ["--depths", str(DEPTHS), "--codewords", str(CODEWORDS), "--threads", "1"]
            + ["--kmeans-iterations", "2", "--ema-steps", "2"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        peak = int(measured.read_text(encoding="utf-8")) * 1024
    # Keys and values are trained one after the other: the data is one side's.
    vectors = TOKENS * HEADS * HEAD_DIM * 4
    codebooks = 2 * DEPTHS * CODEWORDS * GROUP_DIM * 4
    label = f"vectors:{TOKENS * HEADS * HEAD_DIM // GROUP_DIM}/dim:{GROUP_DIM}/depths:{DEPTHS}/codewords:{CODEWORDS}"
    row = {"name": "train_memory", "shape": label, "level": "", "threads": 1, "unit": "x data and codebooks"}
    row |= {"value": peak / (vectors + codebooks), "rival": None, "compiler": "gcc", "pinned": False}
    print(json.dumps(row))


if __name__ == "__main__":
    main()
