"""The search for heads: planted heads and pairs are found, by frames alone; it goes on where it was
ended; what fails is told."""

import json
import logging
import random

import pytest
import torch
from support import tiny

from visattn.generation.silence_logs import quiet
from visattn.guidance import HeadSet, SoftPAG, guide
from visattn.guidance.head_search import driver as module
from visattn.guidance.head_search.batched_trials import BatchedTrials
from visattn.guidance.head_search.driver import search_heads
from visattn.guidance.head_search.head_log import HeadLog, Place

CALL = {
    "height": 32,
    "width": 32,
    "num_frames": 1,
    "num_inference_steps": 1,
    "guidance_scale": 3.0,
    "max_sequence_length": 10,
}
PROMPTS = ["a red square moves right", "blue circle"]
LAYERS = [f"blocks.{n}.attn1" for n in range(tiny.LAYERS)]
ALL = [(path, head) for path in LAYERS for head in range(tiny.HEADS)]
A, B, C = (LAYERS[1], 2), (LAYERS[2], 0), (LAYERS[0], 3)


@pytest.fixture(scope="module")
def pipe():
    with quiet():
        own = tiny.wan21()
    own.set_progress_bar_config(disable=True)
    return own


def frames_of(pipe, pairs, prompt, seed=0, strength=1.0, scale=3.0):
    """Frames ``[T, H, W, 3]`` by the guidance that users call."""

    def call():
        noise = torch.Generator().manual_seed(seed)
        return pipe(prompt, generator=noise, output_type="pt", **CALL).frames[0]

    if not pairs:
        return call().permute(0, 2, 3, 1)
    with guide(pipe, SoftPAG(HeadSet.of(pairs), strength, scale)):
        return call().permute(0, 2, 3, 1)


class Planted:
    """An objective that knows frames of some sets of heads, and gives the number of the set whose
    frames it is shown; of others ``other``."""

    def __init__(self, pipe, values, prompts=PROMPTS, seeds=(0,), other=0.0):
        self.other = other
        self.seen = []
        self.known = [
            (prompt, frames_of(pipe, pairs, prompt, seed), value)
            for pairs, value in values
            for prompt in prompts
            for seed in seeds
        ]

    def __call__(self, frames, prompt):
        assert frames.shape[1:] == (32, 32, 3) and frames.dtype == torch.float32
        assert 0 <= float(frames.min()) <= float(frames.max()) <= 1
        value = self.other
        for text, own, number in self.known:
            if text == prompt and (own - frames).abs().max() < 1e-5:
                value = number
        self.seen.append((prompt, value))
        return value


def search(pipe, objective, prompts=PROMPTS, **options):
    return search_heads(pipe, objective, prompts, call=CALL, **options)


def mean_red(frames, prompt):
    """An objective by which no two heads are equal."""
    return float(frames[..., 0].double().mean())


# ---- what is found


def test_frames_of_two_sets_differ(pipe):
    """Else the tests below would show nothing."""
    own = [frames_of(pipe, [pair], PROMPTS[0]) for pair in ALL]
    gaps = [(a - b).abs().max() for n, a in enumerate(own) for b in own[:n]]
    assert min(gaps) > 1e-3


@pytest.mark.parametrize("planted", [A, C])
def test_planted_head_is_found_in_the_first_round(pipe, planted):
    objective = Planted(pipe, [([planted], 1.0)], PROMPTS[:1], (0, 5))
    found = search(pipe, objective, PROMPTS[:1], seeds=(0, 5))
    assert list(found) == [planted]
    assert found.provenance["rounds"][0]["added"] == [[*planted, 1.0]]
    assert found.provenance["score"] == {"without": 0.0, "with": 1.0}
    assert found.provenance["rounds"][0]["mean"] == pytest.approx(1 / len(ALL))
    assert len(objective.seen) == 2 * (1 + len(ALL))  # seeds, without and with each head


@pytest.mark.second
def test_planted_pair_needs_rounds(pipe):
    """B is of use with A alone, and C is worth more than B on its own: the two best of isolated
    scores are A and C."""
    values = [
        ([A], 1.0),
        ([C], 0.8),
        ([B], 0.1),
        ([A, C], 1.1),
        ([A, B], 3.0),
        ([B, C], 0.9),
    ]
    objective = Planted(pipe, values, PROMPTS[:1])
    greedy = search(pipe, objective, PROMPTS[:1], rounds=2)
    assert set(greedy) == {A, B}
    assert greedy.provenance["score"] == {"without": 0.0, "with": 3.0}
    assert [row["added"][0][:2] for row in greedy.provenance["rounds"]] == [list(A), list(B)]
    once = search(pipe, objective, PROMPTS[:1], k=2)
    assert set(once) == {A, C}
    assert once.provenance["score"] == {"without": 0.0, "with": 1.1}


