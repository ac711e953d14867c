"""The naive meaning: Philox on Python integers, Box–Muller and the update in float64 with NumPy's functions."""

import numpy as np


def philox(counter: tuple[int, ...], seed: int) -> list[int]:
    """Salmon et al., SC 2011, section 3.3 and table 2, as written there."""
    c = list(counter)
    key = [seed % 2**32, seed // 2**32]
    for _ in range(10):
        product = [0xD2511F53 * c[0], 0xCD9E8D57 * c[2]]
        c = [
            product[1] // 2**32 ^ c[1] ^ key[0],
            product[1] % 2**32,
            product[0] // 2**32 ^ c[3] ^ key[1],
            product[0] % 2**32,
        ]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return c


def words(elements: int, chain: int, seed: int, step: int) -> np.ndarray:
    """[ceil(elements / 4), 4]"""
    groups = (elements + 3) // 4
    found = [philox((group, step, chain % 2**32, chain // 2**32), seed) for group in range(groups)]
    return np.array(found, dtype=np.uint32).reshape(groups, 4)


def pair(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Two words to two normals in float64, by functions that share nothing with the polynomials."""
    u = np.float32((a.astype(np.int64) // 2) | 1).astype(np.float64) / 2**31
    radius = np.sqrt(-2 * np.log(u)) * np.where(b >= 2**31, -1, 1)
    turned = (b.astype(np.int64) * 4) % 2**32 + 2
    t = np.where(turned >= 2**31, turned - 2**32, turned)
    angle = np.float32(t).astype(np.float64) * (np.pi / 4 / 2**31)
    swap = b % 2**31 >= 2**30
    first, second = np.where(swap, np.sin(angle), np.cos(angle)), np.where(swap, np.cos(angle), np.sin(angle))
    return np.stack((radius * first, radius * second), axis=-1)


def normals(elements: int, chains: list[int], seed: int, step: int) -> np.ndarray:
    """[C, elements] float64"""
    rows = []
    for chain in chains:
        w = words(elements, chain, seed, step)
        rows.append(np.concatenate((pair(w[:, 0], w[:, 1]), pair(w[:, 2], w[:, 3])), axis=1).reshape(-1)[:elements])
    return np.array(rows).reshape(len(chains), elements)


def step(
    x: np.ndarray,
    grad: np.ndarray,
    noise: np.ndarray,
    step_size: float | np.ndarray,
    noise_scale: float | np.ndarray,
    prior_scale: float | None = None,
    grad_clip: float | None = None,
    low: float | None = None,
    high: float | None = None,
    noise_first: bool = False,
) -> np.ndarray:
    def clamp(v: np.ndarray) -> np.ndarray:
        v = v if low is None else np.maximum(v, low)
        return v if high is None else np.minimum(v, high)

    drift = grad if grad_clip is None else np.clip(grad, -grad_clip, grad_clip)
    if prior_scale is not None:
        drift = drift + x / prior_scale**2
    moved = x - step_size * drift
    return clamp((clamp(moved) if noise_first else moved) + noise_scale * noise)
