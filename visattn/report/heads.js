// The map of heads: its colours, its keyboard, and the head that is looked at.
const map = $(".map"), detail = $("#detail");
if (map) {
  const { heads, stencils } = report, cells = $$("td[data-i]", map), names = cells.map(cell => cell.className);
  const headOf = cell => heads[cell.dataset.i];
  const stencilOf = head => stencils.find(s => s.number === head.number && s.head === head.head && (s.role ?? head.role) === head.role);
  const steady = head => head.stability ? Math.min(...[head.stability.prompts, head.stability.steps].filter(v => v !== null && v !== undefined)) : null;
  const errors = heads.map(head => head.error).filter(error => error > 0);
  const high = errors.length ? Math.max(...errors) : 1, low = Math.max(Math.min(high / 10, ...errors), high / 1e4);
  const ways = {
    density: { value: head => head.density, share: v => v, ends: ["0", "1"], note: "kept fraction of (query, key) pairs" },
    error: { value: head => head.error, share: v => v > 0 ? Math.log(v / low) / Math.log(high / low) : 0, ends: [`≤ ${figure(low)}`, figure(high)], note: "of the layer's output, relative and squared, on a logarithmic scale" },
    stability: { value: steady, share: v => v, ends: ["0", "1"], note: "how often another prompt or another step would choose the same, the lesser of both" },
  };
  const words = head => [
    `layer ${head.number}, head ${head.head}${head.phase ? `, phase ${head.phase}` : ""}: ${head.family}`,
    `density ${figure(head.density)}, executed ${figure(head.executed)}, error ${figure(head.error)}`,
    ...(head.stability ? [`stable over prompts ${figure(head.stability.prompts)}, steps ${figure(head.stability.steps)}`] : []),
    ...(head.reason ? [head.reason] : []),
  ].join("\n");

  const rampBar = () => {
    const bar = el("canvas", { width: 256, height: 1, "aria-hidden": "true" }), brush = bar.getContext("2d");
    for (let x = 0; x < 256; x++) { brush.fillStyle = amount(x / 255); brush.fillRect(x, 0, 1, 1); }
    return bar;
  };
  const paint = () => {
    const name = $("input[name=way]:checked").value, way = ways[name], scale = $("#scale");
    $("#families").hidden = Boolean(way);
    scale.hidden = !way;
    cells.forEach((cell, n) => {
      const value = way?.value(headOf(cell)), none = Boolean(way) && !Number.isFinite(value);
      cell.className = way ? (none ? "none" : "") : names[n];
      cell.style.cssText = way && !none ? `background:${amount(way.share(value))};color:transparent` : way ? "color:transparent" : "";
    });
    if (way) {
      scale.replaceChildren(rampBar(), el("div", {}, ...way.ends.map(end => el("span", {}, end))), way.note);
    }
  };

  // ---- the head that is looked at
  const unpack = box => Uint8Array.from(atob(box.levels), sign => sign.charCodeAt(0));
  const outline = (brush, rows, columns, size, inside, color, dash) => {
    const line = (x, y, dx, dy) => { brush.moveTo(x * size, y * size); brush.lineTo((x + dx) * size, (y + dy) * size); };
    brush.beginPath();
    for (let y = 0; y < rows; y++) for (let x = 0; x < columns; x++) if (inside(y, x)) {
      if (y === 0 || !inside(y - 1, x)) line(x, y, 1, 0);
      if (y === rows - 1 || !inside(y + 1, x)) line(x, y + 1, 1, 0);
      if (x === 0 || !inside(y, x - 1)) line(x, y, 0, 1);
      if (x === columns - 1 || !inside(y, x + 1)) line(x + 1, y, 0, 1);
    }
    brush.strokeStyle = color;
    brush.lineWidth = 2;
    brush.setLineDash(dash);
    brush.stroke();
  };
  // The largest whole pixels of a cell with which so many planes stand in few rows.
  const fit = (count, columns) => {
    const room = detail.clientWidth + 7, most = Math.max(room < 450 ? 3 : 2, Math.ceil(Math.sqrt(count / 4)));
    for (let size = 16; size > 3; size--) if (Math.ceil(count / Math.floor(room / (columns * size + 12))) <= most) return size;
    return 3;
  };
  const planes = (count, columns, make) => {
    const size = fit(count, columns), step = columns * size + 12, rows = Math.ceil(count / Math.max(1, Math.floor((detail.clientWidth + 7) / step)));
    const box = el("div", { class: "planes" }, ...Array.from({ length: count }, (_, n) => make(n, size)));
    box.style.maxWidth = `${Math.ceil(count / rows) * step}px`;  // rows of equal length
    return box;
  };
  const plane = (size, name, own, [rows, columns], level, kept, columnsOf, query) => {
    const ratio = devicePixelRatio || 1, pad = 2;
    const canvas = el("canvas", { role: "img", "aria-label": name });
    canvas.width = (columns * size + 2 * pad) * ratio;
    canvas.height = (rows * size + 2 * pad) * ratio;
    canvas.style.cssText = `width:${columns * size + 2 * pad}px;height:${rows * size + 2 * pad}px`;
    const brush = canvas.getContext("2d");
    brush.scale(ratio, ratio);
    brush.translate(pad, pad);
    for (let y = 0; y < rows; y++) for (let x = 0; x < columns; x++) {
      brush.fillStyle = amount(level(y, x) / 255);
      brush.fillRect(x * size, y * size, size, size);
    }
    outline(brush, rows, columns, size, kept, colorOf("--kept"), []);
    if (columnsOf) outline(brush, rows, columns, size, columnsOf, colorOf("--ink"), [2, 3]);
    if (query) {
      brush.setLineDash([]);
      for (const [color, width] of [["--paper", 4], ["--ink", 2]]) {
        brush.beginPath();
        brush.arc((query[1] + .5) * size, (query[0] + .5) * size, Math.max(3.5, size * .6), 0, 7);
        brush.strokeStyle = colorOf(color);
        brush.lineWidth = width;
        brush.stroke();
      }
    }
    return el("figure", own ? { class: "own" } : {}, canvas, el("figcaption", {}, name));
  };
  const scaleOf = box => el("span", { class: "scale" }, `≤ ${(box.peak / 100).toPrecision(1)}`, rampBar(), figure(box.peak));
  const key = (name, text) => el("span", { class: `key ${name}` }, text);
  const signed = value => value > 0 ? `+${value}` : figure(value);

  const drawStencil = stencil => {
    const [rt, rh, rw] = stencil.mass.shape, mass = unpack(stencil.mass), [nt, nh, nw] = stencil.count;
    const offsets = new Set((stencil.kept ?? []).map(String)), fixed = new Set(stencil.columns ?? []);
    const around = planes(rt, rw, (t, size) => plane(
      size, `dt ${signed(t - nt + 1)}`, t === nt - 1, [rh, rw], (y, x) => mass[(t * rh + y) * rw + x],
      (y, x) => offsets.has([t - nt + 1, y - nh + 1, x - nw + 1].join()), null, t === nt - 1 ? [nh - 1, nw - 1] : null));
    const parts = [
      el("h4", {}, "The stencil"),
      el("p", {}, `Mean attention by offset in tiles of ${stencil.tile.join("x")} tokens, a plane for each offset in frames. `, scaleOf(stencil.mass), key("", `kept, ${offsets.size} of ${rt * rh * rw}`), key("query", "the query's own tile")),
      around,
    ];
    const box = stencil.attention, query = stencil.query, tile = stencil.tile;
    if (!box && !fixed.size) return parts;
    const [frames, rows, columns] = box?.shape ?? stencil.count.map((n, axis) => n * tile[axis]), levels = box && unpack(box);
    const home = query?.map((place, axis) => Math.floor(place / tile[axis]));
    const tileOf = (t, y, x) => [t, y, x].map((place, axis) => Math.floor(place / tile[axis]));
    const sees = (t, y, x) => home && offsets.has(tileOf(t, y, x).map((place, axis) => place - home[axis]).join());
    const inColumn = (t, y, x) => { const [a, b, c] = tileOf(t, y, x); return fixed.has((a * nh + b) * nw + c); };
    parts.push(
      el("h4", {}, box ? "Its attention" : "Its columns"),
      el("p", {}, box && query ? "Mean attention of one query, frame by frame. " : "Frame by frame. ", ...(box ? [scaleOf(box)] : []),
        ...(query ? [key("query", `query ${query.join(", ")}`), key("", "kept for it")] : []), ...(fixed.size ? [key("column", `columns: ${fixed.size} ${fixed.size > 1 ? "tiles" : "tile"} that every query sees`)] : [])),
      planes(frames, columns, (t, size) => plane(
        size, `frame ${t}`, t === query?.[0], [rows, columns], (y, x) => levels ? levels[(t * rows + y) * columns + x] : 0,
        (y, x) => sees(t, y, x), (y, x) => inColumn(t, y, x), t === query?.[0] ? query.slice(1) : null)));
    return parts;
  };
  let selected = null;
  const drawDetail = () => {
    const head = headOf(selected), stencil = stencilOf(head);
    const facts = [["pattern", head.family], ["density", figure(head.density)], ["executed", figure(head.executed)], ["error", figure(head.error)],
      ["time", figure(head.seconds, " s")], ...(head.stability ? [["stable: prompts", figure(head.stability.prompts)], ["stable: steps", figure(head.stability.steps)]] : [])];
    detail.hidden = false;
    detail.replaceChildren(
      el("h3", {}, `Layer ${head.number}, head ${head.head}${heads.some(other => other.phase) ? `, phase ${head.phase}` : ""} `, el("small", {}, `${head.role} ${head.layer}`)),
      el("dl", { class: "figures" }, ...facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)))),
      ...(head.reason ? [el("p", {}, head.reason)] : []),
      ...(stencil ? drawStencil(stencil) : stencils.length ? [el("p", {}, "No stencil of this head was kept.")] : []),
      el("h4", {}, "Written"), el("code", { tabindex: 0, "aria-label": "Pattern" }, head.pattern));
  };
  const choose = cell => {
    selected?.removeAttribute("aria-selected");
    selected = cell;
    cell.setAttribute("aria-selected", "true");
    drawDetail();
  };

  // ---- the keyboard: one stop per panel, arrows inside it
  for (const table of $$("table", map)) {
    table.setAttribute("role", "grid");
    table.setAttribute("aria-label", table.caption.textContent);
    const first = $("td[data-i]", table);
    for (const cell of $$("td[data-i]", table)) {
      cell.setAttribute("role", "gridcell");
      cell.setAttribute("aria-label", cell.title);
      cell.removeAttribute("title");
      cell.tabIndex = cell === first ? 0 : -1;
    }
  }
  const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  map.addEventListener("keydown", event => {
    const cell = event.target.closest("td[data-i]");
    if (!cell) return;
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(cell); return; }
    const row = cell.parentNode, rows = [...row.parentNode.rows], ends = $$("td[data-i]", row);
    let to = { Home: ends[0], End: ends.at(-1) }[event.key];
    if (move[event.key]) {
      const [dy, dx] = move[event.key];
      let y = rows.indexOf(row), x = cell.cellIndex;
      do { y += dy; x += dx; to = rows[y]?.cells[x]; } while (to && !to.dataset.i && x > 0);
    }
    if (!to && !(event.key in move)) return;
    event.preventDefault();
    if (to?.dataset.i) to.focus();
  });
  const over = event => { const cell = event.target.closest("td[data-i]"); if (cell) showTip(cell, words(headOf(cell))); };
  map.addEventListener("focusin", event => {
    const cell = event.target.closest("td[data-i]");
    if (!cell) return;
    for (const other of $$("td[tabindex='0']", cell.closest("table"))) other.tabIndex = -1;
    cell.tabIndex = 0;
    over(event);
  });
  map.addEventListener("pointerover", over);
  for (const name of ["pointerout", "focusout"]) map.addEventListener(name, hideTip);
  map.addEventListener("click", event => { const cell = event.target.closest("td[data-i]"); if (cell) choose(cell); });
  $("#ways").hidden = false;
  $("#ways").addEventListener("change", paint);
  onTheme(() => { paint(); drawDetail(); });
  let wide = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== wide) { wide = innerWidth; drawDetail(); } });
  paint();
  choose(cells.find(cell => headOf(cell).family === "stencil" && stencilOf(headOf(cell))?.attention) ?? cells.find(cell => stencilOf(headOf(cell))) ?? cells[0]);
}
