"""Metrics of predictions compared with formulas, other libraries and values computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix as sklearn_confusion

from toolkit.report.prediction_metrics import (
    BINS,
    ClassConfusion,
    RunPredictions,
    accuracy_by_class,
    calibration,
    confusion_cells,
    confusion_matrix,
    confusions,
    wilson_interval,
)


def predictions(labels: list[int], predicted: list[int], probabilities: list[float], classes: int) -> RunPredictions:
    names = [str(number) for number in range(len(labels))]
    return RunPredictions(
        names, list("abcdefgh"[:classes]), np.array(labels), np.array(predicted), np.array(probabilities)
    )


def test_calibration_error_computed_by_hand() -> None:
    """Two images at 0.9, one correct (gap 0.4); two at 0.6, both correct (gap 0.4); one at 1.0, correct (gap 0)."""
    found = calibration(np.array([0.9, 0.9, 0.6, 0.6, 1.0]), [True, False, True, True, True])
    assert found.expected_error == pytest.approx((2 * 0.4 + 2 * 0.4 + 0) / 5)
    assert found.counts.sum() == 5
    assert found.counts[-1] == 1, "a probability of 1 is in the last bin"
    assert found.counts[8] == 2, "0.6 is the right edge of the ninth bin and belongs to it"
    assert found.accuracy[8] == 1
    assert np.isnan(found.accuracy[0]), "an empty bin has no accuracy"


def test_calibration_error_matches_its_definition_bin_by_bin() -> None:
    random = np.random.default_rng(0)
    probabilities, right = random.random(1000), random.random(1000) < 0.7
    expected = 0.0
    for m in range(BINS):
        inside = (probabilities > m / BINS) & (probabilities <= (m + 1) / BINS)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - probabilities[inside].mean())
    assert calibration(probabilities, right).expected_error == pytest.approx(expected, abs=1e-12)


def test_certain_and_correct_predictions_are_perfectly_calibrated() -> None:
    assert calibration(np.ones(4), [True] * 4).expected_error == 0
    assert calibration(np.ones(4), [False] * 4).expected_error == 1
    assert calibration(np.zeros(1), [False]).expected_error == 0, "a probability of 0 is in the first bin"


def test_confusion_matrix_equals_scikit_learns() -> None:
    random = np.random.default_rng(1)
    labels, predicted = random.integers(0, 6, 500), random.integers(0, 6, 500)
    found = predictions(list(labels), list(predicted), [0.5] * 500, 6)
    expected = sklearn_confusion(labels, predicted, labels=range(6))
    assert np.array_equal(confusion_matrix(found), expected)
    assert [list(cell) for cell in confusion_cells(found)] == [[i, j, expected[i, j]] for i, j in np.argwhere(expected)]


def test_class_accuracies_leave_out_classes_without_images() -> None:
    found = predictions([0, 0, 0, 2], [0, 0, 1, 2], [0.5] * 4, 3)
    assert accuracy_by_class(found)[[0, 2]] == pytest.approx([2 / 3, 1])
    assert np.isnan(accuracy_by_class(found)[1])


def test_confusions_are_sorted_by_frequency() -> None:
    found = predictions([0, 0, 1, 1, 1, 2], [1, 0, 2, 2, 0, 2], [0.5] * 6, 3)
    assert confusions(found) == [
        ClassConfusion(1, 2, 2),
        ClassConfusion(0, 1, 1),
        ClassConfusion(1, 0, 1),
    ]


def test_worst_mistakes_are_those_of_the_highest_confidence() -> None:
    found = predictions([0, 0, 1, 1, 2], [1, 0, 0, 0, 1], [0.4, 0.99, 0.8, 0.8, 0.9], 3)
    assert found.worst(10).tolist() == [4, 2, 3, 0], "only mistakes; ties in the order of the data set"
    assert found.worst(2).tolist() == [4, 2]


def test_the_confidence_interval_of_an_accuracy_is_wilsons() -> None:
    """For 8 of 10, published tables give Wilson's interval as 0.490 to 0.943."""
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    low, high = wilson_interval(10, 10)
    assert 0.7 < low < 1 <= round(high, 9) <= 1, "it stays within 0..1, unlike the normal interval"