def test_equal_heads_are_taken_by_layer_and_number(pipe):
    candidates = {2: [1], 1: [3, 0]}
    found = search(pipe, lambda frames, prompt: 0.5, PROMPTS[:1], k=2, candidates=candidates)
    assert list(found) == [(LAYERS[1], 0), (LAYERS[1], 3)]


def test_the_set_guides_as_it_was_searched(pipe):
    found = search(pipe, mean_red, PROMPTS[:1], strength=0.5, scale=2.0, candidates={1: [2, 3]})
    assert (found.strength, found.scale) == (0.5, 2.0)
    assert found.model == "WanTransformer3DModel" and found.size == (tiny.LAYERS, tiny.HEADS)
    assert found.objective.endswith("test_head_search:mean_red")
    with guide(pipe, SoftPAG(HeadSet.from_json(found.to_json()))):
        noise = torch.Generator().manual_seed(0)
        own = pipe(PROMPTS[0], generator=noise, output_type="pt", **CALL).frames[0]
    score = mean_red(own.permute(0, 2, 3, 1), "")
    assert found.provenance["score"]["with"] == score  # to the bit


def test_kept_heads_are_in_every_candidate(pipe):
    objective = Planted(pipe, [([A], 1.0), ([A, B], 2.0)], PROMPTS[:1])
    found = search(pipe, objective, PROMPTS[:1], keep=HeadSet.of([A]))
    assert set(found) == {A, B}
    again = search(pipe, objective, PROMPTS[:1], keep={1: [2]}, candidates={2: [0]})
    assert again.layers == found.layers
    assert found.provenance["score"] == {"without": 1.0, "with": 2.0}
    assert found.provenance["candidates"] == len(ALL) - 1


# ---- batches, and that it is deterministic


@pytest.mark.parametrize("target", ["value", "mean_query"])
@pytest.mark.parametrize("kind", ["wan21", "cogvideox"])
def test_sets_in_a_batch_are_what_each_is_alone(kind, target):
    """Up to rounding, as products of a larger batch are summed in another order: in float64 to that
    of the frames, which are float32."""
    with quiet():
        own = tiny.PIPELINES[kind]().to(torch.float64)
    call = {**CALL, "num_frames": 9, "num_inference_steps": 2}
    made = BatchedTrials(
        own,
        call,
        dict.fromkeys(made_layers(own), tiny.HEADS),
        0.5,
        3.0,
        "all",
        target,
    )
    first, second = made_layers(own)[:2]
    sets = [{first: {0: 1.0}}, {first: {0: 0.5}, second: {3: 1.0}}, {}]
    together = made.frames(sets, PROMPTS[0], 3)
    alone = [made.frames([each], PROMPTS[0], 3)[0] for each in sets]
    for a, b in zip(together, alone, strict=True):
        assert (a - b).abs().max() < 1e-6
    gaps = [(a - b).abs().max() for n, a in enumerate(alone) for b in alone[:n]]
    assert min(gaps) > 5e-5


def made_layers(pipe):
    return [path for path, _ in pipe.transformer.named_modules() if path.endswith("attn1")]


@pytest.mark.parametrize("batch", [1, 3])
def test_batch_changes_nothing_and_neither_does_another_run(pipe, batch):
    options = {"rounds": 2, "candidates": {0: [0, 1, 3], 2: [1, 3]}}
    alone = search(pipe, mean_red, PROMPTS[:1], **options)
    for _ in range(2):
        own = search(pipe, mean_red, PROMPTS[:1], batch=batch, **options)
        assert set(own) == set(alone)
        for a, b in zip(own.provenance["rounds"], alone.provenance["rounds"], strict=True):
            assert a["added"][0][2] == pytest.approx(b["added"][0][2], abs=1e-5)
        if batch == 1:
            assert own == alone


def test_batch_that_is_too_large_for_memory_is_halved(pipe, monkeypatch):
    frames, sizes = BatchedTrials.frames, []

    def limited(self, sets, prompt, seed):
        sizes.append(len(sets))
        if len(sets) > 2:
            raise torch.OutOfMemoryError("out of memory: tried to allocate")
        return frames(self, sets, prompt, seed)

    monkeypatch.setattr(BatchedTrials, "frames", limited)
    own = search(pipe, mean_red, PROMPTS[:1], candidates={0: None}, batch=4)
    assert sizes == [1, 4, 2, 2]
    assert own.provenance["failures"] == []
    assert set(own) == set(search(pipe, mean_red, PROMPTS[:1], candidates={0: None}))


