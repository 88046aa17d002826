"""The table of errors as a picture."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from visattn.draw.canvas import cells_picture, write
from visattn.draw.palette import GREY, INK, PAPER

CELL, LEFT, TOP = 22, 330, 110
RED = (214, 40, 40)
INKS = {"static": (0, 92, 140), "dynamic": INK, "oracle": GREY, "check": GREY, "over": GREY}
DECADES = 4  # from all wrong down to what is drawn as exact
NOTE = (
    "blue: static, black: dynamic, grey: no candidates; at the right the mean error, and in red how"
    " many heads a pattern suits best"
)


def draw(value: dict[str, Any]) -> Image.Image:
    """Patterns down, heads across, dark is wrong; the best of each head is marked."""
    rows = value["rows"]
    table = torch.tensor([own["errors"] for own in rows]).flatten(1)  # [patterns, heads]
    heads, each = table.shape[1], len(rows[0]["errors"][0])
    level = (table.clamp(min=10**-DECADES).log10() / DECADES + 1) * 254
    ramp = [(255 - n * 225 // 254, 255 - n * 190 // 254, 255 - n * 120 // 254) for n in range(255)]
    right = LEFT + heads * CELL
    wide = max(right + 130, 900)
    out = Image.new("RGB", (wide, TOP + len(rows) * CELL + 50), PAPER)
    write(out, 20, 16, f"Error of each head at {value['density']:.0%} of the blocks", 26)
    note = f"{value['layout']} tokens, blocks of {value['block']}; light is exact, dark all wrong"
    write(out, 20, 52, f"{note}; columns are the {each} heads of each layer", 17, GREY)
    colours = level.clamp(0, 254).round().byte()
    out.paste(cells_picture(colours, ramp, CELL, CELL), (LEFT, TOP))
    best = [value["best"][head // each][head % each] for head in range(heads)]
    names = [own["name"] for own in rows]
    for head, name in enumerate(best):
        x, y = LEFT + head * CELL, TOP + names.index(name) * CELL
        out.paste(RED, (x + 8, y + 8, x + 15, y + 15))
        if head % each == 0:
            write(out, x + 2, TOP - 24, f"{head // each}", 15, GREY)
    for number, own in enumerate(rows):
        y = TOP + number * CELL + 2
        write(out, 20, y, own["name"], 16, INKS[own["kind"]])
        write(out, right + 12, y, f"{own['mean']:.3f}", 16)
        if own["name"] in best:
            write(out, right + 78, y, f"{best.count(own['name'])}", 16, RED)
    write(out, 20, TOP + len(rows) * CELL + 14, NOTE, 15, GREY)
    return out
