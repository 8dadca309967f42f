"""The handwritten digits of scikit-learn: as training data, and spaces of features in which sets of them are compared.

A distance is 0 between equal sets and 1 between the data and its mean picture: the Fréchet distance in units of the
data's total variance.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier

from mlx_cm.frechet import Gaussian, frechet_distance, gaussian_fit
from mlx_cm.storage import atomic_file

SIDE = 8  # pixels
LEVELS = 16  # the greatest value of a pixel
FEATURES = 64  # of the classifier's hidden layer


def digits() -> tuple[np.ndarray, np.ndarray]:
    """1797 pictures, uint8, (N, 8, 8), and the digits that they show."""
    data = load_digits()
    return np.rint(data.images * (255 / LEVELS)).astype(np.uint8), data.target


def write_data(path: Path, pictures: np.ndarray) -> None:
    """Writes pictures, uint8, as data for `mlx-cm train`; without labels."""
    with atomic_file(path) as partial, partial.open("wb") as file:
        np.savez(file, images=pictures)


def to_rows(pictures: np.ndarray) -> np.ndarray:
    """Pictures of 8 bits as rows of numbers in [-1, 1], float64."""
    return pictures.reshape(len(pictures), -1) / 127.5 - 1


@dataclass(frozen=True)
class FeatureSpace:
    """Features of pictures, and the distribution of those of the data."""

    features: Callable[[np.ndarray], np.ndarray]  # rows of numbers => rows of features
    data: Gaussian

    @classmethod
    def of(cls, features: Callable[[np.ndarray], np.ndarray], pictures: np.ndarray) -> "FeatureSpace":
        """The space of some features of the data's pictures."""
        return cls(features, gaussian_fit(features(to_rows(pictures))))

    def distance(self, pictures: np.ndarray, others: np.ndarray | None = None) -> float:
        """From pictures, uint8, to the data, or to other pictures."""
        fit, other = (
            self.data if one is None else gaussian_fit(self.features(to_rows(one))) for one in (pictures, others)
        )
        return frechet_distance(fit, other) / self.data.total_variance


def pixel_space(pictures: np.ndarray) -> FeatureSpace:
    """The pixels themselves."""
    return FeatureSpace.of(lambda rows: rows, pictures)


def classifier_space(pictures: np.ndarray, labels: np.ndarray) -> FeatureSpace:
    """The hidden layer of a small classifier, trained here in the same way every time."""
    classifier = MLPClassifier((FEATURES,), solver="lbfgs", alpha=0.1, max_iter=1000, random_state=0)
    classifier.fit(to_rows(pictures), labels)
    weights, biases = classifier.coefs_[0], classifier.intercepts_[0]
    return FeatureSpace.of(lambda rows: np.maximum(rows @ weights + biases, 0), pictures)
