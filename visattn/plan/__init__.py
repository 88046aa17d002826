"""Plans: which attention each head of each layer of a model runs, in which phase and pass. A plan
is data, written as JSON and read strictly; it holds no code."""

from visattn.plan.plan import ANY, PASSES, ROLES, Denoiser, Plan, Rule
from visattn.plan.source import read_plan
from visattn.plan.store import PLAN_FILE

__all__ = ["ANY", "PASSES", "PLAN_FILE", "ROLES", "Denoiser", "Plan", "Rule", "read_plan"]
