"""The public functions: conventions, validation, differentiation."""

from fastgen.functional.perceptual import feature_distance as feature_distance
from fastgen.functional.perceptual import laplacian_pyramid_loss as laplacian_pyramid_loss
from fastgen.functional.perceptual import lpips_distance as lpips_distance
