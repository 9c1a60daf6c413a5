"""The back ends by name, and all of them from one embedding pass.

    bank = prepare(bank_ND, is_target_N, num_bands=8)
    scores = score(bank, queries_QD)                 # {"knn1_domain_z": scores_Q, ...}
    official = domain_scores(scores["knn1_domain_z"], is_anomaly_Q, is_target_Q)["official"]

Which back end is used moves results more than most training choices do, so every trial reports them all. They
share the bank's and the queries' distances (``neighbours.py``): a further back end costs a pass over matrices
that exist. To add one, write its distance in a file of its own and its line into ``backends``. Unknown names
raise ``UserError``.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection

from numpy.typing import ArrayLike

from trainables.errors import UserError
from trainables.scoring.density import LocalDensity, VarianceMin
from trainables.scoring.domains import Backend, Fusion, Smallest, Standardised, StandardisedByTest, Whole
from trainables.scoring.knn import Banded, Mixed, Nearest
from trainables.scoring.mahalanobis import Mahalanobis
from trainables.scoring.neighbours import COSINE, Bank, Floats

DEFAULT = "knn1_domain_z"


def backends(num_bands: int = 1) -> dict[str, Backend]:
    """Every back end, fresh, by name. Embeddings hold ``num_bands`` frequency bands, one after the other."""
    knn = "nearest neighbours"
    genrep = "GenRep (Saengthong and Shinozaki, ICASSP 2025)"
    genrep25 = "GenRep in DCASE 2025 (Saengthong and Shinozaki)"
    after_genrep = "after GenRep, each domain by its own train statistics"
    ldn = "local density normalisation (Wilkinghoff et al., ICASSP 2025)"
    beam = "BEAM (Saengthong and Shinozaki, 2026)"
    lee = "selective Mahalanobis (DCASE 2023 baseline, Harada et al.)"
    nearest, nearest_cosine = Nearest(), Nearest(metric=COSINE)
    density, banded = LocalDensity(k=4), Banded()
    found: list[Backend] = [
        Whole(name="knn1", paper=knn, distance=nearest),
        Whole(name="knn1_cosine", paper=knn, distance=nearest_cosine),
        Whole(name="knn4", paper=knn, distance=Nearest(k=4)),
        Whole(name="knn4_cosine", paper=knn, distance=Nearest(k=4, metric=COSINE)),
        Smallest(name="knn4_domain_min", paper=knn, distance=Nearest(k=4)),
        Standardised(name="knn1_domain_z", paper=after_genrep, distance=nearest),
        Standardised(name="knn1_cosine_domain_z", paper=after_genrep, distance=nearest_cosine),
        Standardised(name="knn1_domain_z_shared", paper=genrep25, distance=nearest, shared_scale=True),
        StandardisedByTest(name="knn1_domain_z_test", paper=genrep, distance=nearest),
        Smallest(name="memmixup", paper=genrep, distance=Mixed()),
        Standardised(name="memmixup_z", paper=after_genrep, distance=Mixed()),
        StandardisedByTest(name="memmixup_z_test", paper=genrep, distance=Mixed()),
        Whole(name="ldn1_k4", paper=ldn, distance=density),
        Whole(name="ldn1_k4_cosine", paper=ldn, distance=LocalDensity(k=4, metric=COSINE)),
        Whole(name="ldn1_k4_difference", paper=ldn, distance=LocalDensity(k=4, difference=True)),
        Smallest(
            name="ldn1_domain_min", paper=genrep25, distance=LocalDensity(k=16, k_target=9, summed=True)
        ),
        Whole(name="varmin", paper="VarMin (Matsumoto et al., DCASE workshop 2025)", distance=VarianceMin()),
        Whole(
            name="mahalanobis",
            paper="Mahalanobis with shrinkage (Ledoit and Wolf, 2004)",
            distance=Mahalanobis(),
        ),
        Smallest(name="mahalanobis_domain_min", paper=lee, distance=Mahalanobis()),
        Whole(name="beam", paper=beam, distance=banded, num_bands=num_bands),
        Whole(name="beam_cosine", paper=beam, distance=Banded(metric=COSINE), num_bands=num_bands),
        Standardised(
            name="beam_domain_z",
            paper="BEAM, standardised after GenRep",
            distance=banded,
            num_bands=num_bands,
        ),
    ]
    by_name = {backend.name: backend for backend in found}
    members = [by_name[name] for name in ("knn1", "knn1_cosine", "ldn1_k4", "beam")]
    fusion = Fusion(
        name="fusion_min_z", paper="min-of-z fusion (arXiv 2606.19269)", members=members, num_bands=num_bands
    )
    return {**by_name, fusion.name: fusion}


def prepare(
    bank_ND: ArrayLike, is_target_N: ArrayLike, num_bands: int = 1, names: Collection[str] | None = None
) -> Bank:
    """A bank that can be scored against many times; ``names`` (all by default) is what it will be asked for.

    Raises:
        UserError: an unknown name, or embeddings that cannot be a bank.
    """
    chosen = _choose(num_bands, names)
    by_band = any(backend.num_bands > 1 for backend in chosen)
    return Bank(bank_ND, is_target_N, num_bands=num_bands, by_band=by_band)


def score(bank: Bank, queries_QD: ArrayLike, names: Collection[str] | None = None) -> dict[str, Floats]:
    """Scores (Q) of the queries by back end; higher is more anomalous.

    Raises:
        UserError: an unknown name, or queries of another width or with values that are not finite.
    """
    chosen = _choose(bank.num_bands, names)
    pairs = bank.pairs(queries_QD)
    return {backend.name: backend.rank(pairs) for backend in chosen}


def score_all(
    bank_ND: ArrayLike,
    is_target_N: ArrayLike,
    queries_QD: ArrayLike,
    num_bands: int = 1,
    names: Collection[str] | None = None,
) -> dict[str, Floats]:
    """``prepare`` and ``score`` in one call."""
    return score(prepare(bank_ND, is_target_N, num_bands, names), queries_QD, names)


def _choose(num_bands: int, names: Collection[str] | None) -> list[Backend]:
    known = backends(num_bands)
    if names is None:
        return list(known.values())
    if isinstance(names, str):
        names = [names]
    chosen = []
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise UserError(f"back end {name!r}: did you mean {near[0]!r}? Allowed: {', '.join(known)}")
        chosen.append(known[name])
    if not chosen:
        raise UserError(f"no back end asked for: expected at least one of {', '.join(known)}")
    return chosen
