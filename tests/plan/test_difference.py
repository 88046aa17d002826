"""What is different between two plans: settings, and heads by layer, phase and pass."""

from dataclasses import replace

import pytest

from visattn import Grid, TokenLayout
from visattn.patterns import Dense, Diagonal, Radial, Skip
from visattn.plan import Denoiser, Plan, Rule
from visattn.plan.show.difference import difference
from visattn.plan.show.terminal import difference_text

A, B, C = Diagonal(8), Diagonal(16), Skip()
LAYERS = [f"blocks.{n}.attn1" for n in range(4)]
PATHS = {"transformer": LAYERS}
GRID = TokenLayout(Grid(3, 8, 8))
PLAN = Plan(
    (Rule(A), Rule((A, B, A, B), LAYERS[2])),
    dense_layers=(0,),
    geometry=GRID,
    denoisers={"transformer": Denoiser("WanTransformer3DModel", 4, 4)},
    provenance={"seed": 1, "kind": "search"},
)


def changes(old, new, **options):
    own = difference(old, new, paths=PATHS, **options)
    assert own.note is None
    return [
        ([int(layer.split(".")[1]) for layer in c.layers], c.when, c.heads, c.old, c.new)
        for c in own.changes
    ]


def with_rules(*rules, **options):
    return replace(PLAN, rules=PLAN.rules + rules, **options)


def test_equal_plans_are_the_same():
    own = difference(PLAN, Plan.from_json(PLAN.to_json()), paths=PATHS)
    assert own.same
    assert difference_text(own, "a", "b") == "the same"
    assert own.numbers()["same"] is True


def test_other_rules_for_the_same_heads_are_the_same():
    written = replace(PLAN, rules=(*PLAN.rules, Rule(A, LAYERS[1]), Rule(A, LAYERS[3], phase=0)))
    assert written != PLAN
    assert difference(PLAN, written, paths=PATHS).same


def test_heads_of_one_layer():
    new = with_rules(Rule((C, B, C, A), LAYERS[2]))
    assert changes(PLAN, new) == [
        ([2], "always", (0, 2), A, C),
        ([2], "always", (3,), B, A),
    ]


def test_neighbouring_layers_stand_together():
    new = replace(PLAN, rules=(Rule(C), *PLAN.rules[1:]))
    assert changes(PLAN, new) == [
        ([1], "always", (0, 1, 2, 3), A, C),
        ([3], "always", (0, 1, 2, 3), A, C),
    ]
    assert changes(replace(PLAN, rules=(Rule(A),)), replace(PLAN, rules=(Rule(B),))) == [
        ([1, 2, 3], "always", (0, 1, 2, 3), A, B)
    ]


def test_dense_layers_are_heads_that_change():
    own = difference(PLAN, replace(PLAN, dense_layers=(0, -1)), paths=PATHS)
    assert own.settings == {"dense_layers": ([0], [0, -1])}
    assert [(c.layers, c.old, c.new) for c in own.changes] == [((LAYERS[3],), A, Dense())]


def test_passes():
    assert changes(PLAN, with_rules(Rule(C, LAYERS[1], pass_="uncond"))) == [
        ([1], "uncond", (0, 1, 2, 3), A, C)
    ]
    both = with_rules(Rule(C, LAYERS[1]), Rule(B, LAYERS[1], pass_="cond"))
    assert changes(PLAN, both) == [
        ([1], "other passes", (0, 1, 2, 3), A, C),
        ([1], "cond", (0, 1, 2, 3), A, B),
    ]
    kept = with_rules(Rule(C, LAYERS[1]), Rule(A, LAYERS[1], pass_="cond"))
    assert changes(PLAN, kept) == [([1], "other passes", (0, 1, 2, 3), A, C)]


