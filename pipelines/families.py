"""The model families that plans can be applied to."""

from visattn.pipelines.cogvideox import COGVIDEOX
from visattn.pipelines.family import Family
from visattn.pipelines.wan import WAN

__all__ = ["FAMILIES"]

# by the class name of the denoiser
FAMILIES: dict[str, Family] = {
    model: family for family in (WAN, COGVIDEOX) for model in family.models
}
