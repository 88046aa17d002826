"""A search of models with text in the sequence, padded or not, and blocks of one stream; of videos
and of images."""

import json

import pytest
import torch
from support import search_runner, tiny, tiny_images

from visattn.generation import run_job
from visattn.inject import apply_plan, observe, sparse, summary
from visattn.patterns import Diagonal
from visattn.readout import attention_rows
from visattn.search.measure.output_losses import CandidatePool, CandidateScorer
from visattn.search.measure.replay import CallRecorder, Replay
from visattn.search.measure.target import SearchTarget
from visattn.search.measure.tile_grid import tile_grids
from visattn.search.receipt import NO_SCORER
from visattn.selectors import TopBlocks

TRUE = {"negative_prompt": "a blue circle", "true_cfg_scale": 2.0}
IMAGE = {"height": 32, "width": 48, "num_inference_steps": 3}
MODELS = {
    "hunyuanvideo": (tiny.hunyuanvideo, search_runner.CALL | TRUE, 3),
    "flux": (tiny_images.flux, IMAGE, 4),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", MODELS)
def test_a_plan_is_found_shown_and_runs(name, tmp_path, monkeypatch):
    search_runner.make_up_seconds(monkeypatch.setattr)
    make, call, layers = MODELS[name]
    result = search_runner.run(None, candidates=("band", "stencil"), make=make, call=call)
    assert result.report["failures"] == []
    assert NO_SCORER in result.report["notes"]
    assert all(row["flips"] == "" for row in result.report["table"])
    assert len({(row["role"], row["layer"]) for row in result.report["heads"]}) == layers
    (chosen,) = [row for row in result.report["table"] if row["chosen"]]
    assert chosen["density"] < 1 < chosen["predicted"]
    assert (chosen["flicker"] is None) == (name == "flux")
    result.save(tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["heads"]
    pipe = make()
    job = SearchTarget(pipe, call, None).job("a red square", 0)
    apply_plan(pipe, result.plan)
    run_job(pipe, job)
    assert any(row.sparse_calls for row in summary(pipe).layers)


def errors(length):
    """Of a pool on a generation of HunyuanVideo, whose text has room for so many tokens."""
    pipe = tiny.hunyuanvideo()
    subject = SearchTarget(pipe, {}, None)
    pool = CandidatePool((("band", Diagonal(5)), ("band", Diagonal(20))), (), {})
    grids = tile_grids(tiny.layout("hunyuanvideo"), 16)
    scorer = CandidateScorer(pool, subject.weights, {0, 1}, grids, 4, 4)
    with observe(pipe, scorer):
        tiny.generate(pipe, steps=2, negative_prompt=None, max_sequence_length=length)
    return torch.stack(scorer.errors)


def test_padding_does_not_count():
    """The errors are those of the text without it, 6 tokens."""
    padded, bare = errors(10), errors(6)
    assert padded.shape == (6, tiny.HEADS, 3, 3)  # calls, heads, candidates with Skip, losses
    torch.testing.assert_close(padded, bare, rtol=1e-4, atol=1e-6)


def test_dynamic_candidates_do_not_see_padding():
    """One that keeps all blocks makes no error, whatever the padding holds."""
    pipe = tiny.hunyuanvideo()
    pool = CandidatePool((), (("top", TopBlocks(1.0)),), {})
    grids = tile_grids(tiny.layout("hunyuanvideo"), 16)
    scorer = CandidateScorer(pool, SearchTarget(pipe, {}, None).weights, {0}, grids, 4, 4)
    with observe(pipe, scorer):
        tiny.generate(pipe, steps=1)
    assert float(torch.stack(scorer.errors)[..., 0, :2].max()) < 1e-10


def test_rows_without_some_keys():
    q, k = torch.randn(2, 12, 8), torch.randn(1, 12, 8)
    valid = torch.arange(12) % 5 != 3
    (chunk,) = attention_rows(q, k, torch.arange(3), valid=valid)
    logits = (q[:, :3] @ k.mT * 8**-0.5).masked_fill(~valid, -torch.inf)
    torch.testing.assert_close(chunk.weights, logits.softmax(-1))
    torch.testing.assert_close(chunk.lse, logits.logsumexp(-1))
    assert (chunk.weights[..., ~valid] == 0).all()


def test_error_is_that_of_true_guidance():
    """And not of the scale that the model is told."""
    pipe = tiny.hunyuanvideo()
    plan = Diagonal(5)
    found = {}
    for scale in (1.5, 3.0):
        recorder = CallRecorder(pipe, [1], scale)
        with recorder.listening():
            tiny.generate(pipe, steps=2, true_cfg_scale=scale)
        passes = {own.name: own.output.double() for own in recorder.calls}
        replay = Replay(pipe, recorder.calls)
        with sparse(replay.stand_in, plan):
            planned = {own.name: replay._run(own).double() for own in recorder.calls}
        exact, other = (x["uncond"] + scale * (x["cond"] - x["uncond"]) for x in (passes, planned))
        found[scale] = replay.error(plan)
        assert found[scale] == pytest.approx(float((other - exact).norm() / exact.norm()) ** 2)
    assert found[1.5] != pytest.approx(found[3.0], rel=0.01)


def test_error_of_the_second_denoiser_is_that_of_its_own_guidance():
    pipe = tiny.wan22()
    recorder = CallRecorder(pipe, range(3))
    with recorder.listening():
        tiny.generate(pipe, guidance_scale=3.0, guidance_scale_2=1.5)
    found = {(own.role, own.guidance) for own in recorder.calls}
    assert found == {("transformer", 3.0), ("transformer_2", 1.5)}
