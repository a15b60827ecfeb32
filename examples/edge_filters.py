"""Filters by hand: the edge detectors of the lecture notes, section 9.1, in one and in two dimensions."""

from __future__ import annotations

import numpy as np

import fastconv as fc


def show(title: str, image: np.ndarray) -> None:
    """Print an image with one mark for each pixel: # for 1 and more, . for 0, - for less."""
    print(f"\n{title}")
    for row in np.atleast_2d(image):
        print("  " + " ".join("#" if value >= 1 else "-" if value < 0 else "." for value in row))


def main() -> None:
    signal = np.array([0, 1, 1, 1, 0, 1, 0, 0], np.float32)[None]  # (C, L): one channel, no batch
    left_edge = np.array([-1, +1], np.float32)[None, None]  # (K, C, k)
    isolated = np.array([-1, +1, -1], np.float32)[None, None]
    print("image              ", *signal[0].astype(int))
    print("F1 = (-1, +1)      ", *fc.conv1d(signal, left_edge, padding="same_lower")[0].astype(int))
    print("F2 = (-1, +1, -1)  ", *fc.conv1d(signal, isolated, padding="same")[0].astype(int))

    image = np.zeros((1, 9, 11), np.float32)  # (C, H, W)
    image[0, 2:7, 2] = image[0, 2:7, 8] = image[0, 4, 2:9] = 1  # the letter H
    bars = np.full((2, 1, 3, 3), -0.5, np.float32)  # two filters, each looking for three pixels in a row ...
    bars[0, 0, :, 1] = bars[1, 0, 1, :] = 1  # ... one vertically, one horizontally
    vertical, horizontal = fc.conv2d(image, bars, padding="same", activation="relu")
    show("an image", image[0])
    show("vertical bars", vertical)
    show("horizontal bars", horizontal)
    show("the image at half the size, by max pooling", fc.max_pool2d(image, 2, ceil_mode=True)[0])


if __name__ == "__main__":
    main()
