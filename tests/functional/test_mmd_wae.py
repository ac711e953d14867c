"""The WAE penalty and its ports, each against its own code written out plainly in float64."""

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from fastgen import functional as F

SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


def distances(a: Tensor, b: Tensor) -> Tensor:
    return a.square().sum(1, keepdim=True) + b.square().sum(1) - 2 * a @ b.T


def tolstikhin(qz: Tensor, pz: Tensor, kernel: str, prior: str = "normal", scale: float = 1.0) -> Tensor:
    """mmd_penalty of tolstikhin/wae (wae.py), statement by statement."""
    n = len(qz)
    half_size = (n * n - n) // 2
    distances_pz, distances_qz, cross = distances(pz, pz), distances(qz, qz), distances(qz, pz)
    off = 1 - torch.eye(n, dtype=qz.dtype)
    if kernel == "rbf":
        sigma2 = torch.topk(cross.reshape(-1), half_size).values[half_size - 1]
        sigma2 = sigma2 + torch.topk(distances_qz.reshape(-1), half_size).values[half_size - 1]
        res1 = torch.exp(-distances_qz / 2.0 / sigma2) + torch.exp(-distances_pz / 2.0 / sigma2)
        res1 = (res1 * off).sum() / (n * n - n)
        return res1 - torch.exp(-cross / 2.0 / sigma2).sum() * 2.0 / (n * n)
    base = {"normal": 2 * qz.shape[1] * scale**2, "sphere": 2.0, "uniform": qz.shape[1]}[prior]
    stat = torch.zeros((), dtype=qz.dtype)
    for s in SCALES:
        c = base * s
        res1 = ((c / (c + distances_qz) + c / (c + distances_pz)) * off).sum() / (n * n - n)
        stat = stat + res1 - (c / (c + cross)).sum() * 2.0 / (n * n)
    return stat


def pythae(z: Tensor, z_prior: Tensor, kernel: str, scale: float = 1.0) -> Tensor:
    """mmd_loss of pythae 0.1.2's WAE_MMD.loss_function with its default scales; kernel_bandwidth is `scale`."""
    n, d = z.shape

    def k(a: Tensor, b: Tensor) -> Tensor:
        squared = (a.unsqueeze(1) - b.unsqueeze(0)).square().sum(-1)
        base = 2.0 * d * scale**2
        if kernel == "rbf":
            return torch.exp(-squared / base)
        return torch.stack([s * base / (s * base + squared) for s in SCALES]).sum(0)

    k_z, k_prior, k_cross = k(z, z), k(z_prior, z_prior), k(z, z_prior)
    mmd_z = (k_z - k_z.diag().diag()).sum() / ((n - 1) * n)
    mmd_prior = (k_prior - k_prior.diag().diag()).sum() / ((n - 1) * n)
    return mmd_z + mmd_prior - 2 * k_cross.sum() / n**2


def pytorch_vae(z: Tensor, prior_z: Tensor, kernel: str, scale: float = 1.0) -> Tensor:
    """compute_mmd of AntixK/PyTorch-VAE's WAE_MMD at reg_weight 1 before its bias_corr; latent_var 2·scale²."""
    n, d = z.shape
    weight = 1.0 / (n * (n - 1))

    def k(x1: Tensor, x2: Tensor) -> Tensor:
        x1, x2 = x1.unsqueeze(-2).expand(n, n, d), x2.unsqueeze(-3).expand(n, n, d)
        if kernel == "rbf":
            return torch.exp(-((x1 - x2).pow(2).mean(-1) / x1.size(1)))
        c = 2 * d * 2.0 * scale**2
        values = c / (1e-7 + c + (x1 - x2).pow(2).sum(-1))
        return values.sum() - values.diag().sum()

    return weight * k(prior_z, prior_z).mean() + weight * k(z, z).mean() - 2 * weight * k(prior_z, z).mean()


def schelotto(x: Tensor, y: Tensor, kernel: str, scale: float = 1.0) -> Tensor:
    """imq_kernel and rbf_kernel of schelotto/Wasserstein-AutoEncoders (after its pull request 10)."""
    n, h_dim = x.shape
    off = 1 - torch.eye(n, dtype=x.dtype)
    stats = torch.zeros((), dtype=x.dtype)
    for s in SCALES:
        if kernel == "rbf":
            c = 2 * h_dim * 1.0 / s
            parts = [torch.exp(-c * distances(a, b)) for a, b in ((x, x), (y, y), (x, y))]
        else:
            c = 2 * h_dim * 1.0 * s
            parts = [c / (c + distances(a, b)) for a, b in ((x, x), (y, y), (x, y))]
        stats = stats + (off * (parts[0] + parts[1])).sum() / (n - 1) - parts[2].sum() * 2.0 / n
    return stats


PORTS = {"tolstikhin": tolstikhin, "pythae": pythae, "pytorch-vae": pytorch_vae, "schelotto": schelotto}


def samples(n: int, d: int, spread: float = 1.3) -> tuple[Tensor, Tensor]:
    return torch.randn(n, d, dtype=torch.float64) * spread + 0.2, torch.randn(n, d, dtype=torch.float64)


CASES = [
    (convention, kernel, scale)
    for convention in PORTS
    for kernel in ("imq", "rbf")
    for scale in (1.0, 0.7)
    if scale == 1 or convention == "pythae" or (kernel == "imq" and convention != "schelotto")
]


