"""The public functions: conventions, validation, differentiation."""

from fastgen.functional.langevin import langevin_noise, langevin_step_
from fastgen.functional.langevin_mala import langevin_accept_
from fastgen.functional.mmd import IMQ, RBF, Polynomial, mmd, wae_mmd
from fastgen.functional.nearest import Nearest, nearest
from fastgen.functional.perceptual import feature_distance, laplacian_pyramid_loss, lpips_distance

__all__ = [
    "IMQ",
    "RBF",
    "Nearest",
    "Polynomial",
    "feature_distance",
    "langevin_accept_",
    "langevin_noise",
    "langevin_step_",
    "laplacian_pyramid_loss",
    "lpips_distance",
    "mmd",
    "nearest",
    "wae_mmd",
]
