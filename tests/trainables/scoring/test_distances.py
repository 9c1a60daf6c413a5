"""Every distance against the plainest computation of the same thing: loops, explicit mixtures, explicit inverses."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sklearn.covariance import LedoitWolf

from trainables.errors import UserError
from trainables.scoring.backends import score_all
from trainables.scoring.density import LocalDensity, VarianceMin
from trainables.scoring.domains import Smallest, Standardised, StandardisedByTest, Whole, domain_moments
from trainables.scoring.knn import Banded, Mixed, Nearest
from trainables.scoring.mahalanobis import Mahalanobis, ledoit_wolf
from trainables.scoring.neighbours import ALL, COSINE, EUCLID, SOURCE, TARGET, Bank

NUM_BANDS = 3


@pytest.fixture(params=["tail", "mixed"])
def scene(request):
    """Bank, its labels and queries; the target clips lie at the end, or anywhere."""
    rng = np.random.default_rng(7)
    bank = rng.normal(size=(30, 12)) * rng.uniform(0.5, 2, size=12) + 4
    is_target = np.arange(30) >= 22
    if request.param == "mixed":
        is_target = rng.permutation(is_target)
    bank[is_target] += 1.5
    queries = rng.normal(size=(17, 12)) * 1.5 + 4.5
    return bank, is_target, queries


def plain(rows, columns, metric=EUCLID):
    if metric == COSINE:
        return np.array([[np.linalg.norm(unit(r) - unit(c)) / 2 for c in columns] for r in rows])
    return cdist(rows, columns)


def unit(vector):
    return vector / np.linalg.norm(vector)


def without(rows, index):
    return np.delete(rows, index, axis=0)


def run(kind, scene, distance, **settings):
    bank, is_target, queries = scene
    return kind(name="x", paper="", distance=distance, **settings).fit(bank, is_target).score(queries)


@pytest.mark.parametrize("metric", [EUCLID, COSINE])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("width", [1, 5, 1500])
def test_pairs_hold_true_distances(metric, dtype, width):
    rng = np.random.default_rng(0)
    bank = (rng.normal(size=(9, width)) + 30).astype(dtype)
    queries = (rng.normal(size=(4, width)) + 30).astype(dtype)
    held = Bank(bank, np.zeros(9))
    wide = bank.astype(np.float64)
    if metric == EUCLID or width > 1:  # all vectors of one dimension point the same way
        np.testing.assert_allclose(
            held.pairs(queries).distances(metric), plain(queries.astype(np.float64), wide, metric), rtol=1e-9
        )
    left_out = held.loo.distances(metric)
    assert np.isinf(np.diag(left_out)).all()
    off_diagonal = ~np.eye(9, dtype=bool)
    expected = plain(wide, wide, metric)[off_diagonal]
    np.testing.assert_allclose(left_out[off_diagonal], expected, rtol=1e-9, atol=1e-7 if width == 1 else 0)


def test_a_large_common_offset_costs_little_precision():
    rng = np.random.default_rng(0)
    bank, queries = rng.normal(size=(20, 64)), rng.normal(size=(5, 64))
    near = Bank(bank, np.zeros(20)).pairs(queries).distances(EUCLID)
    far = Bank(bank + 1e6, np.zeros(20)).pairs(queries + 1e6).distances(EUCLID)
    np.testing.assert_allclose(far, near, rtol=1e-8)


def test_duplicates_are_at_distance_zero():
    rng = np.random.default_rng(0)
    bank = rng.normal(size=(20, 700)).astype(np.float32) + 100
    for metric, scale in ((EUCLID, 1), (COSINE, 3)):  # cosine sees direction only
        distances = (
            Bank(bank.astype(np.float64), np.zeros(20)).pairs(bank[:5] * np.float64(scale)).distances(metric)
        )
        assert distances.argmin(axis=1).tolist() == list(range(5))
        np.testing.assert_allclose(distances.min(axis=1), 0, atol=1e-7)
    assert (Bank(bank, np.zeros(20)).pairs(bank[:5]).distances(EUCLID).min(axis=1) == 0).all()


def test_a_zero_embedding_counts_as_the_zero_vector():
    bank = np.array([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]])
    held = Bank(bank, np.zeros(3))
    expected = [[0.5, 0.0, 0.5], [0.0, 0.5, np.sqrt(2 - 2 * 0.6) / 2]]
    np.testing.assert_allclose(held.pairs([[0.0, 0.0], [6.0, 8.0]]).distances(COSINE), expected, atol=1e-7)
    assert np.isinf(np.diag(held.loo.distances(COSINE))).all()


@pytest.mark.parametrize("metric", [EUCLID, COSINE])
@pytest.mark.parametrize("k", [1, 3, 25])
def test_nearest(scene, metric, k):
    bank, is_target, queries = scene
    for part, rows in ((ALL, bank), (SOURCE, bank[~is_target]), (TARGET, bank[is_target])):
        expected = np.sort(plain(queries, rows, metric), axis=1)[:, :k].mean(axis=1)
        found = Bank(bank, is_target).pairs(queries).nearest(metric, part, k)
        np.testing.assert_allclose(found, expected, rtol=1e-9)


def left_out_nearest(rows, k=1, metric=EUCLID):
    return np.array(
        [np.sort(plain(rows[i : i + 1], without(rows, i), metric)[0])[:k].mean() for i in range(len(rows))]
    )


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("metric", [EUCLID, COSINE])
def test_standardised_by_train_statistics(scene, metric, shared):
    bank, is_target, queries = scene
    z = {}
    deviation = {
        name: left_out_nearest(rows, metric=metric).std() for name, rows in domains(bank, is_target).items()
    }
    for name, rows in domains(bank, is_target).items():
        mean = left_out_nearest(rows, metric=metric).mean()
        scale = deviation["target" if shared else name]
        z[name] = (plain(queries, rows, metric).min(axis=1) - mean) / scale
    found = run(Standardised, scene, Nearest(metric=metric), shared_scale=shared)
    np.testing.assert_allclose(found, np.minimum(z["source"], z["target"]), rtol=1e-7, atol=1e-9)


def domains(bank, is_target):
    return {"source": bank[~is_target], "target": bank[is_target]}


def test_standardised_by_test_statistics(scene):
    bank, is_target, queries = scene
    z = []
    for rows in domains(bank, is_target).values():
        distance = plain(queries, rows).min(axis=1)
        z.append((distance - distance.mean()) / distance.std())
    np.testing.assert_allclose(
        run(StandardisedByTest, scene, Nearest()), np.minimum(*z), rtol=1e-9, atol=1e-9
    )


def mixtures(source, target, share, num_sources):
    found = [*target]
    for clip in target:
        nearest = np.argsort(np.linalg.norm(source - clip, axis=1))[:num_sources]
        found += [share * clip + (1 - share) * source[i] for i in nearest]
    return np.array(found)


@pytest.mark.parametrize("num_sources", [None, 3, 1])
@pytest.mark.parametrize("share", [0.9, 0.5])
def test_mixed_equals_a_bank_of_real_mixtures(scene, share, num_sources):
    bank, is_target, queries = scene
    source, target = bank[~is_target], bank[is_target]
    distance = Mixed(share=share, num_sources=num_sources)
    pairs = Bank(bank, is_target).pairs(queries)
    to_mixed = plain(queries, mixtures(source, target, share, num_sources)).min(axis=1)
    to_source = plain(queries, source).min(axis=1)
    np.testing.assert_allclose(distance(pairs, TARGET), to_mixed, rtol=1e-9)
    np.testing.assert_allclose(distance(pairs, SOURCE), to_source, rtol=1e-9)
    np.testing.assert_allclose(distance(pairs, ALL), np.minimum(to_mixed, to_source), rtol=1e-9)
    np.testing.assert_allclose(run(Smallest, scene, distance), np.minimum(to_mixed, to_source), rtol=1e-9)


def test_mixed_leaves_out_every_mixture_of_the_clip(scene):
    bank, is_target, _ = scene
    source, target = bank[~is_target], bank[is_target]
    expected = [
        plain(target[i : i + 1], mixtures(source, without(target, i), 0.9, None)).min()
        for i in range(len(target))
    ]
    mean, deviation = domain_moments(Bank(bank, is_target), Mixed())[TARGET]
    assert mean == pytest.approx(np.mean(expected))
    assert deviation == pytest.approx(np.std(expected))


@pytest.mark.parametrize("difference", [False, True])
@pytest.mark.parametrize("metric", [EUCLID, COSINE])
@pytest.mark.parametrize("k", [1, 4])
def test_local_density(scene, metric, k, difference):
    bank, _, queries = scene
    density = left_out_nearest(bank, k, metric)
    distances = plain(queries, bank, metric)
    expected = (distances - density if difference else distances / density).min(axis=1)
    found = run(Whole, scene, LocalDensity(k=k, metric=metric, difference=difference))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_local_density_by_domain_divides_by_sums(scene):
    bank, is_target, queries = scene
    source, target = bank[~is_target], bank[is_target]
    expected = np.minimum(
        (plain(queries, source) / (16 * left_out_nearest(source, 16))).min(axis=1),
        (plain(queries, target) / (5 * left_out_nearest(target, 5))).min(axis=1),
    )
    found = run(Smallest, scene, LocalDensity(k=16, k_target=5, summed=True))
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_variance_min(scene):
    bank, _, queries = scene
    density = left_out_nearest(bank, 4)
    nearest, neighbour_density = [], []
    for i in range(len(bank)):
        distances = plain(bank[i : i + 1], bank)[0]
        distances[i] = np.inf
        nearest.append(distances.min())
        neighbour_density.append(density[distances.argmin()])
    alpha = np.cov(nearest, neighbour_density, ddof=0)[0, 1] / np.var(neighbour_density)
    expected = (plain(queries, bank) - alpha * density).min(axis=1)
    np.testing.assert_allclose(run(Whole, scene, VarianceMin()), expected, rtol=1e-8)
    # What alpha is for: no other leaves the bank's own scores with less variance.
    residuals = [
        np.var(np.array(nearest) - a * np.array(neighbour_density)) for a in (alpha - 0.1, alpha, alpha + 0.1)
    ]
    assert residuals[1] == min(residuals)


@pytest.mark.parametrize("shape", [(40, 12), (13, 60)])
def test_mahalanobis_equals_scikit_learn(shape):
    rng = np.random.default_rng(3)
    bank = rng.normal(size=shape) * np.linspace(0.3, 3, shape[1]) + 2
    queries = rng.normal(size=(8, shape[1])) * 2
    model = LedoitWolf().fit(bank)
    centred = bank - bank.mean(axis=0)
    assert ledoit_wolf(centred @ centred.T, shape[1]) == pytest.approx(model.shrinkage_, rel=1e-9)
    found = score_all(bank, np.zeros(len(bank)), queries, names=["mahalanobis"])["mahalanobis"]
    np.testing.assert_allclose(found**2, model.mahalanobis(queries), rtol=1e-7)


def test_selective_mahalanobis(scene):
    bank, is_target, queries = scene
    models = [LedoitWolf().fit(rows) for rows in domains(bank, is_target).values()]
    expected = np.min([model.mahalanobis(queries) for model in models], axis=0)
    np.testing.assert_allclose(run(Smallest, scene, Mahalanobis()) ** 2, expected, rtol=1e-7)


@pytest.mark.parametrize("num_target", [1, 2, 3])
def test_a_tiny_domain_borrows_the_covariance_and_keeps_its_mean(num_target):
    rng = np.random.default_rng(5)
    bank = rng.normal(size=(25, 6)) * np.arange(1, 7)
    is_target = np.arange(25) >= 25 - num_target
    bank[is_target] += 20
    queries = rng.normal(size=(6, 6)) + 20
    model = LedoitWolf().fit(bank[~is_target])
    offset = queries - bank[is_target].mean(axis=0)
    expected = np.einsum("qi,ij,qj->q", offset, np.linalg.inv(model.covariance_), offset)
    found = run(Smallest, (bank, is_target, queries), Mahalanobis())
    np.testing.assert_allclose(found**2, expected, rtol=1e-7)


def test_mahalanobis_refuses_to_be_standardised(scene):
    with pytest.raises(ValueError, match="leave-one-out"):
        run(Standardised, scene, Mahalanobis())


@pytest.mark.parametrize("metric", [EUCLID, COSINE])
def test_banded(scene, metric):
    bank, is_target, queries = scene
    for part, rows in ((ALL, bank), (SOURCE, bank[~is_target]), (TARGET, bank[is_target])):
        expected = np.mean(
            [
                plain(q, r, metric).min(axis=1)
                for q, r in zip(np.split(queries, NUM_BANDS, 1), np.split(rows, NUM_BANDS, 1), strict=True)
            ],
            axis=0,
        )
        for by_band in (True, False):
            pairs = Bank(bank, is_target, num_bands=NUM_BANDS, by_band=by_band).pairs(queries)
            np.testing.assert_allclose(Banded(metric=metric)(pairs, part), expected, rtol=1e-9)


def test_bands_leave_the_whole_distance_as_it_was(scene):
    bank, is_target, queries = scene
    for metric in (EUCLID, COSINE):
        whole = Bank(bank, is_target).pairs(queries).distances(metric)
        by_band = Bank(bank, is_target, num_bands=NUM_BANDS).pairs(queries).distances(metric)
        np.testing.assert_allclose(by_band, whole, rtol=1e-12)


@pytest.mark.parametrize("num_target", [1, 2, 3])
def test_a_tiny_domain_borrows_the_statistics_of_the_other(scene, num_target):
    bank = scene[0]
    is_target = np.arange(30) >= 30 - num_target
    distance = left_out_nearest(bank[~is_target])
    borrowed = domain_moments(Bank(bank, is_target), Nearest())
    assert borrowed[TARGET] == borrowed[SOURCE] == pytest.approx((distance.mean(), distance.std()))
    swapped = domain_moments(Bank(bank, ~is_target), Nearest())
    assert swapped[SOURCE] == swapped[TARGET] == borrowed[SOURCE]


def test_two_tiny_domains_use_the_statistics_of_the_whole_bank(scene):
    bank = scene[0][:5]
    distance = left_out_nearest(bank)
    found = domain_moments(Bank(bank, [0, 0, 0, 1, 1]), Nearest())
    assert found[SOURCE] == found[TARGET] == pytest.approx((distance.mean(), distance.std()))


def test_four_clips_have_statistics_of_their_own(scene):
    bank, _, _ = scene
    is_target = np.arange(30) >= 26
    distance = left_out_nearest(bank[is_target])
    assert domain_moments(Bank(bank, is_target), Nearest())[TARGET] == pytest.approx(
        (distance.mean(), distance.std())
    )


@pytest.mark.parametrize("num_bands", [0, 5, 24])
def test_bands_that_do_not_divide_the_width_are_refused(scene, num_bands):
    with pytest.raises(UserError, match="expected a divisor of the embedding width 12"):
        Bank(scene[0], scene[1], num_bands=num_bands)
