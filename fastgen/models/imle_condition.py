"""What a conditional generator is told beside its code: a class, or an image."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from fastgen import data
from fastgen.check import UserError


class Condition:
    """kind "none", "label" or "image"; `size` numbers are told of each sample.

    what: "none"; "label", for the class as a one-hot vector; or a `.npy` file of images, one for each of the data in
        the order of the data's own file
    """

    def __init__(self, what: str, images: data.Images) -> None:
        self.kind = what if what in ("none", "label") else "image"
        self.size = 0
        self.told: data.Images | None = None
        if what == "label":
            if images.train_label is None:
                raise UserError(f"condition: {images.name} has no labels")
            self._label = images.train_label
            self.size = int(self._label.max()) + 1
        elif self.kind == "image":
            if not Path(what).is_file():
                raise UserError(f"condition: expected 'none', 'label' or a .npy file of images, got {what!r}")
            try:
                told = data.load(what, on_disk=True)
            except UserError as error:
                raise UserError(f"condition{str(error).removeprefix('data')}") from None
            if images.train_label is not None:
                raise UserError(f"condition: images go with data from a .npy file, got {images.name}")
            if (len(told.train), len(told.test)) != (len(images.train), len(images.test)):
                raise UserError(
                    f"condition: expected as many images as the data, {len(images.train) + len(images.test)}, "
                    f"got {len(told.train) + len(told.test)}"
                )
            self.told = told
            self.size = torch.Size(told.shape).numel()

    def of(self, rows: Tensor) -> Tensor | None:
        """What is told of the samples of the data `rows`: [n, size]."""
        if self.kind == "none":
            return None
        if self.kind == "label":
            return self._one_hot(self._label.to(rows.device)[rows])
        assert self.told is not None
        return self.told.train[rows].to(rows.device).flatten(1)

    def some(self, n: int) -> Tensor | None:
        """For samples drawn afterwards: the classes in turn, or the test images' conditions."""
        if self.kind == "none":
            return None
        if self.kind == "label":
            return self._one_hot(torch.arange(n) % self.size)
        assert self.told is not None
        return self.told.test[torch.arange(n) % len(self.told.test)].flatten(1)

    def _one_hot(self, label: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(label, self.size).float()

    def groups(self, rows: Tensor, n: int) -> Iterator[tuple[Tensor, int, int, Callable[[int], Tensor | None]]]:
        """(places in `rows`, first, count, what m samples are told): these data choose among the samples of `count` of
        the n data, those from `first` on, counted class by class where there are classes."""
        if self.kind == "none":
            yield torch.arange(len(rows), device=rows.device), 0, n, lambda m: None
            return
        first = 0
        label = self._label.to(rows.device)
        for number, count in enumerate(label.bincount(minlength=self.size).tolist()):
            place = (label[rows] == number).nonzero()[:, 0]
            if len(place):
                told = self._one_hot(torch.full((1,), number, device=rows.device))
                yield place, first, count, lambda m, told=told: told.expand(m, -1)  # type: ignore[misc]
            first += count