@pytest.mark.parametrize(("convention", "kernel", "scale"), CASES)
@pytest.mark.parametrize(("n", "d"), [(100, 8), (2, 1), (37, 5)])
def test_each_convention_is_its_own_code(convention: str, kernel: str, scale: float, n: int, d: int) -> None:
    """Values and both gradients, the medians' included."""
    # schelotto's Gaussians are zero at any ordinary distance: there is nothing to compare but close points.
    spread = 0.05 if convention == "schelotto" and kernel == "rbf" else 1.0
    qz, pz = (points * spread for points in samples(n, d))
    a, b = qz.clone().requires_grad_(), pz.clone().requires_grad_()
    want = PORTS[convention](a, b, kernel, scale=scale)
    want_gradients = torch.autograd.grad(want, (a, b))
    qz.requires_grad_()
    pz.requires_grad_()
    got = F.wae_mmd(qz, pz, kernel=kernel, prior_scale=scale, convention=convention)
    assert abs(float(want.detach())) > 1e-12
    assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-11, abs=2e-14)
    for g, w in zip(torch.autograd.grad(got, (qz, pz)), want_gradients, strict=True):
        assert (g - w).norm() <= 1e-10 * w.norm()


@pytest.mark.parametrize("prior", ["normal", "sphere", "uniform"])
@pytest.mark.parametrize("kernel", ["imq", "rbf"])
def test_every_prior(prior: str, kernel: str) -> None:
    qz, pz = samples(60, 6)
    if prior == "sphere":
        pz = torch.nn.functional.normalize(pz, dim=1)
    if prior == "uniform":
        pz = torch.rand_like(pz) * 2 - 1
    want = tolstikhin(qz, pz, kernel, prior)
    assert float(F.wae_mmd(qz, pz, kernel=kernel, prior=prior)) == pytest.approx(float(want), rel=1e-12, abs=2e-14)


def test_the_gaussians_width_carries_gradient() -> None:
    """Without it the gradient is another: so a width held still would be seen."""
    qz, pz = samples(40, 3)
    qz.requires_grad_()
    (whole,) = torch.autograd.grad(F.wae_mmd(qz, pz, kernel="rbf"), qz)
    half = (40 * 40 - 40) // 2
    with torch.no_grad():
        width = F.median_squared_distance(qz, pz, rank=half) + F.median_squared_distance(qz, rank=half, diagonal=True)
    (still,) = torch.autograd.grad(F.mmd(qz, pz, kernel=F.RBF((float(width) ** 0.5,))), qz)
    assert (whole - still).norm() > 0.01 * whole.norm()
    assert torch.autograd.gradcheck(lambda q: F.wae_mmd(q, pz[:7], kernel="rbf"), qz[:7].detach().requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", ["imq", "rbf"])
def test_lower_precision(dtype: torch.dtype, kernel: str) -> None:
    qz, pz = (points.to(dtype) for points in samples(101, 8))
    want = tolstikhin(qz.double(), pz.double(), kernel)
    qz.requires_grad_()
    got = F.wae_mmd(qz, pz, kernel=kernel)
    assert got.dtype == torch.float32
    assert float(got.detach()) == pytest.approx(float(want), abs=2e-6)
    got.backward()
    assert qz.grad is not None
    assert qz.grad.dtype == dtype


@pytest.mark.filterwarnings("ignore:.*TF32.*")
@pytest.mark.parametrize("convention", ["tolstikhin", "pytorch-vae"])
def test_compiles_whole_and_once_for_every_n(convention: str) -> None:
    torch._dynamo.reset()
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=count, dynamic=True)
    def penalty(q: Tensor, p: Tensor) -> Tensor:
        return F.wae_mmd(q * 2, p, kernel="rbf", convention=convention)

    compiled = []
    for n in (12, 30, 41):
        qz, pz = samples(n, 4)
        a, b = qz.clone().requires_grad_(), qz.clone().requires_grad_()
        got, want = penalty(a, pz), F.wae_mmd(b * 2, pz, kernel="rbf", convention=convention)
        got.backward()
        want.backward()
        torch.testing.assert_close(got, want)
        assert a.grad is not None
        torch.testing.assert_close(a.grad, b.grad)
        compiled.append(count.frame_count)
    assert compiled[0] == compiled[-1]  # (torch may restart its analysis within the first call)


def test_what_is_not_finite_is_nan() -> None:
    qz, pz = samples(9, 3)
    qz[2, 1] = float("nan")
    for convention in PORTS:
        for kernel in ("imq", "rbf"):
            assert F.wae_mmd(qz, pz, kernel=kernel, convention=convention).isnan()


ok = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kernel": "laplacian"}, "kernel: expected one of 'imq', 'rbf'"),
        ({"convention": "keras"}, "convention: expected one of 'tolstikhin', 'pythae', 'pytorch-vae', 'schelotto'"),
        ({"convention": "pythae", "prior": "sphere"}, "prior: expected 'normal' with convention='pythae'"),
        ({"prior": "uniform", "prior_scale": 2.0}, "prior_scale: expected 1 with prior='uniform'"),
        ({"convention": "schelotto", "prior_scale": 2.0}, "prior_scale: expected 1 with convention='schelotto'"),
        ({"convention": "pytorch-vae", "kernel": "rbf", "prior_scale": 2.0}, "prior_scale: expected 1"),
    ],
)
def test_bad_options(options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        F.wae_mmd(ok, ok, **options)


def test_two_codes_at_least() -> None:
    with pytest.raises(ValueError, match="sample_qz: expected at least 2 points"):
        F.wae_mmd(ok[:1], ok[:1])
