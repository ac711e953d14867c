"""The public functions: conventions, validation, differentiation."""

from fastgen.functional.langevin import langevin_noise, langevin_step_
from fastgen.functional.mmd import IMQ, RBF, Polynomial, mmd, wae_mmd
from fastgen.functional.nearest import Nearest, nearest
from fastgen.functional.perceptual import (
    feature_distance,
    gram_matrix,
    laplacian_pyramid_loss,
    lpips_distance,
    lpips_projection,
)

__all__ = [
    "IMQ",
    "RBF",
    "Nearest",
    "Polynomial",
    "feature_distance",
    "gram_matrix",
    "langevin_noise",
    "langevin_step_",
    "laplacian_pyramid_loss",
    "lpips_distance",
    "lpips_projection",
    "mmd",
    "nearest",
    "wae_mmd",
]
