"""The MMD penalty of Wasserstein auto-encoders, by its authors' conventions and by those of its popular ports."""

from torch import Tensor

from fastgen import check
from fastgen.functional.mmd import mmd
from fastgen.functional.mmd_kernels import IMQ, RBF
from fastgen.functional.mmd_median import median_squared_distance

PRIORS = ("normal", "sphere", "uniform")
CONVENTIONS = ("tolstikhin", "pythae", "pytorch-vae", "schelotto")
SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


def wae_mmd(
    sample_qz: Tensor,
    sample_pz: Tensor,
    *,
    kernel: str = "imq",
    prior: str = "normal",
    prior_scale: float = 1.0,
    convention: str = "tolstikhin",
) -> Tensor:
    """The MMD penalty of Wasserstein auto-encoders, Σ_{i≠j}(k_qq + k_pp)/(n² − n) − 2 Σ k_qp / n².

    Args:
        sample_qz: [n, D], codes; float64, float32, bfloat16 or float16.
        sample_pz: [n, D], as many draws from the prior.
        kernel: "imq" or "rbf", as the convention has them.
        prior: "normal", "sphere" or "uniform": decides the width of the inverse multiquadrics. The ports know "normal"
            alone.
        prior_scale: standard deviation of the normal prior; the other priors take 1.
        convention: whose number it is, with s ∈ {.1, .2, .5, 1, 2, 5, 10} and σ = prior_scale:

            "tolstikhin": the authors' code.
                imq: Σ_s s·C/(s·C + d²), C = 2·D·σ² for the normal prior, 2 on the sphere, D for the uniform one.
                rbf: exp(−d²/2h), h = the (n² − n)/2-th largest of the n² cross distances d² plus the one of the n²
                distances among the codes, their zero diagonal included. The gradient flows through both.
            "pythae": `WAE_MMD` of pythae 0.1.2, whose kernel_bandwidth is σ.
                imq: the authors'. rbf: exp(−d²/(2·D·σ²)), a fixed width in place of the medians.
                (Its InfoVAE uses the same kernels.)
            "pytorch-vae": `WAE_MMD.compute_mmd` of AntixK/PyTorch-VAE with reg_weight = 1/(n² − n), as its
                loss_function has it, and latent_var = 2·σ².
                imq: one scale, C/(10⁻⁷ + C + d²), C = 2·D·latent_var; pairs i = j are left out of the cross term too,
                and all three are divided by n² − n. rbf: exp(−d²/(D·n)), the batch size being taken for the dimension,
                of all pairs with the diagonals, divided by n² and then by n² − n once more: some n² times too small.
                It does not use latent_var: a prior_scale other than 1 is refused.
            "schelotto": schelotto/Wasserstein-AutoEncoders: n times the penalty, which its training loop divides by n.
                imq: the authors' with σ = 1. rbf: Σ_s exp(−(2·D/s)·d²), multiplied where the authors divide: next to
                nothing at any distance that occurs. Both have σ = 1: another prior_scale is refused.

    Returns:
        The penalty, [], before the factor λ; float64 for float64 points, else float32. It may be negative.

    Raises:
        TypeError, ValueError: as `mmd`; different numbers of codes and draws, fewer than two; a prior or scale that the
            convention does not have.

    Notes:
        Deterministic, O(n·D) memory, differentiable as `mmd` and `median_squared_distance` are.

    Source: `mmd_penalty` in wae.py of github.com/tolstikhin/wae; Tolstikhin et al., Wasserstein Auto-Encoders (2018),
    algorithm 2; for the ports the files named.
    """
    check.tensor("sample_qz", sample_qz, ndim=(2,))
    check.tensor("sample_pz", sample_pz, ndim=(2,))
    if sample_qz.shape != sample_pz.shape:
        raise ValueError(f"sample_pz: expected sample_qz's shape {list(sample_qz.shape)}, got {list(sample_pz.shape)}")
    check.choice("prior", prior, PRIORS)
    prior_scale = check.number("prior_scale", prior_scale, above=0, least=1e-40, most=1e40)
    check.choice("kernel", kernel, ("imq", "rbf"))
    check.choice("convention", convention, CONVENTIONS)
    n, d = sample_qz.shape
    if n < 2 or d < 1:
        raise ValueError(f"sample_qz: expected at least 2 points and 1 coordinate, got shape {list(sample_qz.shape)}")
    if prior != "normal":
        if convention != "tolstikhin":
            raise ValueError(f"prior: expected 'normal' with {convention=}, got {prior!r}")
        if prior_scale != 1:
            raise ValueError(f"prior_scale: expected 1 with {prior=}, got {prior_scale!r}")
    if prior_scale != 1 and (convention == "schelotto" or (convention == "pytorch-vae" and kernel == "rbf")):
        raise ValueError(f"prior_scale: expected 1 with {convention=} and {kernel=}, got {prior_scale!r}")
    base = {"normal": 2.0 * d * prior_scale**2, "sphere": 2.0, "uniform": float(d)}[prior]

    if convention == "pytorch-vae":
        if kernel == "rbf":
            # Its bandwidth depends on n: scaled points, since a kernel's parameters are constants of a compiled graph.
            scale = (d * n / 2.0) ** -0.5
            unit = RBF((1.0,))
            return mmd(sample_qz * scale, sample_pz * scale, kernel=unit, estimator="biased") / (n * n - n)
        c = 2.0 * base
        single = mmd(sample_qz, sample_pz, kernel=IMQ((1.0,), base=c + 1e-7), estimator="u_statistic")
        return single * (c / (c + 1e-7))
    if convention == "schelotto":
        # exp(−(2D/s) d²) is the Gaussian of bandwidth √(s/4D).
        own = IMQ(SCALES, base=base) if kernel == "imq" else RBF(tuple((s / (4.0 * d)) ** 0.5 for s in SCALES))
        return mmd(sample_qz, sample_pz, kernel=own) * n
    if kernel == "imq":
        return mmd(sample_qz, sample_pz, kernel=IMQ(SCALES, base=base))
    if convention == "pythae":
        return mmd(sample_qz, sample_pz, kernel=RBF(((base / 2.0) ** 0.5,)))
    half = (n * n - n) // 2
    width = median_squared_distance(sample_qz, sample_pz, rank=half)
    width = (width + median_squared_distance(sample_qz, rank=half, diagonal=True)).rsqrt()
    # Divided by √h the points want bandwidth 1: so the gradient finds its way through h.
    qz, pz = (points.to(width.dtype) * width for points in (sample_qz, sample_pz))
    return mmd(qz, pz, kernel=RBF((1.0,)))
