"""Persistent chains for training energy-based models: a buffer of states that lives on the device."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastgen import check
from fastgen.functional.langevin_mala import decisions, fresh_normals, fresh_uniforms
from fastgen.reference.langevin import STEPS


class ReplayBuffer(nn.Module):
    """`capacity` chains on the device: draw some, a share of them begun anew, sample on from there, put them back.

    Args:
        capacity: number of chains kept, > 0.
        shape: a chain's shape, without the batch.
        reinit_probability: each chain drawn is replaced by a fresh one with this probability, independently of the
            others: a draw of 62 bits against probability·2⁶².
        init: what fresh chains are: "uniform" within value_range, or "normal", standard.
        value_range: (low, high) of "uniform", and of the values that uint8 storage can hold.
        dtype: of the storage: float32, bfloat16, or uint8, which keeps round(255·(x − low)/(high − low)), clamped, and
            only with init="uniform". `sample` gives float32 whatever is stored.
        seed: 0 <= seed < 2⁶⁴, of every draw here. Use another one for the sampler.

    Methods:
        sample(n) -> (x [n, *shape] float32, index [n] int64): n distinct chains out of capacity, all subsets and orders
            equally likely. Nothing is stored yet, fresh chains included: `update` does.
        update(index, x): scatter back, x [n, *shape] of any float type, all of it finite.

    Raises:
        TypeError, ValueError: wrong type, shape or range; n > capacity; NaN or infinity in what is to be kept, as
        stored; a state dict of another dtype or value_range.

    Notes:
        Deterministic: draw t is a function of (seed, t) alone, the same bits on CPU and GPU, whatever torch's
        generators have done; t counts the calls of `sample`, modulo 2²⁸ − 1. State, seed and t are in `state_dict`: a
        run that was broken off goes on with the same draws; value_range is there too, to be compared. On a GPU `sample`
        waits for nothing, `update` for its check. `to(device)` moves the buffer; a cast such as `half()` leaves the
        storage's type alone. Not differentiable.

    Source:
        Du and Mordatch, NeurIPS 2019, section 3.1; Grathwohl et al., ICLR 2020 (JEM: capacity 10,000, 5 %).
    """

    storage: Tensor
    key: Tensor

    def __init__(
        self,
        capacity: int,
        shape: tuple[int, ...],
        *,
        reinit_probability: float = 0.05,
        init: str = "uniform",
        value_range: tuple[float, float] = (-1.0, 1.0),
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.capacity = capacity = check.integer("capacity", capacity, least=1)
        for name, given, meant in (("shape", shape, "sizes"), ("value_range", value_range, "(low, high)")):
            if not isinstance(given, (tuple, list)):
                raise TypeError(f"{name}: expected a tuple of {meant}, got {check.describe(given)}")
        if len(value_range) != 2:
            raise ValueError(f"value_range: expected (low, high), got {value_range!r}")
        self.shape = tuple(check.integer(f"shape[{i}]", size, least=1) for i, size in enumerate(shape))
        self.reinit_probability = check.number("reinit_probability", reinit_probability, least=0.0, most=1.0)
        self.init = check.choice("init", init, ("uniform", "normal"))
        # Values are made in float32.
        self.low, self.high = (
            check.number(f"value_range[{i}]", v, dtype=torch.float32) for i, v in enumerate(value_range)
        )
        if not self.low < self.high:
            raise ValueError(f"value_range: expected low < high, got {value_range!r}")
        apart = np.float32(self.low) < np.float32(self.high)
        if not (apart and self.high - self.low >= torch.finfo(torch.float32).tiny):
            raise ValueError(f"value_range: expected low < high in float32, got {value_range!r}")
        check.number("value_range: high - low", self.high - self.low, dtype=torch.float32)
        if dtype not in (torch.float32, torch.bfloat16, torch.uint8):
            raise TypeError(f"dtype: expected float32, bfloat16 or uint8, got {dtype}")
        if dtype == torch.uint8 and init == "normal":
            raise ValueError("dtype: expected float32 or bfloat16 for init='normal', which has no range, got uint8")
        seed = check.integer("seed", seed, least=0, most=2**64 - 1)
        with torch.inference_mode(False), torch.no_grad():  # else nothing could be written outside of it
            # The seed, and the number of draws made.
            key = torch.tensor([seed - 2**64 if seed >= 2**63 else seed, 0], device=device)
            self.register_buffer("key", key)
            self.register_buffer("storage", torch.empty(capacity, *self.shape, dtype=dtype, device=device))
            for first in range(0, capacity, 1024):  # the storage alone is large
                index = torch.arange(first, min(first + 1024, capacity), device=device)
                self.storage[index] = self._stored(self._fresh(index, torch.full_like(key[1], STEPS - 1)))

    def extra_repr(self) -> str:
        kept = check.short(self.storage.dtype)
        options = f"reinit_probability={self.reinit_probability}, init={self.init!r}"
        return f"{self.capacity}, {self.shape}, {options}, value_range={(self.low, self.high)}, {kept}"

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Moves between devices, but never a cast: the storage's type is the buffer's own, and so are its contents."""
        storage = self.storage
        super()._apply(fn, recurse)
        if self.storage.dtype != storage.dtype:
            self.storage = storage.to(self.storage.device)
        return self

    @torch.no_grad()
    def sample(self, n: int) -> tuple[Tensor, Tensor]:
        n = check.integer("n", n, least=0, most=self.capacity)
        seed, draw = self.key[0], self.key[1]
        key, chance = decisions(torch.arange(self.capacity, device=self.key.device), seed=seed, step=draw).unbind(1)
        # A random key for each chain, the smallest n: 62 bits, so that ties are out of the question.
        index = key.topk(n, largest=False, sorted=True).indices
        renewed = chance[index] < round(self.reinit_probability * 2**62)
        x = self._values(self.storage[index])
        if x.device.type == "cpu":
            x[renewed] = self._fresh(index[renewed], draw)
        else:  # which rows they are is not known here
            x = torch.where(renewed.view([-1] + [1] * len(self.shape)), self._fresh(index, draw), x)
        self.key[1].add_(1).remainder_(STEPS - 1)  # the last number made the storage
        return x, index

    @torch.no_grad()
    def update(self, index: Tensor, x: Tensor) -> None:
        check.tensor("index", index, dtypes=(torch.int64,), ndim=(1,))
        check.tensor("x", x)
        if x.shape != (len(index), *self.shape):
            raise ValueError(f"x: expected shape {[len(index), *self.shape]}, got {list(x.shape)}")
        for name, value in (("index", index), ("x", x)):
            if value.device != self.storage.device:
                raise ValueError(f"{name}: expected the buffer's device, {self.storage.device}, got {value.device}")
        stored = self._stored(x)
        kept = x if stored.dtype == torch.uint8 else stored  # a cast may overflow; uint8 is clamped
        finite = check.finite_rows(kept)
        inside = (index >= 0) & (index < self.capacity)
        if not bool((finite & inside).all()):
            if not bool(inside.all()):
                wrong = int(index[~inside][0])
                raise ValueError(f"index: expected numbers >= 0 and <= {self.capacity - 1}, got {wrong}")
            row, dtype = int((~finite).nonzero()[0, 0]), check.short(kept.dtype)
            raise ValueError(f"x: expected finite numbers, got NaN or infinity in row {row}, as {dtype}")
        self.storage.index_copy_(0, index, stored)

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.low, self.high], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Compared before anything was loaded."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        storage = state_dict.get(name := f"{prefix}storage")
        if isinstance(storage, Tensor):
            check.tensor(name, storage, dtypes=(self.storage.dtype,))  # else torch would cast codes to values
        # A state saved before the range was kept has none.
        found = state_dict.setdefault(name := f"{prefix}_extra_state", self.get_extra_state())
        check.tensor(name, found, dtypes=(torch.float64,), ndim=(1,))
        if found.tolist() != [self.low, self.high]:
            raise ValueError(f"{name}: expected the value_range {[self.low, self.high]}, got {found.tolist()}")
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def _fresh(self, index: Tensor, draw: Tensor) -> Tensor:
        make = fresh_normals if self.init == "normal" else fresh_uniforms
        x = make(index, math.prod(self.shape), seed=self.key[0], step=draw)
        if self.init == "uniform":
            x = x * (self.high - self.low) + self.low
        return x.view(len(index), *self.shape)

    def _values(self, stored: Tensor) -> Tensor:
        if stored.dtype == torch.uint8:
            return stored.to(torch.float32) * ((self.high - self.low) / 255) + self.low
        return stored.to(torch.float32)

    def _stored(self, x: Tensor) -> Tensor:
        if self.storage.dtype == torch.uint8:
            scaled = (x.to(torch.float32) - self.low) * (255 / (self.high - self.low))
            return scaled.round().clamp(0, 255).to(torch.uint8)
        return x.to(self.storage.dtype)
