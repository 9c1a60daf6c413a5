"""Codes find what there is to find, move where they are needed, and depend on the batches alone."""

from __future__ import annotations

import pytest
import torch

from trainables.clusters import Codebook

CENTRES = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])


def batch(which, machine, seed):
    """Points near some of the centres, all of one machine."""
    rng = torch.Generator().manual_seed(seed)
    return CENTRES[which] + 0.05 * torch.randn(len(which), 2, generator=rng), torch.full(
        (len(which),), machine
    )


def trained(num_codes=3, steps=200, decay=0.9):
    book = Codebook(2, num_codes, 2, decay=decay)
    for step in range(steps):
        which = torch.randint(0, 3, (6,), generator=torch.Generator().manual_seed(step))
        book.update(*batch(which, 1, step))
    return book


def test_codes_are_the_clusters():
    book = trained()
    found = book.code_MKP[1]
    assert torch.cdist(CENTRES, found).min(1).values.max() < 0.1
    points, machine = batch(torch.tensor([0, 0, 1, 2, 2]), 1, 999)
    code, distance = book.assign(points, machine)
    assert code[0] == code[1] != code[2]
    assert code[3] == code[4] != code[0]
    assert distance.max() < 0.3


def test_a_machine_has_codes_of_its_own():
    book = trained()
    assert book.count_MK[0].tolist() == [0.0] * 3
    code, distance = book.assign(CENTRES, torch.zeros(3, dtype=torch.long))
    assert code.tolist() == [0] * 3
    assert distance.isinf().all()
    before = book.state_dict()["code_MKP"][1].clone()
    book.update(*batch(torch.tensor([0, 1]), 0, 7))
    assert torch.equal(book.code_MKP[1], before)
    assert book.count_MK[0].gt(0).any()


def test_a_code_is_the_running_mean_of_its_clips():
    book = Codebook(1, 2, 2, decay=0.8)
    book.code_MKP[0] = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    book.count_MK.fill_(3.0)
    book.sum_MKP.copy_(3 * book.code_MKP)
    points = torch.tensor([[1.0, 0.4], [1.0, 0.2], [-1.0, 0.0]])
    book.update(points, torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(book.count_MK[0], torch.tensor([0.8 * 3 + 0.2 * 2, 0.8 * 3 + 0.2 * 1]))
    wanted = (0.8 * 3 * torch.tensor([1.0, 0.0]) + 0.2 * points[:2].sum(0)) / (0.8 * 3 + 0.2 * 2)
    torch.testing.assert_close(book.code_MKP[0, 0], wanted)


def test_a_dead_code_moves_to_the_farthest_clip():
    book = Codebook(1, 3, 2, decay=0.9)
    book.code_MKP[0] = torch.tensor([[1.0, 0.0], [0.9, 0.1], [50.0, 50.0]])
    book.count_MK[0] = torch.tensor([5.0, 5.0, 0.01])
    book.sum_MKP.copy_(book.code_MKP * book.count_MK[..., None])
    far = torch.tensor([[-1.0, -1.0]])
    book.update(torch.cat([torch.tensor([[1.0, 0.0]]), far]), torch.zeros(2, dtype=torch.long))
    torch.testing.assert_close(book.code_MKP[0, 2], far[0])
    assert book.count_MK[0, 2] > 1


def test_codes_come_to_life_where_there_is_something_new_and_none_dies_unseen():
    book = Codebook(1, 5, 2, decay=0.95)
    for step in range(20):
        which = torch.randint(0, 3, (4,), generator=torch.Generator().manual_seed(step))
        book.update(*batch(which, 0, step))
    live = book.count_MK > 0.1 * book.count_MK.mean()
    assert live.sum() in (3, 4)  # a code more in the beginning, when one lay between two places
    for step in range(20, 220):
        which = torch.randint(0, 3, (4,), generator=torch.Generator().manual_seed(step))
        book.update(*batch(which, 0, step))
    assert torch.cdist(CENTRES, book.code_MKP[0][book.count_MK[0] > 0.1]).min(1).values.max() < 0.1
    held = book.count_MK.clone()
    book.update(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long))
    assert torch.equal(book.count_MK, held)


def test_a_place_that_moves_keeps_its_code():
    book, which = Codebook(1, 4, 2, decay=0.95), torch.zeros(4, dtype=torch.long)
    for step in range(100):
        turn = torch.tensor(0.05 * step)
        points, machine = batch(which, 0, step)
        spin = torch.stack([torch.stack([turn.cos(), -turn.sin()]), torch.stack([turn.sin(), turn.cos()])])
        book.update(points @ spin.T, machine)
    assert (book.count_MK > 0).sum() == 1


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_a_batch_does_not_matter(seed):
    one, other = trained(steps=20), trained(steps=20)
    points, machine = batch(torch.tensor([0, 1, 2, 2, 1]), 1, seed)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    one.update(points, machine)
    other.update(points[order], machine[order])
    torch.testing.assert_close(one.code_MKP, other.code_MKP)
    torch.testing.assert_close(one.count_MK, other.count_MK)
