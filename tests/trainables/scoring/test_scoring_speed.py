"""All back ends from one pass: the cost is set by the matrix products, and these run once.

Bounds are ratios to products of the same size on the same machine at the same time, with a wide margin.
"""

import time

import numpy as np

from trainables.scoring import neighbours
from trainables.scoring.backends import backends, score_all


def make(num_bank, num_target, num_queries, width):
    rng = np.random.default_rng(0)
    bank = rng.normal(size=(num_bank, width)).astype(np.float32)
    return (
        bank,
        np.arange(num_bank) >= num_bank - num_target,
        rng.normal(size=(num_queries, width)).astype(np.float32),
    )


def least_time(call, repeat):
    found = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)


def test_big_products_run_once(monkeypatch):
    swept = []
    original = neighbours.Pairs._sweep
    monkeypatch.setattr(
        neighbours.Pairs, "_sweep", lambda self, *a: swept.append(len(self)) or original(self, *a)
    )
    score_all(*make(50, 6, 20, 32), num_bands=4)
    assert sorted(swept) == [20, 50]
    swept.clear()
    score_all(*make(50, 6, 20, 32), num_bands=4, names=["knn1"])
    assert swept == [20]  # the bank is not set against itself without need


def test_a_full_sized_bank_costs_a_few_products():
    bank, is_target, queries = make(1000, 10, 200, 2048)
    wide, wide_queries = bank.astype(np.float64), queries.astype(np.float64)

    def products():
        wide @ wide.T.copy()
        wide_queries @ wide.T

    ours = least_time(lambda: score_all(bank, is_target, queries, num_bands=8), 2)
    assert ours < 12 * least_time(products, 2)  # measured: 3.4


def test_a_cell_of_a_quick_study_costs_a_few_hundred_small_products():
    cell = make(54, 6, 68, 768)
    wide, wide_queries = cell[0].astype(np.float64), cell[2].astype(np.float64)

    def products():
        for _ in range(20):
            wide_queries @ wide.T

    reference = least_time(products, 5) / 20
    everything = least_time(lambda: score_all(*cell, num_bands=8), 10)
    objective = least_time(lambda: score_all(*cell, num_bands=8, names=["knn1_domain_z"]), 10)
    assert everything < 400 * reference  # measured: 30
    assert everything < 0.05  # measured: 0.0025 s
    assert objective < everything / 2  # measured: a fifth


def test_every_back_end_is_cheap_once_distances_exist():
    bank, is_target, queries = make(400, 10, 100, 64)
    costs = {}
    for name, backend in backends(8).items():
        held = neighbours.Bank(bank, is_target, num_bands=8)
        pairs = held.pairs(queries)
        pairs._products, held.loo._products  # noqa: B018
        costs[name] = least_time(lambda backend=backend, pairs=pairs: backend.rank(pairs), 1)
    assert max(costs.values()) < 1.0, costs  # measured: 0.02 s
