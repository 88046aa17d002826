"""The searched plan that lies in the checkout: for the small model, found by ``auto``, with its
receipt."""

import json
from pathlib import Path

from visattn.generation import default_model
from visattn.generation.prompts import model_prompts
from visattn.patterns import Pattern
from visattn.plan import Plan, read_plan

PLANS = Path(__file__).resolve().parents[2] / "assets" / "plans"


def test_auto_finds_the_searched_plan():
    plan = read_plan("auto", model_path=default_model())
    assert plan == Plan.from_pretrained(PLANS / "tiny-wan")
    config = json.loads((Path(default_model()) / "transformer" / "config.json").read_text())
    denoiser = plan.denoisers["transformer"]
    layers = tuple(f"blocks.{n}.attn1" for n in range(config["num_layers"]))
    assert denoiser.heads == config["num_attention_heads"]
    plan.fits("transformer", denoiser, layers)
    assert plan.evidence["pairs"] == 20
    assert plan.evidence["speedup_measured"] > 1
    grid = plan.geometry.grids[0][1]
    for rule in plan.rules:
        for pattern in rule.heads:
            pattern.check(grid)
            assert isinstance(pattern, Pattern)


def test_its_receipt_is_one_page():
    page = (PLANS / "tiny-wan" / "report.html").read_text()
    assert page.count("<!DOCTYPE html>") == 1
    assert 100_000 < len(page) < 1_000_000


def test_prompts_that_were_held_out_were_not_calibrated_on():
    used, unseen = model_prompts(default_model())
    assert not set(used) & set(unseen)
    assert len(set(unseen)) == 20
    plan = Plan.from_pretrained(PLANS / "tiny-wan")
    assert {prompt for prompt, _ in plan.provenance["calibrated_on"]} == set(used)
