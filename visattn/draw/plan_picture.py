"""A picture of a plan: which kind of pattern every head of every layer runs, and its density."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from PIL import Image, ImageDraw

from visattn.draw.canvas import font, wrapped, write
from visattn.draw.palette import GREY, INK, PAPER, Color, pattern_colors, readable_ink, rgb
from visattn.patterns import Dense, HeadPattern, Skip
from visattn.plan.rule import ANY, PASSES
from visattn.plan.show.plan_view import PlanRow, PlanView, mean_of, pass_words
from visattn.plan.show.planned_denoisers import Heads, PlannedDenoiser
from visattn.plan.show.terminal import facts_of, plain

__all__ = ["draw_plan"]

MARGIN, GAP, SPACE = 72, 3, 44  # around the picture, between cells, between parts
LAYER_WIDTH, MEAN_WIDTH = 130, 90  # left and right of a row of cells
MOST_WIDTH, LEAST_WIDTH = 4000, 1500
MOST_CELLS = 400_000
# widths, heights and text sizes of a cell; the largest that fits is used
CELLS = ((62, 44, 20), (40, 30, 15), (28, 22, 11), (14, 14, 0), (6, 6, 0), (2, 2, 0))
MOST_PATTERNS = 24  # that the legend lists


def draw_plan(view: PlanView, *, title: str) -> Image.Image:
    """Draw all heads of a plan, layers down and heads across.

    Each denoiser has a map, and each phase and pass in which its heads differ has its own. A cell
    has the colour of its kind of pattern, the pattern's short name and its density, which is "-"
    for dynamic patterns. Right of a row is the mean of its heads.

    Args:
        view: the plan.
        title: the line above the picture.

    Returns:
        An RGB image.

    Raises:
        ValueError: the plan has more heads than a picture can show.
    """
    maps = [heads_map for denoiser in view.denoisers for heads_map in _maps(view, denoiser)]
    across = max(len(heads) for _, _, rows in maps for heads in rows)
    cells = across * sum(len(rows) for _, _, rows in maps)
    if cells > MOST_CELLS:
        raise ValueError(
            f"the plan has {cells} cells of heads, layers, phases and passes; a picture shows at "
            f"most {MOST_CELLS}"
        )
    sides = LAYER_WIDTH + MEAN_WIDTH
    size = next((s for s in CELLS if sides + across * (s[0] + GAP) <= MOST_WIDTH), CELLS[-1])
    colors = _colors(view)
    width = max(LEAST_WIDTH, sides + across * (size[0] + GAP))
    parts = [_head(view, title, width), _legend(view, colors, width)]
    parts += [_map(view, *heads_map, colors, size) for heads_map in maps]
    height = sum(part.height + SPACE for part in parts) - SPACE
    out = Image.new(
        "RGB", (max(part.width for part in parts) + 2 * MARGIN, height + 2 * MARGIN), PAPER
    )
    y = MARGIN
    for part in parts:
        out.paste(part, (MARGIN, y))
        y += part.height + SPACE
    return out


def _maps(
    view: PlanView, denoiser: PlannedDenoiser
) -> list[tuple[str, PlannedDenoiser, list[Heads]]]:
    """Return a title and the heads of all layers for each phase and pass in which they differ."""
    layers = [rows for owner, _, rows in view.layers if owner is denoiser]
    used = [row for rows in layers for row in rows]
    has_phases = any(row.phase is not None for row in used)
    passes = [pass_ for pass_ in PASSES if any(row.pass_ == pass_ for row in used)]
    name = "all denoisers" if denoiser.role == ANY else denoiser.role
    out = []
    for phase in range(len(view.plan.phases) + 1) if has_phases else [0]:
        by_pass: dict[str, list[Heads]] = {}
        for pass_ in (ANY, *passes):
            heads = [_row_at(rows, phase, pass_).patterns for rows in layers]
            if pass_ == ANY or heads != by_pass[ANY]:
                by_pass[pass_] = heads
        for pass_, heads in by_pass.items():
            words = pass_words(pass_, len(by_pass) > 1)
            parts = [name, f"phase {phase}" if has_phases else "", words]
            out.append((", ".join(filter(None, parts)), denoiser, heads))
    return out


def _row_at(rows: Sequence[PlanRow], phase: int, pass_: str) -> PlanRow:
    """Return the row of a layer for a phase and pass."""
    fits = [row for row in rows if row.phase in (None, phase)]
    return next((row for row in fits if row.pass_ == pass_), fits[0])


def _colors(view: PlanView) -> dict[str, Color]:
    """Return the colour of each kind of pattern in a plan."""
    families = list(dict.fromkeys(pattern.name for pattern in view.names))
    colors = pattern_colors(families)
    return {name: rgb(colors[name]) for name in families}


def _head(view: PlanView, title: str, width: int) -> Image.Image:
    """Draw the plan's name, its model and geometry, and the most important numbers."""
    words = facts_of(view)
    notes = [f"{words['model']}, {words['denoisers']}, {words['geometry']}"]
    notes.append(f"dense layers: {words['dense layers']}; dense steps: {words['dense steps']}")
    if "phases" in words:
        notes[-1] += f"; phases: {words['phases']}"
    if isinstance(kind := view.plan.provenance.get("kind"), str):
        notes.append(plain(kind))
    heads = [pattern for row in view.rows for pattern in row.patterns]
    facts = {
        "mean density outside dense steps": "-" if view.density is None else f"{view.density:.3f}",
        "of the heads are dense": f"{heads.count(Dense()) / len(heads):.0%}",
        "patterns": str(len(view.names)),
    }
    lines = [(text, 46, INK, 60) for text in wrapped(plain(title), 46, width, 2)]
    lines += [(text, 26, GREY, 36) for note in notes for text in wrapped(note, 26, width, 2)]
    out = Image.new("RGB", (width, sum(step for *_, step in lines) + 118), PAPER)
    y = 0
    for text, size, ink, step in lines:
        write(out, 0, y, text, size, ink)
        y += step
    x, y = 0, y + 24
    for name, value in facts.items():
        value_width = write(out, x, y, value, 50)
        x += max(value_width, write(out, x, y + 60, name, 22, GREY)) + 56
    return out


