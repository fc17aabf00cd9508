"""Handwritten digits read pixel by pixel: 1,797 real scans of 8 x 8 pixels, shipped with the package.

The test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, 1998, UCI Machine Learning
Repository, CC BY 4.0), as scikit-learn distributes it.
"""

from importlib.resources import files

import numpy as np

from chela.config import DataConfig
from chela.data.batch import FixedSplit
from chela.data.task import Task, entropy, majority

VAL, TEST = 0.1, 0.2


def load(config: DataConfig) -> Task:
    """The task: 64 steps of one pixel each, 10 classes; every class split 70 / 10 / 20 % by `data.seed`."""
    with files("chela.data").joinpath("digits.npz").open("rb") as file, np.load(file) as archive:
        images, labels = archive["images"], archive["labels"]  # uint8 [1797, 64] in 0..16, uint8 [1797]
    parts: list[list[np.ndarray]] = [[], [], []]
    for label in range(10):
        members = np.flatnonzero(labels == label)
        members = members[np.random.default_rng([config.seed, label]).permutation(len(members))]
        val, test = round(VAL * len(members)), round(TEST * len(members))
        for part, piece in zip(parts, np.split(members, [len(members) - val - test, len(members) - test]), strict=True):
            part.append(piece)
    train, val, test = (np.sort(np.concatenate(part)) for part in parts)
    shift, scale = float(images[train].mean()), float(images[train].std())
    return Task(
        name="digits",
        kind="classifier",
        train=FixedSplit(images[train], labels[train], shift, scale),
        val=FixedSplit(images[val], labels[val], shift, scale),
        test=FixedSplit(images[test], labels[test], shift, scale),
        inputs="real",
        channels=1,
        classes=10,
        max_length=64,
        baselines={"majority class": majority(labels[train], labels[test])},
        chance_loss=entropy(labels[train]),
        note="held-out part of the 1,797 scans; there is no published split",
    )
