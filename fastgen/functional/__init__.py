"""The public functions: conventions, validation, differentiation."""

from fastgen.functional.langevin import langevin_noise, langevin_step_
from fastgen.functional.langevin_mala import langevin_accept_
from fastgen.functional.mmd import mmd
from fastgen.functional.mmd_energy import energy_distance
from fastgen.functional.mmd_kernels import IMQ, RBF, Energy, Laplacian, Polynomial, RationalQuadratic
from fastgen.functional.mmd_median import median_squared_distance
from fastgen.functional.mmd_permutation import PermutationTest, mmd_permutation_test
from fastgen.functional.mmd_wae import wae_mmd
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
    "Energy",
    "Laplacian",
    "Nearest",
    "PermutationTest",
    "Polynomial",
    "RationalQuadratic",
    "energy_distance",
    "feature_distance",
    "gram_matrix",
    "langevin_accept_",
    "langevin_noise",
    "langevin_step_",
    "laplacian_pyramid_loss",
    "lpips_distance",
    "lpips_projection",
    "median_squared_distance",
    "mmd",
    "mmd_permutation_test",
    "nearest",
    "wae_mmd",
]