def _legend(view: PlanView, colors: dict[str, Color], width: int) -> Image.Image:
    """Draw the kinds of patterns by colour, and the patterns of the most heads by name."""
    boxes = []
    x = y = 0
    for name in colors:
        entry_width = 36 + int(font(24).getlength(name))
        if x and x + entry_width > width:
            x, y = 0, y + 40
        boxes.append((name, x, y))
        x += entry_width + 36
    count = Counter(pattern for row in view.rows for pattern in row.patterns)
    del count[Dense()], count[Skip()]  # have no parameters to list
    chosen = {pattern for pattern, _ in count.most_common(MOST_PATTERNS)}
    listed = [pattern for pattern in view.names if pattern in chosen]
    top, more = y + 52, len(count) - len(listed)
    out = Image.new("RGB", (width, top + 30 * (len(listed) + (more > 0))), PAPER)
    draw = ImageDraw.Draw(out)
    for name, x, y in boxes:
        draw.rectangle((x, y + 2, x + 25, y + 27), colors[name])
        write(out, x + 36, y, name, 24)
    for number, pattern in enumerate(listed):
        y = top + 30 * number
        density = view.densities[pattern]
        draw.rectangle((6, y + 4, 19, y + 17), colors[pattern.name])
        write(out, 36, y, view.names[pattern], 20)
        write(out, 96, y, "-" if density is None else f"{density:.3f}", 20)
        write(out, 170, y, wrapped(repr(pattern)[:400], 20, width - 170, 1)[0], 20, GREY)
    if more:
        write(out, 36, top + 30 * len(listed), f"and {more} more", 20, GREY)
    return out


def _map(
    view: PlanView,
    title: str,
    denoiser: PlannedDenoiser,
    layers: Sequence[Heads],
    colors: dict[str, Color],
    size: tuple[int, int, int],
) -> Image.Image:
    """Draw the cells of a denoiser in one phase and pass."""
    width, height, letters = size
    across = max(map(len, layers))
    left, top = LAYER_WIDTH, 84
    right, bottom = left + across * (width + GAP), top + len(layers) * (height + GAP)
    out = Image.new("RGB", (right + MEAN_WIDTH, bottom), PAPER)
    write(out, 0, 0, title, 30)
    if across > 1:
        step = 1 if width > 20 else 8
        for head in range(0, across, step):
            x = left + head * (width + GAP) + (width - int(font(18).getlength(str(head)))) // 2
            write(out, x, top - 28, str(head), 18, GREY)
    write(out, 0, top - 28, "layer" if across == 1 else "layer, head", 18, GREY)
    write(out, left + across * (width + GAP) + 12, top - 28, "mean", 18, GREY)
    draw = ImageDraw.Draw(out)
    every = 1 if height > 16 else 8
    for number, heads in enumerate(layers):
        y = top + number * (height + GAP)
        if number % every == 0:
            name = "all" if denoiser.layers[number] == ANY else _short(denoiser.layers[number])
            write(out, 0, y + (height - 24) // 2, name, 18)
            mean = mean_of(heads, view.densities)
            text = "-" if mean is None else f"{mean:.3f}"
            write(out, left + across * (width + GAP) + 12, y + (height - 24) // 2, text, 18)
        for head, pattern in enumerate(heads):
            x = left + head * (width + GAP)
            color = colors[pattern.name]
            draw.rectangle((x, y, x + width - 1, y + height - 1), color)
            if letters:
                _cell_text(out, (x, y), view, pattern, color, size)
    return out


def _cell_text(
    out: Image.Image,
    corner: tuple[int, int],
    view: PlanView,
    pattern: HeadPattern,
    color: Color,
    size: tuple[int, int, int],
) -> None:
    """Write name and density of a pattern into its cell."""
    width, height, letters = size
    share = view.densities[pattern]
    density = "-" if share is None else f"{share:.2f}".removeprefix("0")
    ink = readable_ink(color)
    lines = [(view.names[pattern], letters * 2 // 3), (density, letters)]
    if letters < 15:
        lines = lines[1:]
    y = corner[1] + (height - sum(step + 3 for _, step in lines)) // 2
    for text, step in lines:
        x = corner[0] + (width - int(font(step).getlength(text))) // 2
        write(out, x, y - 1, text, step, ink)
        y += step + 3


def _short(path: str) -> str:
    """Return the number of a layer where its path has one."""
    numbers = [part for part in path.split(".") if part.isdecimal()]
    return numbers[0] if len(numbers) == 1 else path[:12]