def test_phases():
    old = replace(PLAN, phases=(0.5,))
    new = replace(old, rules=(*old.rules, Rule(C, LAYERS[1], phase=1)))
    assert changes(old, new) == [([1], "phase 1", (0, 1, 2, 3), A, C)]
    later = replace(new, phases=(0.75,))
    assert changes(new, later) == [([1], "steps 50%-75%", (0, 1, 2, 3), C, A)]
    assert changes(PLAN, replace(PLAN, phases=(0.5,))) == []
    own = difference(PLAN, replace(PLAN, phases=(0.5,)), paths=PATHS)
    assert own.settings == {"phases": ([], [0.5])}
    assert difference_text(own, "a", "b").endswith("all heads run the same")


def test_settings_are_compared_key_by_key():
    new = replace(
        PLAN, dense_steps=(2, 0.5), model="some/model", provenance={"seed": 2, "kind": "search"}
    )
    assert difference(PLAN, new, paths=PATHS).settings == {
        "dense_steps": ([0, 0], [2, 0.5]),
        "model": (None, "some/model"),
        "provenance.seed": (1, 2),
    }


def test_densities_are_those_of_each_plan():
    new = with_rules(Rule(C))
    own = difference(PLAN, new, paths=PATHS)
    a, b = A.density(GRID), B.density(GRID)
    assert own.density == (pytest.approx((1 + 2 * a + (a + b) / 2) / 4), pytest.approx(0.25))
    other = replace(new, geometry=TokenLayout(Grid(3, 4, 4)))
    own = difference(PLAN, other, paths=PATHS)
    assert own.densities[0][A] == a
    assert difference(PLAN, new, TokenLayout(Grid(2, 4, 4)), PATHS).densities[0][A] > a


def test_plans_that_name_no_model():
    own = difference(Plan((Rule(A),)), Plan((Rule(B),)), GRID)
    [change] = own.changes
    assert (change.layers, change.heads, change.when) == (("any",), None, "always")
    assert own.density == (A.density(GRID), B.density(GRID))
    assert "all layers" in difference_text(own, "a", "b")
    own = difference(Plan((Rule(A),)), Plan((Rule(A), Rule((A, B), "x.1"))), GRID)
    assert [(c.layers, c.heads) for c in own.changes] == [(("x.1",), (1,))]


def test_a_plan_of_a_model_beside_a_pattern():
    assert changes(Plan((Rule(A),)), PLAN) == [
        ([0], "always", (0, 1, 2, 3), A, Dense()),
        ([2], "always", (1, 3), A, B),
    ]


def test_plans_of_two_models_are_compared_by_their_settings():
    new = replace(PLAN, denoisers={"transformer": Denoiser("WanTransformer3DModel", 4, 8)})
    for other in (new, Plan((Rule((A,) * 8),))):
        own = difference(PLAN, other, paths=PATHS)
        assert not own.same
        assert own.changes == ()
        assert "different models" in own.note
        assert own.settings
        assert own.note in difference_text(own, "a", "b")


def test_text_and_numbers():
    new = with_rules(Rule((C, B, C, B), LAYERS[2]), provenance={"seed": 1, "kind": "x" * 200})
    own = difference(PLAN, new, paths=PATHS)
    lines = difference_text(own, "a\x1b[2J", "b").splitlines()
    assert lines[0] == "old: a\\x1b[2J"
    assert "    -> " + "x" * 100 + "..." in lines
    row = "transformer.blocks.2.attn1 always 0.087 -> 0.000 0, 2 of 4 p1 -> skip"
    assert row in [" ".join(line.split()) for line in lines]
    assert lines[-1] == f"p1 = {A!r}, density 0.087"
    [change] = own.numbers()["changes"]
    assert change["layers"] == [LAYERS[2]]
    assert change["heads"] == [0, 2]
    assert (change["old"], change["new"]) == (repr(A), repr(C))
    assert change["new_density"] == 0


def test_roles_are_told_apart():
    old = Plan((Rule(Radial()), Rule(A, role="transformer_2")))
    own = difference(old, Plan((Rule(Radial()), Rule(B, role="transformer_2"))))
    assert [(c.denoiser.role, c.old, c.new) for c in own.changes] == [("transformer_2", A, B)]
