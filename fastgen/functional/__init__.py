"""The public functions: conventions, validation, differentiation."""

from fastgen.functional.nearest import Nearest, nearest

__all__ = ["Nearest", "nearest"]
