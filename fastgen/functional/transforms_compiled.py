"""`transforms.apply` within a transform of torch.func within torch.compile. Importing this loads dynamo."""

from typing import Any

import torch

from fastgen.functional import transforms


@torch._dynamo.nonstrict_trace
def apply(place: int, *args: Any) -> Any:
    """Not looked into by dynamo but run where the transforms are real: when the graph is differentiated."""
    return transforms.apply(transforms.known[place], *_emptied(args))


def _emptied(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple([_emptied(v) or None if isinstance(v, tuple) else v for v in values])
