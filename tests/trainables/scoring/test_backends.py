"""What every back end owes, run over all of them; and the registry."""

import re
import subprocess
import sys

import numpy as np
import pytest

from trainables.errors import UserError
from trainables.scoring.backends import DEFAULT, backends, prepare, score, score_all
from trainables.scoring.density import LocalDensity, VarianceMin
from trainables.scoring.domains import Backend, Fusion, Whole
from trainables.scoring.knn import Banded, Mixed, Nearest
from trainables.scoring.neighbours import COSINE, EUCLID
from trainables.settings import ScoringConfig

NUM_BANDS = 4
WIDTH = 32
NAMES = list(backends())
# Distances to single bank clips that vanish for a duplicate, without a statistic subtracted.
ZERO_FOR_DUPLICATES = [
    "knn1", "knn1_cosine", "memmixup", "ldn1_k4", "ldn1_k4_cosine", "ldn1_domain_min", "beam", "beam_cosine",
]  # fmt: skip
# Where a domain is standardised, 0 is no longer the least there is; within one domain it is.
LEAST_FOR_DUPLICATES = [
    "knn1_domain_z", "knn1_cosine_domain_z", "knn1_domain_z_shared", "knn1_domain_z_test",
    "memmixup_z", "memmixup_z_test", "beam_domain_z",
]  # fmt: skip


def make_bank(num_source=40, num_target=6, seed=0):
    rng = np.random.default_rng(seed)
    emb = rng.normal(size=(num_source + num_target, WIDTH)).astype(np.float32) + 2
    is_target = np.arange(len(emb)) >= num_source
    emb[is_target] += 1
    return emb, is_target


def make_queries(num=25, seed=1):
    return np.random.default_rng(seed).normal(size=(num, WIDTH)).astype(np.float32) + 2


@pytest.fixture(params=NAMES)
def backend(request):
    return backends(NUM_BANDS)[request.param]


def test_the_registry_names_what_it_holds():
    found = backends(NUM_BANDS)
    assert {name: b.name for name, b in found.items()} == {name: name for name in found}
    assert all(b.paper for b in found.values())
    assert len(found) >= 15
    assert {name for name, b in found.items() if b.transductive} == {"knn1_domain_z_test", "memmixup_z_test"}
    assert all(name.endswith("_test") == b.transductive for name, b in found.items())
    assert DEFAULT in found
    assert ScoringConfig().backend == DEFAULT
    assert backends(NUM_BANDS)[DEFAULT] is not found[DEFAULT]


def test_names_say_what_they_run():
    found = backends(NUM_BANDS)
    expected = {
        "knn1": Nearest(k=1, metric=EUCLID),
        "knn1_cosine": Nearest(k=1, metric=COSINE),
        "knn4": Nearest(k=4, metric=EUCLID),
        "knn4_cosine": Nearest(k=4, metric=COSINE),
        "knn4_domain_min": Nearest(k=4, metric=EUCLID),
        "knn1_domain_z": Nearest(k=1, metric=EUCLID),
        "memmixup": Mixed(share=0.9, num_sources=None),  # as published
        "ldn1_k4": LocalDensity(k=4, metric=EUCLID),
        "ldn1_k4_cosine": LocalDensity(k=4, metric=COSINE),
        "ldn1_k4_difference": LocalDensity(k=4, metric=EUCLID, difference=True),
        "ldn1_domain_min": LocalDensity(k=16, k_target=9, metric=EUCLID, summed=True),  # as published
        "varmin": VarianceMin(k=4, metric=EUCLID),
        "beam_cosine": Banded(metric=COSINE),
    }
    assert {name: found[name].distance for name in expected} == expected
    assert {name for name, b in found.items() if b.num_bands == NUM_BANDS} == {
        "beam", "beam_cosine", "beam_domain_z", "fusion_min_z",
    }  # fmt: skip
    assert [member.name for member in found["fusion_min_z"].members] == [
        "knn1",
        "knn1_cosine",
        "ldn1_k4",
        "beam",
    ]