# ---- going on


FEW = {0: [1], 1: [1, 2, 3]}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("batch", [1, 2])
def test_going_on_after_the_end_of_a_process_at_any_byte(pipe, tmp_path, batch):
    whole = tmp_path / "whole.jsonl"
    options = {"rounds": 2, "candidates": FEW, "batch": batch}
    found = search(pipe, mean_red, resume=whole, **options)
    data = whole.read_bytes()
    lines = data.count(b"\n")
    assert lines == 1 + len(PROMPTS) * (1 + 4 + 3)
    draw = random.Random(3)
    some = [draw.randrange(len(data)) for _ in range(3)]
    for cut in [7, len(data) - 1, *some] if batch == 1 else some[:2]:
        rest = tmp_path / "rest.jsonl"
        rest.write_bytes(data[:cut])
        calls = []
        own = search(pipe, counted(calls), resume=rest, **options)
        assert own == found
        assert rest.read_bytes() == data
        assert len(calls) >= lines - 1 - max(0, data[:cut].count(b"\n") - 1)
        if batch == 1:
            assert len(calls) == lines - 1 - max(0, data[:cut].count(b"\n") - 1)


def counted(calls):
    def mean_red_too(frames, prompt):
        calls.append(prompt)
        return mean_red(frames, prompt)

    mean_red_too.__qualname__ = mean_red.__qualname__
    return mean_red_too


def test_interrupt_goes_through_and_a_further_run_goes_on(pipe, tmp_path):
    log = tmp_path / "log.jsonl"
    options = {"rounds": 2, "candidates": FEW, "resume": log}
    found = search(pipe, mean_red, rounds=2, candidates=FEW)
    for stop in (3, 1, 5):
        calls = []

        def interrupted(frames, prompt, calls=calls, stop=stop):
            if len(calls) == stop:
                raise KeyboardInterrupt
            calls.append(1)
            return mean_red(frames, prompt)

        interrupted.__qualname__ = mean_red.__qualname__
        with pytest.raises(KeyboardInterrupt):
            search(pipe, interrupted, **options)
    assert log.read_bytes().count(b"\n") == 1 + 9
    assert search(pipe, mean_red, **options) == found
    plain = tiny.generate(pipe, steps=1)
    assert torch.equal(plain, tiny.generate(tiny.wan21(), steps=1))  # nothing is left on it


def test_a_log_serves_more_rounds(pipe, tmp_path):
    log = tmp_path / "log.jsonl"
    search(pipe, mean_red, PROMPTS[:1], candidates=FEW, resume=log)
    calls = []
    more = search(pipe, counted(calls), PROMPTS[:1], candidates=FEW, rounds=2, resume=log)
    assert len(calls) == 3
    assert more == search(pipe, mean_red, PROMPTS[:1], candidates=FEW, rounds=2)


def test_log_of_other_settings_is_refused(pipe, tmp_path, monkeypatch):
    log = tmp_path / "log.jsonl"
    given = {"candidates": {0: [0]}, "resume": log}
    search(pipe, mean_red, PROMPTS[:1], **given)
    data = log.read_bytes()
    for changed, word in [
        ({"scale": 5.0}, "scale is 3.0 in the file and 5.0 in this search"),
        ({"strength": 0.5}, "strength is 1.0 in the file"),
        ({"policy": "image_rows"}, "policy is 'all' in the file"),
        ({"seeds": (1,)}, "pairs is"),
    ]:
        with pytest.raises(ValueError, match=word):
            search(pipe, mean_red, PROMPTS[:1], **given, **changed)
    with pytest.raises(ValueError, match=r"objective is .*mean_red.* in the file"):
        search(pipe, lambda frames, prompt: 0.0, PROMPTS[:1], **given)
    with quiet(), pytest.raises(ValueError, match=r"whole pipeline is .* in the file"):
        search(tiny.wan21(seed=4), mean_red, PROMPTS[:1], **given)
    monkeypatch.setattr(module, "versions", lambda names: dict.fromkeys(names, "9"))
    with pytest.raises(ValueError, match=r"versions is .* in the file"):
        search(pipe, mean_red, PROMPTS[:1], **given)
    assert log.read_bytes() == data


