"""Models of the family, built on `fastgen.nn` and `fastgen.search`; they need the extra `train`.

A model is a `model.Model`: a class with

    arguments                             what it was made with, for run.json
    stages(images, training=)             its trainings in turn, from which come
        fit(images, out, resume=, trainer=)   train into the folder `out`, with a `Run`
        load(run, images)                     classmethod: the model of a run
    sample(n, seed=)                      images [n, C, H, W] in [0, 1]
    on_disk                               True where it reads `Stored` images, which need not fit into memory
    not_for_trainer                       options of Lightning's Trainer that the command line does not offer for it

and, where they mean something for it, what `fastgen evaluate` draws and measures:

    reconstructions(images, n)            (originals, reconstructions), n of the training images each
    interpolations(rows, steps)           images [rows · steps, C, H, W], a row each from one code to another
    pictures(folder)                      writes further pictures, returns their names without ".png"
    measure(images)                       in place of the classifier's figures: a dict for metrics.json
"""

import importlib
from typing import Any

from fastgen.check import UserError

# name on the command line -> module and class
MODELS = {
    "glann": ("fastgen.models.glann", "GLANN"),
    "wae-mmd": ("fastgen.models.wae", "WAEMMD"),
    "gmmn": ("fastgen.models.gmmn", "GMMN"),
    "glo": ("fastgen.models.glo_model", "GLOModel"),
    "imle": ("fastgen.models.imle_image", "IMLE"),
    "imle-reverse": ("fastgen.models.imle_reverse", "IMLEReverse"),
    "rs-imle": ("fastgen.models.imle_image", "RSIMLE"),
    "deep-frame": ("fastgen.models.frame", "DeepFRAME"),
    "generative-convnet": ("fastgen.models.frame", "GenerativeConvNet"),
    "wframe": ("fastgen.models.frame", "WFRAME"),
}

# `fastgen compare NAME`: a class with run(images, out, resume=, trainer=) -> dict, which writes compare.json and
# pictures, and a function `table(dict)` beside it
COMPARISONS = {"frame": ("fastgen.models.frame_compare", "CompareFRAME")}


def model_class(name: str, among: dict[str, tuple[str, str]] = MODELS) -> Any:
    """The class of a model, or of a comparison, by its name on the command line."""
    if name not in among:
        raise UserError(f"model: expected one of {', '.join(among)}, got {name!r}")
    module, attribute = among[name]
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if str(error.name).split(".")[0] != "lightning":
            raise
        raise UserError("training needs the package lightning: pip install 'fastgen[train]'") from None
