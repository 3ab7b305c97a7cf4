"""The learning rate that answers to validation, against the rule by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from fastadv.plateau import Pace, plateau


def by_hand(accuracies: Sequence[float]) -> list[tuple[float, bool]]:
    """Rate and return after each epoch, as arXiv:2310.01818's released code keeps them: a loop with a memory."""
    rate, rates, bests, paces = 0.01, [0.01], [accuracies[0]], []
    for epoch in range(len(accuracies)):
        back = False
        if epoch and epoch % 4 == 0:
            best = max(accuracies[: epoch + 1])
            rises = [accuracies[j + 1] > accuracies[j] for j in range(epoch - 4, epoch)].count(True)
            unchanged = rate == rates[-1] and best == bests[-1]
            back = rises < 3 or unchanged
            rates.append(rate)
            bests.append(best)
            rate = rate / 2 if back else rate
        paces.append((rate, back))
    return paces


CLIMB = [0.1, 0.2, 0.3, 0.4, 0.5]


@pytest.mark.parametrize(
    "accuracies",
    [
        [*CLIMB, 0.6, 0.7, 0.8, 0.9],
        # Rises in three of four epochs, and still below the best: the second condition.
        [*CLIMB, 0.1, 0.2, 0.3, 0.4],
        # Down at the first checkpoint; then three rises to a best that is none, right after a halving.
        [0.5, 0.4, 0.3, 0.2, 0.1, 0.2, 0.3, 0.4, 0.3, 0.35, 0.36, 0.37, 0.3, 0.1],
        [0.2] * 30,
        [0.1, 0.2, 0.3, 0.2, 0.4, 0.5, 0.5, 0.6, 0.7],
    ],
)
def test_the_pace_is_the_published_rule(accuracies: list[float]) -> None:
    expected = by_hand(accuracies)
    for epochs in range(1, len(accuracies) + 1):
        pace = plateau(accuracies[:epochs], lr=0.01)
        assert (pytest.approx(0.01 * pace.factor), pace.back, pace.stop) == (*expected[epochs - 1], False)


def test_both_conditions_are_seen() -> None:
    assert plateau([*CLIMB, 0.6, 0.7, 0.8, 0.9], lr=1.0) == Pace(1.0, False, False)
    assert plateau([*CLIMB, 0.1, 0.2, 0.3, 0.4], lr=1.0) == Pace(0.5, True, False)
    # The weights come back once, at the checkpoint itself.
    assert plateau([*CLIMB, 0.1, 0.2, 0.3, 0.4, 0.4], lr=1.0) == Pace(0.5, False, False)
    assert plateau([], lr=1.0) == Pace(1.0, False, False)


def test_training_stops_below_the_least_rate_after_ten_halvings_from_a_hundredth() -> None:
    flat = [0.2] * 100
    stops = [epochs for epochs in range(1, 100) if plateau(flat[:epochs], lr=0.01).stop]
    assert stops[0] == 41
    assert stops == list(range(41, 100))
    assert plateau(flat[:40], lr=0.01).factor == 2**-9
