"""k-nearest-neighbours classification of scikit-learn's handwritten digits."""

from __future__ import annotations

import torch
from torch import nn

from singer.evaluation.features import pooled_features
from singer.models.backbones import Backbone


def digits_accuracy(backbone: Backbone, train: int, test: int, neighbors: int = 10) -> float:
    """Return the accuracy of a cosine k-nearest-neighbours classifier on pooled features.

    Args:
        backbone: gives the features; the 8x8 digits are enlarged bilinearly to its image size.
        train: how many of the first digits are the labelled ones.
        test: how many of those after them are classified.
        neighbors: k.
    """
    from sklearn.datasets import load_digits
    from sklearn.neighbors import KNeighborsClassifier

    data = load_digits()
    images = torch.from_numpy(data.images[: train + test]).float()[:, None] / 16
    images = nn.functional.interpolate(images, backbone.image_size, mode="bilinear").clamp(0, 1)
    features = pooled_features(backbone, images.expand(-1, 3, -1, -1)).numpy()
    labels = data.target[: train + test]
    classifier = KNeighborsClassifier(neighbors, metric="cosine")
    classifier.fit(features[:train], labels[:train])
    return float(classifier.score(features[train:], labels[train:]))
