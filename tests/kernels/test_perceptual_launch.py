"""What Triton's own launcher makes of real calls: every kind of them compiles, with integers that are 1 and tensors
that are None turned into constants. A GPU would compile at the call; the interpreter does neither."""

from collections.abc import Callable

CODE = """
from fastgen.kernels import launch


def maps(*shape, last=False, dtype=torch.float32):
    f = torch.randn(shape).to(dtype)
    return f.contiguous(memory_format=torch.channels_last) if last else f


def layer(f, g, grad, sides, last=False):
    return aot.launched(launch.lpips_layer, f, g, torch.ones(f.shape[1]), 1e-10, False, last, grad, sides)


def project(f, dim, seed, number, inside=False, last=False):
    return aot.launched(launch.lpips_project, f, torch.ones(f.shape[1]), dim, seed, number, 1e-10, inside, last)


def unproject(f, dim, seed, number, inside=False, last=False):
    given = torch.ones(len(f), dim), f, torch.ones(f.shape[1])
    return aot.launched(launch.lpips_project_backward, *given, seed, number, 1e-8, inside, last)


one, some = maps(1, 1, 1, 1), maps(2, 20, 5, 3)
half = maps(2, 64, 8, 8, last=True, dtype=torch.bfloat16)
calls = {
    "value": layer(some, some, None, 0) + layer(one, one, None, 0) + layer(half, half, None, 0, last=True),
    "gradients": layer(some, some, torch.ones(2), 2) + layer(one, one, torch.ones(1), 1),
    "projection": project(some, 1000, 7, 0) + project(one, 1, 1, 1) + project(half, 64, 2**32 + 1, 2, last=True),
    "its gradient": unproject(some, 1000, 7, 0) + unproject(one, 1, 1, 1, inside=True)
    + unproject(half, 64, 2**32 + 1, 2, last=True),
    "features": [
        spec for f in (one, some, half) for grad in (None, torch.ones(len(f)))
        for spec in aot.launched(launch.feature_distance, f, f, grad is None, grad)
    ],
}
"""


def test_every_kind_of_call_compiles(compiled: Callable[[str], dict[str, list[str]]]) -> None:
    assert compiled(CODE) == {
        "value": ["lpips_value"] * 3,
        "gradients": ["lpips_grad"] * 2,
        "projection": ["lpips_scale", "project"] * 3,
        "its gradient": ["unproject"] * 3,
        "features": ["feature"] * 6,
    }
