#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Rivals that come as Python packages, on the vectors and codebooks of the C++ program, one thread. measure.py talks to
it: a line on stdin asks for one round, answered by one line of JSON; before the first, a line says what there is."""

import argparse
import gc
import importlib.metadata
import importlib.util
import itertools
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import faiss
import numpy as np

from shapes import COPIES, EMA_ROWS, KMEANS_ITERATIONS, KMEANS_ROWS, LIGHT, PAPER, SMALL, Shape

LONG, LONG_ROUNDS = 0.5, 3
"""Calls longer than so many seconds are made in so many rounds only."""


@dataclass
class Case:
    name: str
    shape: str
    rival: str
    amount: float
    """Work of one call, in `unit`."""
    unit: str
    call: Callable[[], object]

    @property
    def key(self) -> str:
        return f"{self.name}/rival:{self.rival}/{self.shape}"


class Data:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def held_out(self, dim: int, rows: int) -> np.ndarray:
        return np.load(self.folder / f"held_out_{dim}.npy")[:rows].copy()

    def training(self, dim: int, rows: int) -> np.ndarray:
        return np.load(self.folder / f"training_{dim}.npy")[:rows].copy()

    def books(self, shape: Shape) -> np.ndarray:
        return np.load(self.folder / shape.file)


SEARCHES = [(PAPER, 32), (PAPER, 1024), (LIGHT, 1024), *((shape, 1024) for shape in SMALL)]
ENCODES = [("encode_token", PAPER, 64), ("encode_batch", PAPER, 512)]
DECODES, DECODE_ROWS = (PAPER, LIGHT, *SMALL), 1024


def decode_label(shape: Shape) -> str:
    return "weights:float32/" + shape.label(DECODE_ROWS)


def decode_bytes(shape: Shape) -> float:
    return 4.0 * DECODE_ROWS * shape.dim


def check(what: str, ours: np.ndarray, theirs: np.ndarray, share: float = 0.99) -> None:
    """A rival that computes something else would be no rival."""
    same = float(np.mean(np.asarray(ours).reshape(-1) == np.asarray(theirs).reshape(-1)))
    if same < share:
        raise RuntimeError(f"{what}: only {100 * same:.1f} % of the codes are the nearest codewords")


def nearest(x: np.ndarray, book: np.ndarray) -> np.ndarray:
    x, book = x.astype(np.float64), book.astype(np.float64)
    return (x @ book.T - 0.5 * (book**2).sum(1)).argmax(1)


def greedy(x: np.ndarray, books: np.ndarray) -> np.ndarray:
    left, codes = x.copy(), []
    for book in books:
        codes.append(nearest(left, book))
        left -= book[codes[-1]]
    return np.stack(codes, 1)


def in_turn(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    order = itertools.cycle(calls)
    return lambda: next(order)()


# ---- faiss ----


def faiss_quantizer(books: np.ndarray, beam: int, lookup_tables: bool) -> faiss.ResidualQuantizer:
    depths, codewords, dim = books.shape
    quantizer = faiss.ResidualQuantizer(dim, depths, (codewords - 1).bit_length())
    faiss.copy_array_to_vector(np.ascontiguousarray(books).reshape(-1), quantizer.codebooks)
    quantizer.max_beam_size = beam
    quantizer.use_beam_LUT = int(lookup_tables)
    quantizer.is_trained = True
    if lookup_tables:
        quantizer.compute_codebook_tables()
    return quantizer


def faiss_codes(quantizer: faiss.ResidualQuantizer, x: np.ndarray) -> np.ndarray:
    packed = quantizer.compute_codes(x)
    bits = np.unpackbits(packed, axis=1, bitorder="little")
    width = quantizer.nbits.at(0)
    bits = bits[:, : quantizer.M * width].reshape(len(x), quantizer.M, width)
    return (bits.astype(np.int64) << np.arange(width)).sum(2)


@cache
def product_quantizer(data: Data) -> faiss.ProductQuantizer:
    """As many bits as the residual quantizer, an eighth of its work, and a larger error."""
    product = faiss.ProductQuantizer(PAPER.dim, PAPER.depths, 11)
    product.cp.niter, product.cp.min_points_per_centroid = 4, 1
    product.train(data.training(PAPER.dim, KMEANS_ROWS))
    return product


def errors(data: Data) -> dict[str, float]:
    """Error energy over energy of held-out vectors: what the methods that are timed are worth."""
    x, books = data.held_out(PAPER.dim, 1024), data.books(PAPER)
    quantizers = {
        "greedy": faiss_quantizer(books, 1, False),
        "beam 5": faiss_quantizer(books, 5, False),
        "product quantizer": product_quantizer(data),
    }
    return {
        name: float(np.sum((x - quantizer.decode(quantizer.compute_codes(x))) ** 2) / np.sum(x**2))
        for name, quantizer in quantizers.items()
    }


def faiss_cases(data: Data) -> list[Case]:
    cases = []
    default_threshold = faiss.cvar.distance_compute_blas_threshold

    def search(index: faiss.IndexFlatL2, x: np.ndarray, threshold: int) -> tuple[np.ndarray, np.ndarray]:
        faiss.cvar.distance_compute_blas_threshold = threshold
        return index.search(x, 1)

    for shape, rows in SEARCHES:
        book, x = data.books(shape)[0], data.held_out(shape.dim, rows)
        index = faiss.IndexFlatL2(shape.dim)
        index.add(book)
        # By default recent versions take a plain loop for small batches; a rival gets the better of both settings.
        for rival, threshold in (("faiss flat", default_threshold), ("faiss flat, BLAS", 1)):
            call = partial(search, index, x, threshold)
            check(rival, nearest(x, book), call()[1])
            flops = 2.0 * rows * shape.codewords * shape.dim
            cases.append(Case("search_f32", shape.label(rows, False), rival, flops, "flop/s", call))

    books = data.books(PAPER)
    greedy_quantizers = [faiss_quantizer(books, 1, False) for _ in range(COPIES)]
    product = product_quantizer(data)
    for name, shape, rows in ENCODES:
        x = data.held_out(shape.dim, rows)
        check("faiss RQ", greedy(x, books), faiss_codes(greedy_quantizers[0], x))
        calls = [partial(quantizer.compute_codes, x) for quantizer in greedy_quantizers]
        label = shape.label(rows)
        cases.append(Case(name, label, "faiss RQ beam 1", rows, "vectors/s", in_turn(calls)))
        cases.append(Case(name, label, "faiss PQ (other method)", rows, "vectors/s", partial(product.compute_codes, x)))
        for rival, tables in (("faiss RQ beam 5", False), ("faiss RQ beam 5, LUT", True)):
            call = partial(faiss_quantizer(books, 5, tables).compute_codes, x)
            cases.append(Case("encode_beam", label + "/beam:5", rival, rows, "vectors/s", call))

    for shape in DECODES:
        quantizer = faiss_quantizer(data.books(shape), 1, False)
        call = partial(quantizer.decode, quantizer.compute_codes(data.held_out(shape.dim, DECODE_ROWS)))
        cases.append(Case("decode", decode_label(shape), "faiss RQ", decode_bytes(shape), "B/s", call))

    x = data.training(PAPER.dim, KMEANS_ROWS)
    for codewords in (LIGHT.codewords, PAPER.codewords):

        def train(codewords: int, threshold: int) -> None:
            faiss.cvar.distance_compute_blas_threshold = threshold
            faiss.Kmeans(
                PAPER.dim,
                codewords,
                niter=KMEANS_ITERATIONS,
                seed=1,
                min_points_per_centroid=1,
                max_points_per_centroid=KMEANS_ROWS,
            ).train(x)

        label = Shape(1, codewords, PAPER.dim).label(KMEANS_ROWS, False)
        for rival, threshold in (("faiss k-means", default_threshold), ("faiss k-means, BLAS", 1)):
            work = KMEANS_ROWS * KMEANS_ITERATIONS
            cases.append(Case("train_kmeans", label, rival, work, "vectors/s", partial(train, codewords, threshold)))
    return cases


# ---- The paper's own k-means ----


def scipy_cases(data: Data) -> list[Case]:
    """The reference code calls scipy's kmeans2; one iteration of it, from given centroids."""
    from scipy.cluster.vq import kmeans2

    x = data.training(PAPER.dim, KMEANS_ROWS)
    cases = []
    for codewords in (LIGHT.codewords, PAPER.codewords):
        call = partial(kmeans2, x, x[:codewords], iter=1, minit="matrix")
        label = Shape(1, codewords, PAPER.dim).label(KMEANS_ROWS, False)
        cases.append(Case("train_kmeans", label, "scipy kmeans2 (the paper)", KMEANS_ROWS, "vectors/s", call))
    return cases


