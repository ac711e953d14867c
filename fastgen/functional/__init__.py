"""The public functions: conventions, validation, differentiation."""

from fastgen.functional.langevin import langevin_noise as langevin_noise
from fastgen.functional.langevin import langevin_step_ as langevin_step_