def test_embeddings_have_one_band_unless_told():
    bank, is_target = make_bank()
    found = score_all(bank, is_target, make_queries(), names=["beam", "knn1"])
    np.testing.assert_allclose(found["beam"], found["knn1"], rtol=1e-12)
    assert prepare(bank, is_target).num_bands == 1


def test_scores_have_one_finite_number_per_query(backend):
    scores = backend.fit(*make_bank()).score(make_queries())
    assert scores.shape == (25,)
    assert scores.dtype == np.float64
    assert np.isfinite(scores).all()
    assert len(set(scores)) > 20


def test_fit_returns_the_back_end_and_a_later_fit_replaces_the_bank(backend):
    bank, is_target = make_bank()
    first = backend.fit(bank, is_target).score(make_queries())
    assert not np.allclose(backend.fit(*make_bank(seed=9)).score(make_queries()), first)
    np.testing.assert_array_equal(backend.fit(bank, is_target).score(make_queries()), first)


def test_scoring_before_a_bank_is_an_error(backend):
    with pytest.raises(ValueError, match=f"{backend.name}: fit a bank"):
        backend.score(make_queries())


def test_deterministic_and_inputs_untouched(backend):
    bank, is_target = make_bank()
    queries = make_queries()
    before = bank.copy(), is_target.copy(), queries.copy()
    first = backend.fit(bank, is_target).score(queries)
    np.testing.assert_array_equal(backend.fit(bank, is_target).score(queries), first)
    for now, then in zip((bank, is_target, queries), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_alone_and_together_give_the_same_scores(backend):
    bank, is_target = make_bank()
    alone = backend.fit(bank, is_target).score(make_queries())
    everything = score_all(bank, is_target, make_queries(), NUM_BANDS)
    np.testing.assert_allclose(everything[backend.name], alone, rtol=1e-9, atol=1e-9)
    some = score_all(bank, is_target, make_queries(), NUM_BANDS, names=[backend.name])
    assert list(some) == [backend.name]
    np.testing.assert_allclose(some[backend.name], alone, rtol=1e-9, atol=1e-9)


def test_order_of_queries_does_not_matter(backend):
    queries = make_queries()
    order = np.random.default_rng(5).permutation(len(queries))
    backend.fit(*make_bank())
    np.testing.assert_allclose(
        backend.score(queries[order]), backend.score(queries)[order], rtol=1e-7, atol=1e-9
    )


def test_only_transductive_scores_depend_on_the_other_queries(backend):
    queries = make_queries()
    backend.fit(*make_bank())
    alone = np.concatenate([backend.score(queries[i : i + 1]) for i in range(5)])
    together = backend.score(queries)[:5]
    assert np.allclose(alone, together, rtol=1e-7, atol=1e-9) != backend.transductive


def test_order_of_the_bank_does_not_matter(backend):
    bank, is_target = make_bank()
    order = np.random.default_rng(6).permutation(len(bank))
    expected = backend.fit(bank, is_target).score(make_queries())
    found = backend.fit(bank[order], is_target[order]).score(make_queries())
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-9)


def test_a_far_outlier_scores_above_every_inlier(backend):
    queries = make_queries()
    queries[3] = np.where(np.arange(WIDTH) % 2, 300.0, -300.0)  # far in distance and in direction
    scores = backend.fit(*make_bank()).score(queries)
    assert scores.argmax() == 3
    assert scores[3] > np.delete(scores, 3).max()


@pytest.mark.parametrize("name", ZERO_FOR_DUPLICATES)
def test_a_duplicate_of_a_bank_clip_is_least_anomalous(name):
    bank, is_target = make_bank()
    for duplicate in (0, 20, 45):  # 45 is a target clip
        queries = make_queries()
        queries[7] = bank[duplicate]
        scores = backends(NUM_BANDS)[name].fit(bank, is_target).score(queries)
        assert scores.argmin() == 7
        assert scores[7] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", LEAST_FOR_DUPLICATES)
