"""Rows of the inputs of a denoiser, and what it gives with another prediction."""

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from visattn.guidance.guiders.denoiser_io import part_of, sample_of, with_sample

X = torch.arange(8).reshape(4, 2)


def test_rows_are_taken_where_there_is_a_batch():
    rows = [2, 3, 2, 3]
    assert part_of("hidden_states", X, 4, rows).equal(X[rows])
    assert part_of("hidden_states", X, 4, slice(2, 4)).equal(X[2:])
    for name, value, batch in (
        ("img_ids", X, 4),
        ("timestep", X, 2),
        ("timestep", torch.tensor(3), 4),
        ("return_dict", False, 4),
    ):
        assert part_of(name, value, batch, rows) is value
    assert part_of("hidden_states", X, 4, None) is X


def test_rows_of_tensors_in_other_inputs():
    given = {"ip": [X, X[:1]], "scale": 0.5}
    found = part_of("joint_attention_kwargs", given, 4, [3])
    assert found["ip"][0].equal(X[[3]])
    assert found["ip"][1].equal(X[:1])
    assert found["scale"] == 0.5
    assert given["ip"][0] is X
    assert part_of("skip_layers", (1, 2), 2, [0]) == (1, 2)


def test_prediction_is_read_and_replaced():
    for out in ((X, 1), Transformer2DModelOutput(sample=X), X):
        assert sample_of(out) is X
        new = with_sample(out, X + 1)
        assert type(new) is type(out)
        assert sample_of(new).equal(X + 1)
    assert with_sample((X, 1), X)[1] == 1