DAMAGE = {
    "a text": b"hello",
    "a text with lines": b"hello\nyou\n",
    "another json": b'{"schema": "visattn.plan/1"}\n',
    "a newer version": b'{"schema": "visattn.head_search/2", "settings": {}}\n',
    "no text": bytes(range(256)),
}


@pytest.mark.parametrize("data", DAMAGE.values(), ids=DAMAGE)
def test_what_is_no_log_is_refused_and_kept(tmp_path, data):
    path = tmp_path / "log"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"log' .*name another file|name another file") as error:
        HeadLog(path, {"a": 1})
    assert "\n" not in str(error.value)
    assert path.read_bytes() == data


LINE = {"among": "", "head": 0, "layer": "a", "pair": 0, "round": 1}


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b'{"score": 1}',
        json.dumps(LINE | {"key": "other", "score": 1}).encode(),
        json.dumps(LINE | {"key": "KEY"}).encode(),
        json.dumps(LINE | {"key": "KEY", "score": "1"}).encode(),
        json.dumps(LINE | {"key": "KEY", "score": 1, "error": "b"}).encode(),
        json.dumps(LINE | {"key": "KEY", "score": 1, "head": None}).encode(),
        json.dumps(LINE | {"key": "KEY", "score": 1, "pair": "0"}).encode(),
        json.dumps(LINE | {"key": "KEY", "score": float("nan")}).encode(),
    ],
)
def test_a_line_that_is_damaged_in_the_midst_is_refused(tmp_path, line):
    path = tmp_path / "log"
    log = HeadLog(path, {"a": 1})
    log.put(Place("", "a", 0, 0), 0.5, 1)
    log.close()
    data = path.read_bytes() + line.replace(b"KEY", log.key.encode()) + b"\n"
    log.put(Place("", "a", 1, 0), 0.5, 1)
    log.close()
    path.write_bytes(data + path.read_bytes().splitlines(True)[-1])
    with pytest.raises(ValueError, match="line 3 of resume"):
        HeadLog(path, {"a": 1})


# ---- what fails


@pytest.mark.parametrize("batch", [1, 2])
def test_candidates_that_fail_are_left_out_and_told(pipe, tmp_path, caplog, batch):
    planted = Planted(pipe, [([A], 2.0), ([A, B], 3.0), ([C], -1.0)])

    def objective(frames, prompt):
        value = planted(frames, prompt)
        if value < 0 and prompt == PROMPTS[1]:
            raise RuntimeError("no face\nwas found")
        return float("nan") if value == 3.0 else value

    options = {"candidates": {1: [2], 2: [0, 1], 0: [3]}, "rounds": 2, "batch": batch}
    with caplog.at_level(logging.WARNING, "visattn"):
        found = search(pipe, objective, resume=tmp_path / "log", **options)
    failures = [
        {"item": f"{C[0]}:{C[1]}", "round": 1, "error": "RuntimeError: no face was found"},
        {"item": f"{B[0]}:{B[1]}", "round": 2, "error": "the objective is nan"},
    ]
    assert found.provenance["failures"] == failures
    assert set(found) == {A, (LAYERS[2], 1)}
    assert "left out 2 of 4 candidates: " in caplog.text and "no face" in caplog.text
    data = (tmp_path / "log").read_bytes()
    assert search(pipe, objective, resume=tmp_path / "log", **options) == found
    assert (tmp_path / "log").read_bytes() == data
    kept = [line for line in data.splitlines(True) if b"no face" not in line]
    (tmp_path / "log").write_bytes(b"".join(kept))
    again = search(pipe, planted_name(planted, objective), resume=tmp_path / "log", **options)
    assert [row["item"] for row in again.provenance["failures"]] == [f"{B[0]}:{B[1]}"]


def planted_name(planted, objective):
    """The same objective without what fails for C."""

    def mended(frames, prompt):
        value = planted(frames, prompt)
        return float("nan") if value == 3.0 else value

    mended.__qualname__ = objective.__qualname__
    return mended


def test_memory_that_runs_out_for_one_alone_is_a_failure(pipe, monkeypatch):
    frames = BatchedTrials.frames

    def limited(self, sets, prompt, seed):
        if any(own.get(LAYERS[0], {}).get(1) for own in sets):
            raise MemoryError
        return frames(self, sets, prompt, seed)

    monkeypatch.setattr(BatchedTrials, "frames", limited)
    found = search(pipe, mean_red, PROMPTS[:1], candidates={0: None}, batch=2)
    assert found.provenance["failures"] == [
        {"item": f"{LAYERS[0]}:1", "round": 1, "error": "out of memory: MemoryError"}
    ]


