"""What a plan that changes nothing costs: a denoising step at 16,384 tokens, dense, and with every
attention call caught by a plan of density 1.

    python scripts/bench_injection.py [--layers N] [--heads N] [--repeats N] [--json FILE]

Steps of either kind take turns, the one that comes first too, and medians are compared. The outputs
must be equal to the bit. On a CPU it takes minutes; fewer heads make the step shorter, and so the
share of what is measured larger. A GPU is taken where there is one.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import visattn
from visattn.patterns import Neighborhood

# visattn mends a torchvision that does not fit, which diffusers would import
# isort: split
import torch
from diffusers import CogVideoXTransformer3DModel, WanTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed

FRAMES, HEIGHT, WIDTH = 16, 32, 32  # tokens: 16,384
WHOLE = Neighborhood((1.0, 1.0, 1.0))
Inputs = dict[str, object]


def wan(
    layers: int, heads: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.nn.Module, Inputs]:
    """The blocks of Wan 2.1 1.3B for 12 heads, which dispatch their attention."""
    with device:
        model = WanTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=128,
            ffn_dim=8960 * heads // 12,
            num_layers=layers,
        )
        inputs: Inputs = {
            "hidden_states": torch.randn(1, 16, FRAMES, 2 * HEIGHT, 2 * WIDTH, dtype=dtype),
            "timestep": torch.tensor([500]),
            "encoder_hidden_states": torch.randn(1, 512, 4096, dtype=dtype),
            "return_dict": False,
        }
    return model.to(dtype), inputs


def cogvideox(
    layers: int, heads: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.nn.Module, Inputs]:
    """The blocks of CogVideoX 2B for 30 heads, which call torch's attention themselves."""
    with device:
        model = CogVideoXTransformer3DModel(
            num_attention_heads=heads,
            num_layers=layers,
            use_rotary_positional_embeddings=True,
        )
        rotary = get_3d_rotary_pos_embed(
            64, ((0, 0), (HEIGHT, WIDTH)), (HEIGHT, WIDTH), FRAMES, device=device
        )
        inputs: Inputs = {
            "hidden_states": torch.randn(1, FRAMES, 16, 2 * HEIGHT, 2 * WIDTH, dtype=dtype),
            "timestep": torch.tensor([500]),
            "encoder_hidden_states": torch.randn(1, 226, 4096, dtype=dtype),
            "image_rotary_emb": rotary,
            "return_dict": False,
        }
    return model.to(dtype), inputs


@torch.inference_mode()
def measure(
    model: torch.nn.Module, inputs: Inputs, repeats: int, device: torch.device
) -> dict[str, float]:
    """Median seconds of a step, dense and with the plan, which take turns."""

    def step() -> tuple[float, torch.Tensor]:
        if device.type != "cpu":
            torch.accelerator.synchronize()
        begin = time.perf_counter()
        out: torch.Tensor = model(**inputs)[0]
        if device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - begin, out

    times: dict[str, list[float]] = {"dense": [], "plan": []}
    expected = step()[1]
    with visattn.sparse(model, WHOLE):
        step()
    for turn in range(repeats):
        for name in ("dense", "plan") if turn % 2 else ("plan", "dense"):
            with visattn.sparse(model, WHOLE) if name == "plan" else nullcontext():
                seconds, out = step()
            if not torch.equal(out, expected):
                raise SystemExit("the plan changed the output")
            times[name].append(seconds)
    row = {f"{name}_s": statistics.median(values) for name, values in times.items()}
    row["spread_s"] = statistics.pstdev(times["dense"])
    row["overhead"] = row["plan_s"] / row["dense_s"] - 1
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what catching attention costs.")
    parser.add_argument("--layers", type=int, default=2, metavar="N")
    parser.add_argument("--heads", type=int, metavar="N", help="default: the model's own")
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    print(f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads, {dtype}")
    print(f"{FRAMES * HEIGHT * WIDTH} tokens, {args.layers} layers, {args.repeats} repeats")
    rows = {}
    for family, build, own in (("wan", wan, 12), ("cogvideox", cogvideox, 30)):
        built = build(args.layers, args.heads or own, device, dtype)
        rows[family] = row = measure(*built, args.repeats, device)
        print(
            f"{family:<10} dense {row['dense_s']:.4f} s (spread {row['spread_s']:.4f}), "
            f"plan {row['plan_s']:.4f} s, overhead {row['overhead']:+.2%}",
            flush=True,
        )
    if args.json is not None:
        value = {"device": name, "torch": torch.__version__, "layers": args.layers, "rows": rows}
        args.json.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
