"""Train the small text-to-video model that ships with the repository, from nothing.

    python scripts/train_tiny_wan.py --preset gpu                 # all of it, on a GPU
    python scripts/train_tiny_wan.py --preset cpu --minutes 60    # one hour; again goes on
    python scripts/train_tiny_wan.py --preset cpu --evaluate 100 --samples
    python scripts/train_tiny_wan.py --preset cpu --export assets/models/tiny-wan

First the autoencoder, then its decoder alone, then the denoiser with its text encoder. The output
folder holds a checkpoint of each; a run that finds some goes on from there to the same result.
Needs scikit-learn and scikit-image, for handwritten digits and photographs.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import torch  # noqa: E402
from tiny_wan import autoencoder as ae  # noqa: E402
from tiny_wan import card, evaluation  # noqa: E402
from tiny_wan import denoiser as dn  # noqa: E402
from tiny_wan.captions import search_prompts  # noqa: E402
from tiny_wan.checkpoint import load_checkpoint  # noqa: E402
from tiny_wan.muon import muon_for  # noqa: E402
from tiny_wan.parts import (  # noqa: E402
    build_autoencoder,
    build_pipeline,
    build_tokenizer,
    in_half_precision,
    save_pipeline,
)
from tiny_wan.presets import PRESETS, Grid, Preset, clip_size  # noqa: E402
from tiny_wan.stages import Clock, Stage, random_numbers, say, train  # noqa: E402
from torch import Tensor  # noqa: E402

from visattn.generation.checksums import write_checksums  # noqa: E402
from visattn.generation.clip_shapes import SHAPES_FILE  # noqa: E402
from visattn.generation.prompts import PROMPTS_FILE  # noqa: E402

# Parameters that are no hidden matrices: Adam steps them.
ADAM_WORDS = ("patch_embedding", "proj_out", "scale_shift_table", "time", "text_encoder")
AVERAGE = 0.998  # of the denoiser's weights, kept from step to step
SAMPLES = 16  # in the contact sheets
DEFAULT_STEPS = 20  # of a video at the default shape
DEFAULT_PAIRS = 20  # evaluated at the default shape
STRUCTURE_PAIRS = 2  # whose attention is measured


def train_autoencoder(preset: Preset, folder: Path, clock: Clock) -> bool:
    """Train or go on training the autoencoder; return whether it is finished."""
    path = folder / "autoencoder.pt"
    torch.manual_seed(preset.seed)
    model = build_autoencoder(preset)
    ae.initialise(model)
    state = load_checkpoint(path)
    if state is None:
        code = ae.fit_linear_code(preset)
    else:
        code = ae.LinearCode(state["code_mean"], state["code_weights"])
        model.load_state_dict(state["model"])
    model.to(preset.device)
    code = ae.LinearCode(code.mean.to(preset.device), code.weights.to(preset.device))
    optimiser = muon_for(model, rate=0.02, adam_rate=2e-3, momentum=0.9)
    if state is not None:
        optimiser.load_state_dict(state["optimiser"])
    steps = preset.autoencoder_steps

    def loss_of(step: int, frames: Tensor) -> tuple[Tensor, dict[str, float]]:
        numbers = random_numbers(preset, 1, step)
        loss, psnr = ae.training_loss(model, code, frames.to(preset.device), step / steps, numbers)
        return loss, {"loss": float(loss.detach()), "crops dB": psnr}

    stage = Stage(
        name="autoencoder",
        steps=steps,
        data=ae.Crops(preset, preset.crop, preset.autoencoder_batch, steps),
        model=model,
        optimiser=optimiser,
        scale=ae.rate_scale,
        loss_of=loss_of,
        extra={"code_mean": code.mean, "code_weights": code.weights},
        judge=lambda: _held_out_line(model, preset),
    )
    return train(stage, preset, path, state["step"] if state else 0, clock)


def _held_out_line(model: Any, preset: Preset) -> str:
    """Return the held-out figure that is printed now and then."""
    size = clip_size(next(iter(preset.batches)))
    return f"held out dB {ae.held_out_psnr(model, size, rich=preset.rich):.2f}"


def train_decoder(preset: Preset, folder: Path, clock: Clock) -> bool:
    """Train or go on training the decoder alone; return whether it is finished."""
    path = folder / "decoder.pt"
    state = load_checkpoint(path)
    model = build_autoencoder(preset)
    model.load_state_dict((state or _must_load(folder, "autoencoder"))["model"])
    model.requires_grad_(False)
    model.decoder.requires_grad_(True)
    model.post_quant_conv.requires_grad_(True)
    model.to(preset.device)
    optimiser = muon_for(model, rate=0.01, adam_rate=1e-3, momentum=0.9)
    if state is not None:
        optimiser.load_state_dict(state["optimiser"])
    steps = preset.decoder_steps

    def loss_of(step: int, frames: Tensor) -> tuple[Tensor, dict[str, float]]:
        numbers = random_numbers(preset, 3, step)
        loss, psnr = ae.decoder_loss(model, frames.to(preset.device), numbers)
        return loss, {"loss": float(loss.detach()), "crops dB": psnr}

    stage = Stage(
        name="decoder",
        steps=steps,
        data=ae.Crops(
            replace(preset, seed=preset.seed + 50), preset.decoder_crop, preset.decoder_batch, steps
        ),
        model=model,
        optimiser=optimiser,
        scale=ae.rate_scale,
        loss_of=loss_of,
        extra={},
        judge=lambda: _held_out_line(model, preset),
    )
    return train(stage, preset, path, state["step"] if state else 0, clock)


def _must_load(folder: Path, name: str) -> dict[str, Any]:
    """Return the checkpoint of a stage that must have begun."""
    state = load_checkpoint(folder / f"{name}.pt")
    if state is None:
        raise ValueError(f"{folder} holds no {name}; train one first")
    return state


def load_autoencoder(preset: Preset, folder: Path) -> Any:
    """Return the trained autoencoder, frozen, with its latents measured."""
    model = build_autoencoder(preset)
    state = load_checkpoint(folder / "decoder.pt") or _must_load(folder, "autoencoder")
    model.load_state_dict(state["model"])
    model.to(preset.device).eval().requires_grad_(False)
    ae.measure_latents(model, preset)
    return model


def train_denoiser(preset: Preset, folder: Path, clock: Clock) -> bool:
    """Train or go on training the denoiser; return whether it is finished."""
    path = folder / "denoiser.pt"
    autoencoder = load_autoencoder(preset, folder)
    tokenizer = build_tokenizer()
    torch.manual_seed(preset.seed + 1)
    model = dn.Denoiser(preset)
    average = copy.deepcopy(model).requires_grad_(False)
    state = load_checkpoint(path)
    if state is not None:
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
    model.to(preset.device)
    average.to(preset.device)
    optimiser = muon_for(model, skip=ADAM_WORDS, rate=0.02, adam_rate=2e-3)
    if state is not None:
        optimiser.load_state_dict(state["optimiser"])

    def loss_of(step: int, batch: dn.Batch) -> tuple[Tensor, dict[str, float]]:
        latents = dn.normalised_latents(autoencoder, batch.frames.to(preset.device))
        numbers = random_numbers(preset, 2, step)
        with torch.autocast(preset.device, torch.bfloat16, enabled=preset.bfloat16):
            loss = dn.flow_matching_loss(
                model,
                tokenizer,
                latents,
                batch.weights.to(latents),
                batch.captions,
                batch.text_length,
                numbers,
            )
        grid = "x".join(str(size) for size in latents.shape[2:])
        return loss, {f"loss at {grid}:": float(loss.detach())}

    stage = Stage(
        name="denoiser",
        steps=preset.denoiser_steps,
        data=dn.Batches(preset),
        model=model,
        optimiser=optimiser,
        scale=dn.rate_scale,
        loss_of=loss_of,
        extra={"average": average},
        after_step=lambda step: dn.update_average(average, model, step, AVERAGE),
    )
    return train(stage, preset, path, state["step"] if state else 0, clock)


def load_pipeline(preset: Preset, folder: Path) -> tuple[Any, int]:
    """Return the pipeline with the denoiser's averaged weights, and the steps it has taken."""
    model = dn.Denoiser(preset)
    state = _must_load(folder, "denoiser")
    model.load_state_dict(state["average"])
    model.eval().requires_grad_(False)
    pipeline = build_pipeline(
        load_autoencoder(preset, folder), model.transformer, model.text_encoder
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(preset.device), int(state["step"])


def evaluate(preset: Preset, folder: Path, pairs: int, default_pairs: int) -> dict[str, Any]:
    """Return the figures of the newest checkpoints on held-out clips and captions, and save them.

    Weights are judged as they are exported. The sheet of the evaluation shape's first pairs is
    written beside them.
    """
    pipeline, steps = load_pipeline(preset, folder)
    pipeline = in_half_precision(pipeline).to(torch.float32)
    found: dict[str, Any] = {"denoiser_steps": steps, "autoencoder_db": {}}
    for grid in preset.batches:
        size = clip_size(grid)
        decibels = ae.held_out_psnr(pipeline.vae, size, rich=preset.rich)
        found["autoencoder_db"]["x".join(map(str, size))] = round(decibels, 2)
        say(f"autoencoder {size[0]} frames of {size[1]} x {size[2]}: {decibels:.2f} dB")
    shapes = (
        ("evaluation", preset.evaluation_grid, preset.evaluation_steps, pairs),
        ("default", preset.default_grid, DEFAULT_STEPS, default_pairs),
    )
    for name, grid, sampling_steps, count in shapes:
        if count == 0:
            continue
        samples = evaluation.generate(
            pipeline,
            evaluation.held_out_pairs(count),
            grid=grid,
            steps=sampling_steps,
            guidance=preset.guidance,
        )
        shares = {kind: round(value, 4) for kind, value in evaluation.shares(samples).items()}
        found[name] = {"pairs": count, "grid": list(grid), "steps": sampling_steps, **shares}
        say(f"{name} shape, {count} pairs: {shares}")
        found[name]["structure"] = evaluation.structure(
            pipeline,
            evaluation.held_out_pairs(STRUCTURE_PAIRS),
            grid=grid,
            steps=sampling_steps,
            guidance=preset.guidance,
        )
        say(f"heads with few tiles: {found[name]['structure']}")
        evaluation.save_sheet(samples[:SAMPLES], folder / f"sheet-{name}.png")
    file = folder / "evaluation.json"
    file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def shape(preset: Preset, grid: Grid, steps: int) -> dict[str, Any]:
    """Return the arguments of a pipeline for a latent grid."""
    sizes = dict(zip(("num_frames", "height", "width"), clip_size(grid), strict=True))
    return {**sizes, "num_inference_steps": steps, "guidance_scale": preset.guidance}


def export(preset: Preset, folder: Path, target: Path, note: str) -> None:
    """Write the pipeline in half precision and its card to ``target``."""
    pipeline, steps = load_pipeline(preset, folder)
    save_pipeline(in_half_precision(pipeline), target)
    file = folder / "evaluation.json"
    figures = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    text = card.model_card(preset, steps, figures, note)
    (target / "README.md").write_text(text, encoding="utf-8")
    shapes = {
        "scorer": "captions",
        "default": shape(preset, preset.default_grid, DEFAULT_STEPS),
        "evaluation": shape(preset, preset.evaluation_grid, preset.evaluation_steps),
    }
    for name, value in ((SHAPES_FILE, shapes), (PROMPTS_FILE, search_prompts())):
        (target / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    write_checksums(target)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    say(f"{target}: {size / 1e6:.1f} MB after {steps} steps of the denoiser")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--device", help="another device than the preset's")
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "tiny-wan")
    parser.add_argument("--minutes", type=float, help="stop after that time, to be resumed")
    parser.add_argument("--autoencoder-steps", type=int)
    parser.add_argument("--decoder-steps", type=int)
    parser.add_argument("--denoiser-steps", type=int)
    parser.add_argument("--evaluate", type=int, metavar="PAIRS", help="score instead of training")
    parser.add_argument("--default-pairs", type=int, default=DEFAULT_PAIRS, metavar="PAIRS")
    parser.add_argument("--samples", action="store_true", help="write a contact sheet instead")
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="write the pipeline instead")
    parser.add_argument("--note", default="", help="a sentence for the card: how long, on what")
    args = parser.parse_args()
    names = ("device", "autoencoder_steps", "decoder_steps", "denoiser_steps")
    changes = {name: value for name in names if (value := getattr(args, name)) is not None}
    preset = replace(PRESETS[args.preset], **changes)
    if args.evaluate is not None:
        evaluate(preset, args.output, args.evaluate, args.default_pairs)
    if args.samples:
        pipeline, steps = load_pipeline(preset, args.output)
        samples = evaluation.generate(
            pipeline,
            evaluation.held_out_pairs(SAMPLES),
            grid=preset.evaluation_grid,
            steps=preset.evaluation_steps,
            guidance=preset.guidance,
        )
        evaluation.save_sheet(samples, args.output / f"samples-{steps}.png")
        say(f"after {steps} steps: {evaluation.shares(samples)}")
    if args.export is not None:
        export(preset, args.output, args.export, args.note)
    if args.evaluate is not None or args.samples or args.export is not None:
        return
    if preset.bfloat16:
        torch.set_float32_matmul_precision("high")
    clock = Clock(args.minutes)
    trainings = (train_autoencoder, train_decoder, train_denoiser)
    finished = all(training(preset, args.output, clock) for training in trainings)
    say("finished" if finished else "stopped; rerun the same command to resume")


if __name__ == "__main__":
    main()
