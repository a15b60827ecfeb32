"""A convolutional network learns handwritten digits, in a few lines; ``fastconv demo`` tells more.

Needs scikit-learn for the digits: pip install "fastconv[demo]"
"""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits

import fastconv as fc
from fastconv.layers import Conv2d, Flatten, Linear, MaxPool2d, ReLU, Sequential


def main() -> None:
    pixels, digits = load_digits(return_X_y=True)
    images = (pixels / 16).astype(np.float32).reshape(-1, 8, 8, 1)  # (N, H, W, C): channels last
    rng = np.random.default_rng(0)
    order = rng.permutation(len(images))
    train, test = order[:1400], order[1400:]

    model = Sequential(
        Conv2d(1, 16, 3, padding="same", layout="NHWC", rng=rng),
        ReLU(),
        MaxPool2d(2, layout="NHWC"),
        Flatten(),
        Linear(16 * 4 * 4, 10, rng=rng),
    )
    model.summary(images.shape)
    history = fc.fit(
        model,
        images[train],
        digits[train],
        loss=fc.losses.cross_entropy,
        optimizer=fc.optim.SGD(model, lr=0.1, momentum=0.9),
        epochs=5,
        batch_size=32,
        validation=(images[test], digits[test]),
        rng=rng,
    )
    print("accuracy after each epoch:", *(f"{share:.3f}" for share in history["val_accuracy"]))


if __name__ == "__main__":
    main()
