"""Plans to try on tiny pipelines, and what a pipeline has and gives with one."""

import functools

from support import tiny

from visattn.inject import apply_plan, summary
from visattn.patterns import Dense, Diagonal, Neighborhood
from visattn.plan import Plan, Rule

HEADS = (Diagonal(2), Dense(), Neighborhood((1, 3, 3)), Diagonal(7))
PLAN = Plan((Rule(HEADS),))
OTHER = Plan((Rule(Diagonal(1)),))
# by the step, by the pass, by both
STEPPED = Plan((Rule(HEADS, phase=0), Rule(Diagonal(1), phase=1)), phases=(0.5,))
PASSED = Plan((Rule(HEADS, pass_="cond"),))
VARIED = Plan((Rule(HEADS, pass_="cond"), Rule(Diagonal(1), phase=1)), phases=(0.5,))
KINDS = ("wan21", "cogvideox")


def roles_of(pipe):
    found = {role: getattr(pipe, role, None) for role in ("transformer", "transformer_2")}
    return {role: model for role, model in found.items() if model is not None}


def attention(model):
    return [module for path, module in model.named_modules() if path.endswith("attn1")]


def traces(pipe):
    """What a plan could leave on a pipeline: classes, attributes, hooks and processors."""
    seen = {"pipe": (type(pipe), set(vars(pipe)))}
    for role, model in roles_of(pipe).items():
        for path, module in model.named_modules():
            own = vars(module)
            hooks = {key: dict(value) for key, value in own.items() if "_hooks" in key}
            seen[role, path] = type(module), list(own), hooks, own.get("forward")
            if "processor" in own:
                its = own["processor"]
                seen[role, path, "processor"] = type(its), list(vars(its)), id(its), dict(vars(its))
    return seen


def calls(pipe):
    """Dense and sparse calls of every layer so far."""
    rows = {(row.role, row.layer): row for row in summary(pipe).layers}
    return [(row.dense_calls, row.sparse_calls) for row in rows.values()]


def with_plan(kind, plan, **options):
    """What a new pipeline gives with a plan; with None, without us."""
    pipe = tiny.PIPELINES[kind]()
    if plan is not None:
        apply_plan(pipe, plan)
    return tiny.generate(pipe, **options)


@functools.cache
def usual(kind, plan, **options):
    """The same, computed once."""
    return with_plan(kind, plan, **options)


class Stop(Exception):
    """Raised to interrupt a generation."""