def test_a_duplicate_is_least_anomalous_within_one_standardised_domain(name):
    bank, is_target = make_bank(num_target=0)
    queries = make_queries()
    queries[7] = bank[11]
    assert backends(NUM_BANDS)[name].fit(bank, is_target).score(queries).argmin() == 7


@pytest.mark.parametrize("constant", [0.0, 5.0, -1e4 / 3])
def test_finite_on_constant_data(backend, constant):
    bank = np.full((30, WIDTH), constant, dtype=np.float32)
    queries = np.full((4, WIDTH), constant, dtype=np.float32)
    for num_target in (0, 1, 6):
        scores = backend.fit(bank, np.arange(30) < num_target).score(queries)
        assert np.isfinite(scores).all()
        assert len(set(scores)) == 1
    queries[2] = np.where(np.arange(WIDTH) % 2, 7.0, -9.0)
    scores = backend.fit(bank, np.arange(30) < 6).score(queries)
    assert np.isfinite(scores).all()
    assert scores.argmax() == 2


def test_finite_where_every_clip_is_there_twice(backend):
    bank, is_target = make_bank()
    scores = backend.fit(np.concatenate([bank, bank]), np.tile(is_target, 2)).score(make_queries())
    assert np.isfinite(scores).all()


@pytest.mark.parametrize("is_target", [False, True])
def test_a_bank_of_one_domain(backend, is_target):
    bank, _ = make_bank(num_target=0)
    queries = make_queries()
    queries[3] = 300 * (-1.0) ** np.arange(WIDTH)
    scores = backend.fit(bank, np.full(len(bank), is_target)).score(queries)
    assert np.isfinite(scores).all()
    assert scores.argmax() == 3


@pytest.mark.parametrize("num_target", [1, 2, 3])
@pytest.mark.parametrize("num_source", [1, 2, 40])
def test_tiny_domains(backend, num_source, num_target):
    bank, is_target = make_bank(num_source, num_target)
    queries = make_queries()
    queries[3] = 300 * (-1.0) ** np.arange(WIDTH)
    for labels in (is_target, ~is_target):
        scores = backend.fit(bank, labels).score(queries)
        assert np.isfinite(scores).all()
        assert scores.argmax() == 3


def test_a_bank_of_one_clip(backend):
    bank, _ = make_bank(1, 0)
    queries = np.array([bank[0], bank[0] * np.where(np.arange(WIDTH) % 2, 1.1, 0.9)])
    scores = backend.fit(bank, [False]).score(queries)
    assert np.isfinite(scores).all()
    assert scores[0] < scores[1]


def test_a_few_target_clips_help_target_normals(backend):
    """What domains are for: what is near three target clips scores below what is near nothing."""
    bank, is_target = make_bank(60, 3)
    bank[is_target] = bank[:3] + 30 * np.where(np.arange(WIDTH) % 2, 1, -1)
    rng = np.random.default_rng(8)
    near_target = bank[is_target] + rng.normal(size=(3, WIDTH)) * 0.3
    near_nothing = bank[:3] - 15 * np.where(np.arange(WIDTH) % 2, 1, -1)
    rest = rng.normal(size=(20, WIDTH)) + 2  # so that statistics of the queries mean something
    scores = backend.fit(bank, is_target).score(np.concatenate([near_target, near_nothing, rest]))
    if backend.name == "mahalanobis":  # one mean for both domains: told apart by nothing but distance
        assert np.isfinite(scores).all()
    else:
        assert scores[:3].max() < scores[3:6].min()


