"""The model families that plans can be applied to."""

from visattn.pipelines.cogvideox import COGVIDEOX
from visattn.pipelines.family import Family
from visattn.pipelines.flux import FLUX
from visattn.pipelines.hunyuanvideo import HUNYUANVIDEO
from visattn.pipelines.sd3 import SD3
from visattn.pipelines.wan import WAN

__all__ = ["FAMILIES"]

# by the class name of the denoiser
FAMILIES: dict[str, Family] = {
    model: family for family in (WAN, COGVIDEOX, HUNYUANVIDEO, FLUX, SD3) for model in family.models
}
