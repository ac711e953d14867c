"""Models of the family, built on `fastgen.nn` and `fastgen.search`; they need the extra `train`."""

import importlib
from typing import Any

from fastgen.check import UserError

# name on the command line -> module and class; a model is fit(images, out, resume=, trainer=), load(run, images),
# sample(n, seed=)
MODELS = {"glann": ("fastgen.models.glann", "GLANN")}


def model_class(name: str) -> Any:
    """The class of a model by its name on the command line."""
    if name not in MODELS:
        raise UserError(f"model: expected one of {', '.join(MODELS)}, got {name!r}")
    module, attribute = MODELS[name]
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if str(error.name).split(".")[0] != "lightning":
            raise
        raise UserError("training needs the package lightning: pip install 'fastgen[train]'") from None
