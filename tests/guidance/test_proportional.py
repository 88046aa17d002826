"""Proportional attention is as sharp at another number of tokens as in training."""

import math

import pytest
from support import tiny

from visattn.guidance import Temperature, steer
from visattn.guidance.edits.query_edits import ProportionalAttention


@pytest.mark.parametrize(("kind", "keys"), [("wan21", 72), ("cogvideox", 82)])
def test_it_is_a_temperature_of_the_number_of_keys(kind, keys):
    pipe = tiny.PIPELINES[kind]()
    plain = tiny.generate(pipe)
    temperature = math.sqrt(math.log(20) / math.log(keys))
    with steer(pipe, Temperature(temperature=temperature)):
        expected = tiny.generate(pipe)
    with steer(pipe, ProportionalAttention(trained=20)):
        found = tiny.generate(pipe)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5
    assert not found.equal(plain)


def test_the_size_of_training_changes_nothing():
    pipe = tiny.wan21()
    plain = tiny.generate(pipe)
    with steer(pipe, ProportionalAttention(trained=72)):
        assert tiny.generate(pipe).equal(plain)


def test_bad_arguments_are_told():
    with pytest.raises(ValueError, match="must be at least 2"):
        ProportionalAttention(trained=1)
    with pytest.raises(TypeError, match="must be an integer"):
        ProportionalAttention(trained=3.5)
