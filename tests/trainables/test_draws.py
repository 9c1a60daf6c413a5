"""Balance, no repeats before the end, and batches that add up whoever draws them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from trainables.draws import balanced, batches, cycle


def test_every_item_once_before_any_comes_again():
    drawn = cycle(np.random.default_rng(0), [3, 4, 5], 8)
    assert sorted(drawn[:3]) == sorted(drawn[3:6]) == [3, 4, 5]
    assert len(drawn) == 8


def test_classes_of_any_size_come_equally_often():
    classes = [[0], list(range(10, 13)), list(range(100, 150))]
    drawn = balanced(np.random.default_rng(0), classes, 60)
    assert Counter(min(99, d // 10 * 10) for d in drawn) == {0: 20, 10: 20, 99: 20}
    assert len({d for d in drawn if d >= 100}) == 20


@pytest.mark.parametrize("with_lambda", [True, False])
def test_shards_make_up_the_batch(with_lambda):
    clip, noise, snr = np.arange(12), np.arange(12, 24), np.linspace(-5, 5, 12)
    drawn = batches(clip, noise, snr, snr / 10 if with_lambda else None, [7, 8])
    assert [d.mask_seed for d in drawn] == [7, 8]
    assert np.concatenate([d.clip_B for d in drawn]).tolist() == clip.tolist()
    first, second = drawn[1].shard(0, 2), drawn[1].shard(1, 2)
    assert np.stack([first.noise_B, second.noise_B], 1).ravel().tolist() == list(range(18, 24))
    assert (first.lambda_B is None) is not with_lambda
