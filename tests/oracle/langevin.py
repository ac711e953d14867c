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


def statistics(
    x: np.ndarray,
    grad: np.ndarray,
    noise: np.ndarray,
    step_size: float,
    noise_scale: float,
    low: float = -np.inf,
    high: float = np.inf,
    noise_first: bool = False,
) -> np.ndarray:
    """[C, 3], element by element: gradient norm, elements clamped, elements not finite."""
    found = np.zeros((len(x), 3))
    for chain, rows in enumerate(zip(x, grad, noise, strict=True)):
        for value, slope, normal in zip(*(row.reshape(-1) for row in rows), strict=True):
            moved = value - step_size * slope
            result = (min(max(moved, low), high) if noise_first else moved) + noise_scale * normal
            outside = not low <= result <= high or (noise_first and not low <= moved <= high)
            found[chain] += slope**2, outside and not np.isnan(result), not np.isfinite(moved + result)
    found[:, 0] = np.sqrt(found[:, 0])
    return found


def log_alpha(
    x: np.ndarray,
    grad: np.ndarray,
    y: np.ndarray,
    y_grad: np.ndarray,
    rise: np.ndarray,
    step_size: float,
    noise_scale: float,
    prior_scale: float | None = None,
    grad_clip: float | None = None,
) -> np.ndarray:
    """The Metropolis ratio from the two Gaussian densities themselves; [C, D] each, `rise` the energies' difference."""

    def forward(at: np.ndarray, slope: np.ndarray) -> np.ndarray:
        slope = slope if grad_clip is None else np.clip(slope, -grad_clip, grad_clip)
        return at - step_size * (slope if prior_scale is None else slope + at / prior_scale**2)

    def density(to: np.ndarray, mean: np.ndarray) -> np.ndarray:
        return -((to - mean) ** 2).sum(1) / (2 * noise_scale**2)

    if prior_scale is not None:
        rise = rise + ((y**2).sum(1) - (x**2).sum(1)) / (2 * prior_scale**2)
    temperature = noise_scale**2 / (2 * step_size)
    return -rise / temperature + density(x, forward(y, y_grad)) - density(y, forward(x, grad))
