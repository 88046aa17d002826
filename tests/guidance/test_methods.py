"""Every public method of guidance names its source, its default and its differences."""

import pytest
from method_docs.sources import read_source

import visattn.guidance
from visattn.guidance.method_list import listed_edits, listed_methods
from visattn.guidance.registry import GUIDANCES

# what other methods are made of, or what runs them
PARTS = {"BlockEdit", "Edit", "Guidance", "HeadSet", "LatentUpdate", "ReadTokens", "Reading"}
PARTS |= {"ShareSettings", "State", "SubjectMasks", "TokenReadout"}
RUNNERS = {"caption_score", "guidance_text", "guide", "guided", "parse_guidance", "phrase_tokens"}
RUNNERS |= {"real_tokens", "steer", "update_latents"}
# the guidances above as guiders of diffusers' modular pipelines
FORMS = {"SoftPerturbedGuidance"}
LISTED = listed_methods() + listed_edits()


@pytest.mark.parametrize("method", LISTED, ids=lambda method: method.__name__)
def test_method_names_its_source(method):
    own = read_source(method)
    assert own.source and own.default


def test_no_public_method_is_left_out():
    names = visattn.guidance.__all__
    public = {name for name in names if callable(getattr(visattn.guidance, name))}
    assert public - PARTS - RUNNERS - FORMS == {method.__name__ for method in LISTED}
    assert set(GUIDANCES.values()) <= set(LISTED)