def test_errors_of_the_pipeline_are_not_taken_for_those_of_a_candidate(pipe):
    with pytest.raises(ValueError, match="divisible"):
        search_heads(pipe, mean_red, PROMPTS, call={**CALL, "height": 17})


def test_when_all_fail_it_says_so(pipe):
    def never(frames, prompt):
        raise KeyError("face")

    with pytest.raises(ValueError, match=r"fails without any candidate.*KeyError"):
        search(pipe, never)
    plain = frames_of(pipe, [], PROMPTS[0])

    def only_plain(frames, prompt):
        return {True: 1.0}[torch.equal(frames, plain)]

    with pytest.raises(ValueError, match=r"all 2 candidates failed; the last error: KeyError"):
        search(pipe, only_plain, PROMPTS[:1], candidates={0: [0, 1]})
    fine = [plain, frames_of(pipe, [(LAYERS[0], 1)], PROMPTS[0])]

    def only_one(frames, prompt):
        return {True: 1.0}[any((frames - own).abs().max() < 1e-5 for own in fine)]

    found = search(pipe, only_one, PROMPTS[:1], candidates={0: [0, 1], 1: [2]}, rounds=3)
    assert list(found) == [(LAYERS[0], 1)] and len(found.provenance["failures"]) == 2


# ---- progress and refusals


def test_progress_tells_what_is_left(pipe):
    told = []
    search(
        pipe, mean_red, rounds=2, k=2, candidates=FEW, progress=lambda *line: told.append(line)
    )
    stages = list(dict.fromkeys(stage for stage, *_ in told))
    assert stages == ["without the heads", "round 1 of 2", "round 2 of 2", "the set"]
    total = 2 * (1 + 4 + 2 + 1)
    assert [done for _, done, *_ in told] == list(range(1, total + 1))
    assert {whole for _, _, whole, _ in told} == {total}
    assert told[-1][3] == 0 and all(left > 0 for *_, left in told[:-1])


WRONG = {
    "objective": ({"objective": "scorer"}, TypeError, "objective='scorer' must be a function"),
    "no prompt": ({"prompts": []}, ValueError, r"prompts=\[\] must hold at least one value"),
    "text": ({"prompts": "a red square"}, TypeError, "must be a list of texts"),
    "prompt twice": ({"prompts": ["a", "a"]}, ValueError, "none twice"),
    "seed": ({"seeds": (-1,)}, ValueError, "seeds has -1"),
    "no seed": ({"seeds": ()}, ValueError, "seeds="),
    "k": ({"k": 0}, ValueError, "k=0"),
    "rounds": ({"rounds": 13}, ValueError, "more than the 12 candidates"),
    "batch": ({"batch": 0}, ValueError, "batch=0"),
    "strength": ({"strength": 0.0}, ValueError, "perturbs nothing"),
    "strength above": ({"strength": 2.0}, ValueError, "strength=2.0"),
    "scale": ({"scale": 0.0}, ValueError, "perturbs nothing"),
    "policy": ({"policy": "text"}, ValueError, "policy='text'"),
    "layer": ({"candidates": {7: None}}, ValueError, "names the layer 7; there are 3 layers"),
    "path": ({"candidates": {"blocks.9": [0]}}, ValueError, "names the layer 'blocks.9'"),
    "head": ({"candidates": {0: [4]}}, ValueError, "names head 4 of blocks.0.attn1"),
    "list": ({"candidates": [3]}, TypeError, "candidates="),
    "kept": ({"keep": HeadSet.of([("blocks.0.attn1", 9)])}, ValueError, "keep names head 9"),
    "call": ({"call": {"step": 3}}, ValueError, "call has the key 'step'; for WanPipeline it may"),
    "own": ({"call": {"generator": None}}, ValueError, "call has the key 'generator'"),
    "folder": ({"resume": "no/log"}, OSError, "is in a folder that does not exist"),
}


@pytest.mark.parametrize(("given", "kind", "words"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_named(pipe, given, kind, words):
    own = {"objective": mean_red, "prompts": PROMPTS, "call": CALL} | given
    with pytest.raises(kind, match=words) as error:
        search_heads(pipe, own.pop("objective"), own.pop("prompts"), **own)
    assert "\n" not in str(error.value)
    with pytest.raises(TypeError, match="is only a denoiser"):
        search_heads(pipe.transformer, mean_red, PROMPTS)