BROKEN = {
    "a value that is not a number": (
        lambda b, q: (np.where(b == b[3, 2], np.nan, b), q),
        "bank row 3 of 46 is not",
    ),
    "an infinite query": (
        lambda b, q: (b, np.where(q == q[4, 1], np.inf, q)),
        "queries row 4 of 25 is not finite",
    ),
    "an empty bank": (lambda b, q: (b[:0], q), "bank is empty"),
    "no queries": (lambda b, q: (b, q[:0]), "queries is empty"),
    "another width": (lambda b, q: (b, q[:, :-4]), "queries have width 28, the bank 32"),
    "one query without its axis": (lambda b, q: (b, q[0]), "expected embeddings as clips x width"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_bad_embeddings_are_named(backend, broken):
    spoil, message = BROKEN[broken]
    bank, is_target = make_bank()
    bank, queries = spoil(bank, make_queries())
    with pytest.raises(UserError, match=re.escape(message)) as error:
        backend.fit(bank, is_target[: len(bank)]).score(queries)
    assert "\n" not in str(error.value)


def test_bad_labels_are_named(backend):
    bank, is_target = make_bank()
    with pytest.raises(UserError, match=re.escape("is_target of the bank of shape (45,)")):
        backend.fit(bank, is_target[1:])
    with pytest.raises(UserError, match="expected only 0 and 1"):
        backend.fit(bank, np.arange(len(bank)))


def test_one_bank_serves_several_sets_of_queries():
    bank, is_target = make_bank()
    prepared = prepare(bank, is_target, NUM_BANDS)
    for seed in (1, 2):
        expected = score_all(bank, is_target, make_queries(seed=seed), NUM_BANDS)
        found = score(prepared, make_queries(seed=seed))
        assert list(found) == list(expected) == NAMES
        for name in NAMES:
            np.testing.assert_array_equal(found[name], expected[name])


def test_a_bank_prepared_for_less_still_gives_true_scores():
    bank, is_target = make_bank()
    prepared = prepare(bank, is_target, NUM_BANDS, names=["knn1"])
    found = score(prepared, make_queries(), names=["beam", "knn1"])
    assert list(found) == ["beam", "knn1"]
    expected = score_all(bank, is_target, make_queries(), NUM_BANDS)
    np.testing.assert_allclose(found["beam"], expected["beam"], rtol=1e-12)


def test_unknown_names_are_refused():
    bank, is_target = make_bank()
    for call in (prepare, lambda *a, names: score_all(a[0], a[1], make_queries(), names=names)):
        with pytest.raises(UserError, match="back end 'knn1_domainz': did you mean 'knn1_domain_z'"):
            call(bank, is_target, names=["knn1_domainz"])
        with pytest.raises(UserError, match="no back end asked for"):
            call(bank, is_target, names=[])
    assert list(score_all(bank, is_target, make_queries(), names="knn1")) == ["knn1"]


def test_fusion_takes_the_least_standardised_member():
    bank, is_target = make_bank()
    members = [backends()["knn1"], backends()["ldn1_k4"]]
    fused = Fusion(name="both", paper="", members=members).fit(bank, is_target).score(make_queries())
    expected = []
    for member in members:
        distances = np.linalg.norm(bank[:, None].astype(np.float64) - bank, axis=2)
        if (
            member.name == "ldn1_k4"
        ):  # the densities are those of the whole bank; the clip itself is no neighbour
            distances = distances / np.sort(distances, axis=1)[:, 1:5].mean(axis=1)
        np.fill_diagonal(distances, np.inf)
        left_out = distances.min(axis=1)
        expected.append(
            (member.fit(bank, is_target).score(make_queries()) - np.mean(left_out)) / np.std(left_out)
        )
    np.testing.assert_allclose(fused, np.minimum(*expected), rtol=1e-7, atol=1e-9)


def test_a_new_distance_is_a_back_end_in_one_line():
    def median_distance(pairs, part):
        return np.median(pairs.distances("euclid")[:, pairs.bank.parts[part]], axis=1)

    bank, is_target = make_bank()
    own = Whole(name="median", paper="none", distance=median_distance).fit(bank, is_target)
    assert isinstance(own, Backend)
    expected = np.median(np.linalg.norm(make_queries()[:, None] - bank, axis=2), axis=1)
    np.testing.assert_allclose(own.score(make_queries()), expected, rtol=1e-5)
    assert Nearest(k=2) == Nearest(k=2)  # equal distances share what they compute


def test_scoring_imports_nothing_heavy():
    heavy = ("torch", "sklearn", "scipy", "ray", "mlflow", "optuna", "matplotlib")
    code = f"import sys, trainables.scoring.backends; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
