"""match_destinations: the card's example to the digit, and the definition one token at a time."""

from __future__ import annotations

import pytest
import torch
from around_oracle import merge, slots_of, unmerge

from tamis.kernels.match_destinations import MATCH_DESTINATIONS, reference
from tamis.kernels.reduce_tokens import reference as reduce
from tamis.kernels.restore_tokens import reference as restore

X = torch.tensor([[[1.0, 0], [1, 0.1], [0, 1], [0.3, 1], [1, 0.2], [1, -0.15], [0, 2], [-1, 0]]])  # 2 rows of 4
CORNERS = torch.tensor([0, 2])
MERGED = torch.tensor([[[1.0, 0.2], [0.3, 1], [-1, 0], [1, -0.05 / 3], [0, 1.5]]])
RESTORED = MERGED[:, [3, 3, 4, 1, 0, 3, 4, 2]]


def test_the_cards_example():
    slot, leader, moved = reference(X, CORNERS, 5, 0)
    assert moved.tolist() == [[1, 5, 6]]
    out = reduce(X, slot, leader, moved, None, True)
    torch.testing.assert_close(out, MERGED, rtol=0, atol=1e-6)
    torch.testing.assert_close(restore(out, slot), RESTORED, rtol=0, atol=1e-6)


def test_the_oracle_knows_the_cards_example():
    slots = [slots_of(X[0], CORNERS.tolist(), 3, 0)]
    torch.testing.assert_close(merge(X, slots), MERGED, rtol=0, atol=1e-6)
    torch.testing.assert_close(unmerge(MERGED, slots), RESTORED, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sample", range(len(list(MATCH_DESTINATIONS.samples()))))
def test_the_definition(sample):
    metric, places, out, prefix = list(MATCH_DESTINATIONS.samples())[sample]
    metric = without_lost(metric)
    slot, leader, moved = reference(metric, places, out, prefix)
    for row in range(len(metric)):
        slots = slots_of(metric[row], places.tolist(), metric.shape[1] - out, prefix)
        assert leader[row].tolist() == [one[0] for one in slots]
        assert slot[row].tolist() == [
            next(j for j, one in enumerate(slots) if i in one) for i in range(metric.shape[1])
        ]
        assert moved[row].tolist() == sorted(i for one in slots for i in one[1:])


def without_lost(metric):
    """Tokens without a direction as the zero vector they count as."""
    return metric.double().where(metric.isfinite().all(-1, keepdim=True), 0)
