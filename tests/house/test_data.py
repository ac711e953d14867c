"""Data sets by name and path: values, splits, and errors that say what to do."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fastgen import data
from fastgen.check import UserError


def test_mnist5k() -> None:
    images = data.load("mnist5k")
    assert images.train.shape == (4000, 1, 28, 28)
    assert images.test.shape == (1000, 1, 28, 28)
    assert images.train.dtype == torch.float32
    assert images.test_label is not None
    assert images.train_label is not None
    assert images.test_label.bincount().tolist() == [100] * 10
    assert images.train_label.bincount().tolist() == [400] * 10
    assert float(images.train.min()) == 0
    assert float(images.train.max()) == 1
    # No test image is a training image too.
    both = torch.cat([images.train, images.test]).flatten(1)
    assert len(both.unique(dim=0)) == 5000


def test_split_is_fixed() -> None:
    first, second = data.load("digits"), data.load("digits")
    assert torch.equal(first.test, second.test)
    assert len(first.train) + len(first.test) == 1797
    assert first.shape == (1, 8, 8)


@pytest.mark.parametrize("layout", ["hw", "chw", "hwc", "grey-hwc"])
def test_array(tmp_path: Path, layout: str) -> None:
    shape = {"hw": (20, 6, 5), "chw": (20, 3, 6, 5), "hwc": (20, 6, 5, 3), "grey-hwc": (20, 6, 5, 1)}[layout]
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.save(tmp_path / "a.npy", array)
    images = data.load(str(tmp_path / "a.npy"))
    assert images.shape == ((3 if "3" in str(shape[1:]) else 1), 6, 5)
    assert len(images.train) == 16
    assert images.train_label is None
    total = float(images.train.double().sum() + images.test.double().sum())
    assert total == pytest.approx(array.astype(float).sum() / 255, rel=1e-6)


def test_folder(tmp_path: Path) -> None:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (12, 4, 5, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{i:02}.png")
    images = data.load(str(tmp_path))
    assert images.shape == (3, 4, 5)
    total = float(images.train.double().sum() + images.test.double().sum())
    assert total == pytest.approx(pixels.astype(float).sum() / 255, rel=1e-6)


@pytest.mark.parametrize(("source", "size", "rows"), [("texture:brick", 64, 13), ("texture:gravel:32", 32, 29)])
def test_texture(source: str, size: int, rows: int) -> None:
    skimage_data = pytest.importorskip("skimage.data")
    pixels = getattr(skimage_data, source.split(":")[1])().astype(float) / 255
    images = data.load(source)
    step = size // 4
    columns = (192 - size) // step + 1
    assert images.train.shape == (rows * columns, 1, size, size)
    assert images.test.shape == (rows * ((64 - size) // step + 1), 1, size, size)
    assert images.train_label is None
    half = (pixels[::2, ::2] + pixels[1::2, ::2] + pixels[::2, 1::2] + pixels[1::2, 1::2]) / 4
    for crop, top, left in ((images.train[columns + 2], step, 2 * step), (images.test[-1], 256 - size, 256 - size)):
        expected = half[top : top + size, left : left + size]
        assert np.abs(crop[0].numpy() - expected).max() < 1e-6


def _bad(tmp_path: Path, name: str) -> str:
    file = tmp_path / "a.npy"
    if name.startswith("texture:"):
        return name
    if name == "pickled":
        np.save(file, np.array([{"a": 1}] * 20, dtype=object), allow_pickle=True)
    elif name == "short":
        np.save(file, np.zeros((20, 4, 4), np.uint8))
        file.write_bytes(file.read_bytes()[:-50])
    elif name == "int":
        np.save(file, np.zeros((20, 4, 4), np.int64))
    elif name == "range":
        np.save(file, np.full((20, 4, 4), 255.0, np.float32))
    elif name == "nan":
        np.save(file, np.full((20, 4, 4), np.nan, np.float32))
    elif name == "shape":
        np.save(file, np.zeros((20, 4), np.uint8))
    elif name == "empty":
        np.save(file, np.zeros((0, 4, 4), np.uint8))
    elif name == "few":
        np.save(file, np.zeros((3, 4, 4), np.uint8))
    elif name == "no-images":
        (tmp_path / "notes.txt").write_text("none")
        return str(tmp_path)
    elif name == "sizes":
        from PIL import Image

        for i in range(12):
            Image.new("L", (4 + i // 11, 4)).save(tmp_path / f"{i}.png")
        return str(tmp_path)
    elif name == "wide":
        from PIL import Image

        Image.new("I", (4, 4)).save(tmp_path / "0.tif")
        (tmp_path / "0.tif").rename(tmp_path / "0.png")
        return str(tmp_path)
    elif name == "header":
        file.write_bytes(b"\x93NUMPY\x01\x00\x00" + file.read_bytes()[9:] if file.exists() else b"PK\x03\x04cut")
    elif name == "broken-png":
        (tmp_path / "a.png").write_bytes(b"not a picture")
        return str(tmp_path)
    else:
        return "mnits5k"
    return str(file)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("pickled", "cannot be read"),
        ("short", "cannot be read"),
        ("int", "uint8 or floating"),
        ("range", r"in \[0, 1\]"),
        ("nan", r"in \[0, 1\]"),
        ("shape", "expected .N, H, W"),
        ("empty", "expected .N, H, W"),
        ("few", "at least 10"),
        ("no-images", "no .png"),
        ("sizes", "one size"),
        ("wide", "8 or 16 bits"),
        ("header", "cannot be read as a .npy"),
        ("broken-png", "cannot be read as an image"),
        ("unknown", "expected one of mnist5k, digits"),
        ("texture:moss", "expected texture:brick or texture:grass or texture:gravel"),
        ("texture:brick:big", "of crops from 8 to 64"),
        ("texture:brick:65", "of crops from 8 to 64"),
        ("texture:brick:32:1", "of crops from 8 to 64"),
    ],
)
def test_bad_sources(tmp_path: Path, name: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        data.load(_bad(tmp_path, name))


def test_sixteen_bits_are_not_cut_at_eight(tmp_path: Path) -> None:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 65536, (12, 4, 4)).astype(np.uint16)
    for i, one in enumerate(pixels):
        Image.fromarray(one).save(tmp_path / f"{i:02}.png")
    found = data.load(str(tmp_path))
    every = torch.cat([found.train, found.test]).flatten().sort().values
    expected = torch.from_numpy((pixels.astype(np.float32) / np.float32(65535)).flatten()).sort().values
    assert torch.equal(every, expected)


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_a_path_object_and_no_rows_of_it(tmp_path: Path, dtype: str) -> None:
    np.save(tmp_path / "a.npy", np.zeros((20, 3, 4), dtype=dtype))
    stored = data.load(tmp_path / "a.npy", on_disk=True)
    assert stored.name == str(tmp_path / "a.npy")
    for none in (slice(5, 2), torch.empty(0, dtype=torch.int64)):
        assert stored.train[none].shape == (0, 1, 3, 4)
        assert stored.train[none].dtype == torch.float32
    with pytest.raises(TypeError, match="source: expected a name or a path, got int 3"):
        data.load(3)  # type: ignore[arg-type]


def test_another_default_device_splits_alike(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.random.default_rng(0).random((20, 3, 4)))
    loads = [lambda: data.load("digits"), *(lambda d=d: data.load(tmp_path / "a.npy", on_disk=d) for d in (0, 1))]
    for load in loads:
        before = load()
        with torch.device("meta"):
            after = load()
        assert torch.equal(before.test[:], after.test[:])
