"""Plans: which attention each head of each layer of a model runs, in which phase and pass.

A plan is data, written as JSON and read strictly; it holds no code.
"""

from visattn.plan.hub import PLAN_FILE
from visattn.plan.plan import Plan
from visattn.plan.read import read_plan
from visattn.plan.rule import ANY, PASSES, ROLES, Denoiser, Rule

__all__ = ["ANY", "PASSES", "PLAN_FILE", "ROLES", "Denoiser", "Plan", "Rule", "read_plan"]
