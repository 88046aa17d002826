"""Print the digits that the scorer of `visattn.metrics.prompt` compares with.

    PYTHONPATH=. python scripts/tiny_wan/digits.py

Each is the mean of a cluster of a class's clear training instances, as 8 rows of grey values in
0..f.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tiny_wan.sprites import digit_images
from visattn.metrics.prompt import DIGITS

CLUSTERS = 6


def cluster_means(images: Tensor, clusters: int = CLUSTERS, rounds: int = 30) -> Tensor:
    """Return the k-means of ``images`` ``[N, 8, 8]``, ``[clusters, 8, 8]``."""
    points = images.flatten(1)
    chosen = [0]
    while len(chosen) < clusters:  # begins at instances far apart
        distance = torch.cdist(points, points[chosen]).amin(1)
        chosen.append(int(distance.argmax()))
    means = points[chosen]
    for _ in range(rounds):
        nearest = torch.cdist(points, means).argmin(1)
        means = torch.stack([points[nearest == k].mean(0) for k in range(clusters)])
    return means.view(-1, 8, 8)


def main() -> None:
    """Print the table as Python."""
    for name in DIGITS:
        print(f'    "{name}": (')
        for mean in cluster_means(digit_images(DIGITS[name], held_out=False)):
            rows = "".join(f"{int(value):x}" for value in (mean.flatten() * 15).round())
            print(f'        "{rows}",')
        print("    ),")


if __name__ == "__main__":
    main()
