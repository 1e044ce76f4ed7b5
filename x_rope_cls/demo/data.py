"""Real data that ships inside installed packages: nothing is downloaded.

- scikit-learn's digits: 1,797 handwritten digits of 8 x 8 pixels (UCI "Optical recognition of handwritten digits"),
  read as sequences of 16 patches of 2 x 2 pixels with 2-D positions.
- aeon's JapaneseVowels: 640 recordings of 9 speakers saying "ae", 12 LPC cepstrum coefficients in 7 to 29 frames (Kudo,
  Toyama and Shimbo, "Multidimensional curve classification using passing-through regions", 1999), with 1-D positions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from aeon.datasets import load_japanese_vowels
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

DIGITS_GRID = (4, 4)  # of patches
_PATCH = 2  # pixels along each side
_SPLIT_SEED = 0  # the split is part of the task and the same for all seeds


@dataclass(frozen=True)
class Split:
    """Some recordings.

    Attributes:
        x: (recordings, tokens, channels), float32.
        y: (recordings,), int64 class.
        mask: bool (recordings, tokens), False where a recording has ended; None: all are of full length.
    """

    x: Tensor
    y: Tensor
    mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.y)

    def rows(self, index: Tensor | slice) -> Split:
        """Some of the recordings."""
        return Split(self.x[index], self.y[index], None if self.mask is None else self.mask[index])


@dataclass(frozen=True)
class Task:
    """A data set, split.

    Attributes:
        name: a word for tables.
        title: what it is, for people.
        classes: how many.
        positions: (tokens, axes), float32: row and column, or the number of the frame.
        epochs: passes over the training data in a full run.
        train: what gradients come from.
        val: what the epoch is chosen by.
        test: looked at once, at the end.
    """

    name: str
    title: str
    classes: int
    positions: Tensor
    epochs: int
    train: Split
    val: Split
    test: Split

    @property
    def channels(self) -> int:
        """Numbers per token."""
        return self.train.x.shape[-1]

    def small(self, recordings: int) -> Task:
        """The same task with at most so many recordings in each split."""
        first = slice(recordings)
        return replace(self, train=self.train.rows(first), val=self.val.rows(first), test=self.test.rows(first))


def load_tasks() -> list[Task]:
    """Both tasks, in the order of the tables."""
    return [digits(), japanese_vowels()]


def grid_positions(rows: int, columns: int) -> Tensor:
    """(rows * columns, 2), float32: row and column of each cell, row by row."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack((row.flatten(), column.flatten()), dim=-1).float()


def digits() -> Task:
    """Digits as 16 patches; 60 % for training, 20 % for validation, 20 % for the test, each with all classes."""
    pixels, labels = load_digits(return_X_y=True)
    x = _patches(torch.as_tensor(pixels, dtype=torch.float32))
    y = torch.as_tensor(labels, dtype=torch.int64)
    rest, test = _stratified(y, torch.arange(len(y)), 0.2)
    train, val = _stratified(y, rest, 0.25)
    return _task(
        "digits",
        "scikit-learn digits, 16 patches of 2 x 2 pixels, 2-D positions",
        10,
        grid_positions(*DIGITS_GRID),
        24,
        *(Split(x[i], y[i]) for i in (train, val, test)),
    )


def japanese_vowels() -> Task:
    """Recordings padded to the longest; the published test set, and a fifth of the training set to validate with."""
    train_x, train_y = load_japanese_vowels(split="train")
    test_x, test_y = load_japanese_vowels(split="test")
    longest = max(series.shape[1] for series in [*train_x, *test_x])
    known, test = _padded(train_x, train_y, longest), _padded(test_x, test_y, longest)
    train, val = _stratified(known.y, torch.arange(len(known)), 0.2)
    return _task(
        "vowels",
        f"aeon JapaneseVowels, up to {longest} frames, 1-D positions, key masks",
        9,
        torch.arange(longest, dtype=torch.float32)[:, None],
        24,
        known.rows(train),
        known.rows(val),
        test,
    )


def sheets(split: Split, per_side: int, count: int) -> Split:
    """Sheets of per_side x per_side digits, read patch by patch: long sequences for timing, with meaningless labels."""
    rows, columns = DIGITS_GRID
    used = split.x[: count * per_side**2]
    tiles = used.reshape(-1, per_side, per_side, rows, columns, used.shape[-1])
    tokens = tiles.transpose(2, 3).reshape(len(tiles), per_side * rows * per_side * columns, used.shape[-1])
    return Split(tokens, split.y[: len(tiles)])


def image(patches: Tensor) -> Tensor:
    """The picture (8, 8) that patches (16, 4) are of."""
    rows, columns = DIGITS_GRID
    return patches.reshape(rows, columns, _PATCH, _PATCH).transpose(1, 2).reshape(rows * _PATCH, columns * _PATCH)


def _patches(pixels: Tensor) -> Tensor:
    """From pictures (pictures, 64), row by row, to (pictures, 16, 4)."""
    rows, columns = DIGITS_GRID
    split = pixels.reshape(-1, rows, _PATCH, columns, _PATCH)
    return split.transpose(2, 3).reshape(-1, rows * columns, _PATCH * _PATCH)


def _padded(series: Any, labels: Any, longest: int) -> Split:
    x = torch.zeros(len(series), longest, series[0].shape[0])
    mask = torch.zeros(len(series), longest, dtype=torch.bool)
    for i, recording in enumerate(series):
        x[i, : recording.shape[1]] = torch.as_tensor(recording, dtype=torch.float32).T
        mask[i, : recording.shape[1]] = True
    y = torch.tensor([int(label) - 1 for label in labels])
    return Split(x, y, mask)


def _stratified(y: Tensor, index: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Splits indices in two, the second with that share of every class."""
    first, second = train_test_split(
        index.numpy(), test_size=share, stratify=y[index].numpy(), random_state=_SPLIT_SEED, shuffle=True
    )
    return torch.as_tensor(first), torch.as_tensor(second)


def _task(
    name: str, title: str, classes: int, positions: Tensor, epochs: int, train: Split, val: Split, test: Split
) -> Task:
    """A task whose channels have mean 0 and deviation 1 over the training data; padding stays 0."""
    seen = train.x.flatten(0, 1) if train.mask is None else train.x[train.mask]
    mean, deviation = seen.mean(0), seen.std(0)

    def normalise(split: Split) -> Split:
        x = (split.x - mean) / deviation
        return replace(split, x=x if split.mask is None else x * split.mask[..., None])

    return Task(name, title, classes, positions, epochs, normalise(train), normalise(val), normalise(test))
