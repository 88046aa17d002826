"""The caches of the package, and the tensors that are alive."""

import gc
import warnings

import torch

from visattn.attention.lowering import MAPS


def clear_caches():
    """Forget the maps of all patterns and what functions of the package remember."""
    MAPS.clear()
    clear_functions()


def clear_functions():
    for item in gc.get_objects():
        if hasattr(type(item), "cache_clear") and item.__module__.startswith("visattn"):
            item.cache_clear()


def live_tensors():
    """All tensors that something refers to, but for those that only stand for others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of objects that are deprecated to look at
        return [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
