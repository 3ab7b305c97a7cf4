"""Learning rates over a stage, against the factors that the released code gave when it was run, and by hand."""

from __future__ import annotations

import pytest

from fastadv.schedule import factor


def by_epoch(epochs: int, warmup: float, epoch_steps: int = 7) -> list[float]:
    """The factor of every epoch; asserts that it is one for all of its steps."""
    found = [
        {factor("epoch-cosine", epoch * epoch_steps + step, epochs, epoch_steps, warmup) for step in range(epoch_steps)}
        for epoch in range(epochs)
    ]
    assert all(len(factors) == 1 for factors in found)
    return [factors.pop() for factors in found]


@pytest.mark.parametrize(
    ("epochs", "last"),
    [(20, [0.2061, 0.0955, 0.0245]), (40, [0.0245, 0.0109, 0.0027]), (60, [0.0089, 0.0039, 0.001])],
)
def test_the_released_schedule_rises_for_ten_epochs_from_zero(epochs: int, last: list[float]) -> None:
    """RoLI's code, run: 0, 0.1, ..., 1 (CIFAR 20 epochs, Caltech and Dogs 40, CUB 60), then a cosine."""
    found = by_epoch(epochs, 10 / epochs)
    assert found[:11] == pytest.approx([i / 10 for i in range(11)])
    assert found[-3:] == pytest.approx(last, abs=5e-5)
    if epochs == 20:
        assert found[11:13] == pytest.approx([0.9755, 0.9045], abs=5e-5)


@pytest.mark.parametrize(("epochs", "expected"), [(1, [1.0]), (2, [0.0, 1.0]), (3, [0.0, 0.5, 1.0])])
def test_a_short_run_by_epochs_still_learns(epochs: int, expected: list[float]) -> None:
    assert by_epoch(epochs, 0.99) == pytest.approx(expected)


def test_the_cosine_by_steps_rises_then_falls() -> None:
    found = [factor("cosine", step, 5, 20, 0.1) for step in range(100)]
    assert found[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert max(found) == found[10] == 1.0
    assert found[55] == pytest.approx(0.5)
    assert found == sorted(found[:11]) + sorted(found[11:], reverse=True)
    assert 0 < found[-1] < 0.001


def test_drops_come_at_epochs_30_and_50_of_60() -> None:
    found = [factor("drops", step, 60, 3, 0.1) for step in range(180)]
    assert found == pytest.approx([1.0] * 90 + [0.1] * 60 + [0.01] * 30)