# ---- PyTorch ----


def torch_cases(data: Data) -> list[Case]:
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    cases = []

    def scorer(book: torch.Tensor, rows: int) -> Callable[[torch.Tensor], torch.Tensor]:
        offsets, transposed = -0.5 * book.pow(2).sum(1), book.T.contiguous()
        scores = torch.empty(rows, len(book))
        return lambda x: torch.addmm(offsets, x, transposed, out=scores).argmax(1)

    def by_distance(x: torch.Tensor, book: torch.Tensor) -> torch.Tensor:
        return torch.cdist(x, book).argmin(1)

    for shape, rows in SEARCHES:
        book, x = torch.from_numpy(data.books(shape)[0]), torch.from_numpy(data.held_out(shape.dim, rows))
        search = scorer(book, rows)
        flops, label = 2.0 * rows * shape.codewords * shape.dim, shape.label(rows, False)
        check("PyTorch addmm", nearest(x.numpy(), book.numpy()), search(x).numpy())
        cases.append(Case("search_f32", label, "PyTorch addmm", flops, "flop/s", partial(search, x)))
        call = partial(by_distance, x, book)
        cases.append(Case("search_f32", label, "PyTorch cdist", flops, "flop/s", call))

    books = data.books(PAPER)

    def encode(x: torch.Tensor, layer: torch.Tensor, searches: list) -> torch.Tensor:
        left, codes = x.clone(), []
        for book, search in zip(layer, searches):
            codes.append(search(left))
            left -= book[codes[-1]]
        return torch.stack(codes, 1)

    for name, shape, rows in ENCODES:
        x = torch.from_numpy(data.held_out(shape.dim, rows))
        layers = [torch.from_numpy(books.copy()) for _ in range(COPIES)]
        calls = [partial(encode, x, layer, [scorer(book, rows) for book in layer]) for layer in layers]
        check("PyTorch encode", greedy(x.numpy(), books), calls[0]().numpy())
        cases.append(Case(name, shape.label(rows), "PyTorch addmm", rows, "vectors/s", in_turn(calls)))

    for shape in DECODES:
        layer = data.books(shape)
        found = greedy(data.held_out(shape.dim, DECODE_ROWS), layer)
        codes = torch.from_numpy(found + np.arange(shape.depths) * shape.codewords)
        call = partial(F.embedding_bag, codes, torch.from_numpy(layer.reshape(-1, shape.dim)), mode="sum")
        cases.append(Case("decode", decode_label(shape), "PyTorch embedding_bag", decode_bytes(shape), "B/s", call))

    Step = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]

    def paper_step(x: torch.Tensor, book: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the reference code computes for one depth: all distances, then a one-hot matrix whose product with the
        vectors sums those of each codeword."""
        distances = x.pow(2).sum(1)[None] + book.pow(2).sum(1)[:, None] - 2 * (book @ x.T)
        codes = (-distances).argmax(0)
        chosen = F.one_hot(codes, len(book)).to(x.dtype)
        return codes, chosen.sum(0), chosen.T @ x

    def direct_step(x: torch.Tensor, book: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same by the quickest operations PyTorch has."""
        codes = torch.addmm(-0.5 * book.pow(2).sum(1), x, book.T).argmax(1)
        counts = torch.bincount(codes, minlength=len(book)).to(x.dtype)
        return codes, counts, torch.zeros_like(book).index_add_(0, codes, x)

    def kmeans_step(step: Step, x: torch.Tensor, book: torch.Tensor) -> torch.Tensor:
        _, counts, sums = step(x, book)
        return sums.div_(counts.clamp(min=1)[:, None])

    def ema_step(step: Step, x: torch.Tensor, state: list, decay: float = 0.99, epsilon: float = 1e-5) -> None:
        left = x.clone()
        for book, sizes, sums in state:
            codes, counts, totals = step(left, book)
            sizes.add_(counts, alpha=(1 - decay) / decay).mul_(decay)
            sums.add_(totals, alpha=(1 - decay) / decay).mul_(decay)
            left -= F.embedding(codes, book)
            total = sizes.sum()
            smoothed = (sizes + epsilon) / (total + len(book) * epsilon) * total
            book.copy_((sums / smoothed[:, None]).clip(-100.0, 100.0))

    x = torch.from_numpy(data.training(PAPER.dim, KMEANS_ROWS))
    batch = torch.from_numpy(data.held_out(PAPER.dim, EMA_ROWS))
    for rival, step in (("PyTorch, the paper's operations", paper_step), ("PyTorch, quickest", direct_step)):
        for codewords in (LIGHT.codewords, PAPER.codewords):
            label = Shape(1, codewords, PAPER.dim).label(KMEANS_ROWS, False)
            call = partial(kmeans_step, step, x, x[:codewords].clone())
            cases.append(Case("train_kmeans", label, rival, KMEANS_ROWS, "vectors/s", call))
        state = [(book.clone(), torch.ones(len(book)), book.clone()) for book in torch.from_numpy(books)]
        train = partial(ema_step, step, batch, state)
        cases.append(Case("train_ema", PAPER.label(EMA_ROWS), rival, EMA_ROWS, "vectors/s", train))
    return cases


def vector_quantize_cases(data: Data) -> list[Case]:
    import torch
    from vector_quantize_pytorch import ResidualVQ, VectorQuantize

    rival = "vector-quantize-pytorch"
    cases = []
    for shape, rows in SEARCHES:
        book, x = data.books(shape)[0], data.held_out(shape.dim, rows)
        module = VectorQuantize(dim=shape.dim, codebook_size=shape.codewords).eval()
        module._codebook.embed.data.copy_(torch.from_numpy(book)[None])
        vectors = torch.from_numpy(x)[None]
        check(rival, nearest(x, book), module(vectors)[1].numpy())
        call = partial(module, vectors)
        flops = 2.0 * rows * shape.codewords * shape.dim
        cases.append(Case("search_f32", shape.label(rows, False), rival, flops, "flop/s", call))
    books = data.books(PAPER)
    module = ResidualVQ(dim=PAPER.dim, codebook_size=PAPER.codewords, num_quantizers=PAPER.depths).eval()
    for layer, book in zip(module.layers, books):
        layer._codebook.embed.data.copy_(torch.from_numpy(book)[None])
    for name, shape, rows in ENCODES:
        x = data.held_out(shape.dim, rows)
        vectors = torch.from_numpy(x)[None]
        check(rival, greedy(x, books), module(vectors)[1].numpy())
        cases.append(Case(name, shape.label(rows), rival, rows, "vectors/s", partial(module, vectors)))
    return cases


# ---- Attention on compressed keys and values ----

HEADS, QUERY_HEADS, CHANNELS, PORT_TOKENS = 8, 32, 128, 4096
PORT_ERROR = 0.25
"""Most error of a port at four bits, relative to attention over what it was given."""


def attention_data() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys and values `[token, head, channel]`, queries `[query head, channel]`."""
    random = np.random.default_rng(5)
    keys, values = random.standard_normal((2, PORT_TOKENS, HEADS, CHANNELS), np.float32)
    return keys, values, random.standard_normal((QUERY_HEADS, CHANNELS), np.float32)


def attend(keys: np.ndarray, values: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """What every port must give but for its error: `[query head, channel]`."""
    grouped = queries.reshape(HEADS, QUERY_HEADS // HEADS, CHANNELS)
    scores = grouped @ keys.transpose(1, 2, 0) / np.sqrt(np.float32(CHANNELS))
    weights = np.exp(scores - scores.max(2, keepdims=True))
    weights /= weights.sum(2, keepdims=True)
    return (weights @ values.transpose(1, 0, 2)).reshape(QUERY_HEADS, CHANNELS)


def port_case(rival: str, call: Callable[[], np.ndarray], expected: np.ndarray) -> Case:
    error = float(np.linalg.norm(call() - expected) / np.linalg.norm(expected))
    if not error < PORT_ERROR:
        raise RuntimeError(f"{rival}: differs from attention over the same keys and values by {100 * error:.0f} %")
    return Case("attention", f"tokens:{PORT_TOKENS}", rival, PORT_TOKENS, "tokens/s", call)


def turboquant_pro_cases(_: Data) -> list[Case]:
    """Attention on its codes in NumPy; it knows no grouped queries, so that it goes over the cache four times."""
    from turboquant_pro import TurboQuantKVCache

    keys, values, queries = attention_data()
    cache = TurboQuantKVCache(CHANNELS, HEADS, bits=4, use_gpu=False, seed=1)
    for key, value in zip(keys, values):
        cache.append(key, value)
    grouped = queries.reshape(HEADS, QUERY_HEADS // HEADS, CHANNELS)

    def call() -> np.ndarray:
        parts = [cache.fused_decode(np.ascontiguousarray(grouped[:, i])) for i in range(QUERY_HEADS // HEADS)]
        return np.stack(parts, 1).reshape(QUERY_HEADS, CHANNELS)

    return [port_case("turboquant-pro, 4 bits", call, attend(keys, values, queries))]


def pyturboquant_cases(_: Data) -> list[Case]:
    """It only compresses and restores, so all keys and values are restored first."""
    from pyturboquant_cpu import dequantize_mse, quantize_mse

    keys, values, queries = attention_data()
    coded_keys, coded_values = (quantize_mse(x, 4, seed=1) for x in (keys, values))

    def call() -> np.ndarray:
        restored_keys, restored_values = (dequantize_mse(x).astype(np.float32) for x in (coded_keys, coded_values))
        return attend(restored_keys, restored_values, queries)

    return [port_case("pyturboquant-cpu, 4 bits, restored first", call, attend(keys, values, queries))]


def measure(case: Case, seconds: float) -> float:
    """Amount of work a second of processor time, as Google Benchmark counts it, so that other programs on the machine
    cost neither side anything: one call to warm up, then as many as fit."""
    start = time.process_time()
    case.call()
    took = time.process_time() - start
    if took > LONG:
        return case.amount / took
    calls = max(1, int(seconds / max(took, 1e-6)))
    start = time.process_time()
    for _ in range(calls):
        case.call()
    return calls * case.amount / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that prepare.py filled")
    parser.add_argument("--seconds", type=float, default=0.05, help="for each rival and round")
    parser.add_argument("--without-torch", action="store_true")
    arguments = parser.parse_args()
    faiss.omp_set_num_threads(1)
    data = Data(arguments.data)
    cases: list[Case] = []
    failures: list[str] = []
    packages = ["numpy", "faiss-cpu", "scipy"]
    makers: list[Callable[[Data], list[Case]]] = [faiss_cases, scipy_cases]
    ports: dict[str, Callable[[Data], list[Case]]] = {
        "turboquant-pro": turboquant_pro_cases,
        "pyturboquant-cpu": pyturboquant_cases,
    }
    if not arguments.without_torch:
        packages += ["torch", "vector-quantize-pytorch"]
        makers += [torch_cases, vector_quantize_cases]
    missing = []
    for package, make in ports.items():
        if importlib.util.find_spec(package.replace("-", "_")) is None:
            missing.append(package)
        else:
            packages.append(package)
            makers.append(make)
    for make in makers:
        try:
            cases += make(data)
        except Exception as problem:  # noqa: BLE001 - a rival that cannot run costs its own rows only
            failures.append(f"{make.__name__.removesuffix('_cases')}: {type(problem).__name__}: {problem}")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    versions["faiss options"] = faiss.get_compile_options().strip()
    described = {
        case.key: {"name": case.name, "shape": case.shape, "rival": case.rival, "unit": case.unit} for case in cases
    }
    first = {
        "cases": described,
        "failures": failures,
        "missing": missing,
        "versions": versions,
        "errors": errors(data),
    }
    print(json.dumps(first), flush=True)
    rounds, long_calls = 0, set()
    for _ in sys.stdin:
        values = {}
        random.Random(rounds).shuffle(cases)
        gc.disable()
        for case in cases:
            if case.key in long_calls and rounds >= LONG_ROUNDS:
                continue
            rate = measure(case, arguments.seconds)
            values[case.key] = rate
            if case.amount / rate > LONG:
                long_calls.add(case.key)
        gc.enable()
        gc.collect()
        rounds += 1
        print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main()
