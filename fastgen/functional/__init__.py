"""The public functions: conventions, validation, differentiation."""

from fastgen.functional.mmd import IMQ as IMQ
from fastgen.functional.mmd import RBF as RBF
from fastgen.functional.mmd import Polynomial as Polynomial
from fastgen.functional.mmd import mmd as mmd
from fastgen.functional.mmd import wae_mmd as wae_mmd
