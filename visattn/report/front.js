// Speed against quality, as SVG that fits its frame; drawn anew when that changes.
const chart = $("#chart");
if (chart) {
  const space = $(".symbols").namespaceURI;
  const svg = (name, attributes, ...children) => {
    const node = document.createElementNS(space, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  };
  const measure = el("canvas").getContext("2d");
  const value = name => ($(`input[name=${name}]:checked`) ?? $(`input[name=${name}]`)).value;
  const nice = (low, high, count) => {
    const rough = (high - low) / count, ten = 10 ** Math.floor(Math.log10(rough));
    const step = ten * ([1, 2, 5].find(n => n * ten >= rough) ?? 10), out = [];
    for (let n = Math.ceil(low / step); n * step <= high * (1 + 1e-9); n++) out.push(Number((n * step).toPrecision(6)));
    return out;
  };
  const decades = (low, high) => {
    const out = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++) for (const n of [1, 2, 5]) out.push(Number(`${n}e${e}`));
    return out.filter(v => v >= low && v <= high);
  };
  const meets = (a, b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];

  const draw = () => {
    const up = value("up"), across = value("across"), error = up === "error";
    const all = report.front.filter(p => Number.isFinite(p[across]) && p.kind !== "dense");
    const points = all.filter(p => error ? p.error > 0 : Number.isFinite(p.psnr)), missing = report.front.filter(p => p.kind !== "dense").length - points.length;
    if (!points.length) { chart.replaceChildren("No plan has both values."); return; }
    const width = Math.max(280, chart.clientWidth), height = Math.max(300, Math.min(500, width * .58));
    const box = { left: 48, right: width - 12, top: 14, bottom: height - 42 };
    const ends = points.flatMap(p => error ? [p.error] : [p.psnr, p.psnr_low ?? p.psnr, p.psnr_high ?? p.psnr]);
    let [y0, y1] = [Math.min(...ends), Math.max(...ends)], [x0, x1] = [1, Math.max(...points.map(p => p[across]))];
    x0 = Math.min(x0, ...points.map(p => p[across]));
    const roomX = (x1 - x0 || .1) * .06;
    [x0, x1] = [x0 - roomX / 2, x1 + roomX];
    if (error) [y0, y1] = [y0 / 1.25, y1 * 1.25]; else { const room = (y1 - y0 || 1) * .07; [y0, y1] = [y0 - room, y1 + room]; }
    const x = v => box.left + (v - x0) / (x1 - x0) * (box.right - box.left);
    const part = v => error ? Math.log(v / y1) / Math.log(y0 / y1) : (v - y0) / (y1 - y0);  // a small error is high up
    const y = v => box.bottom - part(v) * (box.bottom - box.top);
    const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": `${points.length} plans by speed and ${error ? "output error" : "PSNR"}` });
    const text = (at, words, attributes = {}) => picture.append(svg("text", { x: at[0], y: at[1], ...attributes }, words));
    const line = (a, b, name) => picture.append(svg("line", { x1: a[0], y1: a[1], x2: b[0], y2: b[1], class: name }));
    for (const v of nice(x0, x1, width / 110)) {
      line([x(v), box.top], [x(v), box.bottom], "grid");
      text([x(v), box.bottom + 17], `${v}x`, { class: "axis", "text-anchor": "middle" });
    }
    for (const v of error ? decades(y0, y1) : nice(y0, y1, height / 70)) {
      line([box.left, y(v)], [box.right, y(v)], "grid");
      text([box.left - 7, y(v) + 4], String(v), { class: "axis", "text-anchor": "end" });
    }
    text([box.right, height - 6], `${across === "speed" ? "predicted" : "measured"} speedup over dense →`, { class: "axis", "text-anchor": "end" });
    text([4, 9], error ? "↑ smaller output error" : "↑ PSNR against dense, dB", { class: "axis" });
    if (missing) text([box.left, height - 6], `${missing} without these values`, { class: "axis" });

    const taken = [], centre = p => [x(p[across]), y(error ? p.error : p.psnr)];
    measure.font = `12px ${getComputedStyle(chart).fontFamily}`;
    line([x(1), box.top], [x(1), box.bottom], "reference");
    text([x(1) + 5, box.bottom - 6], "dense, 1x");
    taken.push([x(1), box.bottom - 18, x(1) + 66, box.bottom]);
    const oracles = points.filter(p => p.kind === "oracle").sort((a, b) => a[across] - b[across]);
    if (oracles.length) {
      const path = [[box.left, centre(oracles[0])[1]], ...oracles.map(centre), [box.right, centre(oracles.at(-1))[1]]];
      picture.append(svg("polyline", { points: path.join(" "), class: "reference", fill: "none" }));
      path.slice(1).forEach(([a, b], n) => taken.push([path[n][0], Math.min(b, path[n][1]) - 2, a, Math.max(b, path[n][1]) + 2]));
    }
    const searched = points.filter(p => p.kind === "searched").sort((a, b) => a[across] - b[across]);
    if (searched.length > 1) picture.append(svg("polyline", { points: searched.map(centre).join(" "), class: "front" }));
    for (const p of points) { const [a, b] = centre(p); taken.push([a - 8, b - 8, a + 8, b + 8]); }
    if (!error) for (const p of points) if (p.psnr_low !== null && p.psnr_high !== null) {
      line([x(p[across]), y(p.psnr_low)], [x(p[across]), y(p.psnr_high)], `whisker k-${p.mark}`);
      taken.push([x(p[across]) - 2, y(p.psnr_high), x(p[across]) + 2, y(p.psnr_low)]);
    }

    // Labels: the chosen plan's first, each at the nearest place that is free; none where there is no such place.
    const labels = svg("g", { "aria-hidden": "true" });
    for (const p of [...points].sort((a, b) => b.chosen - a.chosen || (b.kind === "searched") - (a.kind === "searched"))) {
      const [a, b] = centre(p), words = p.name.length > 28 ? `${p.name.slice(0, 27)}…` : p.name;
      const wide = measure.measureText(words).width * (p.chosen ? 1.08 : 1) + 4;
      search: for (const far of [12, 20, 30, 42, 56]) for (const turn of [0, 4, 1, 7, 3, 5, 2, 6]) {
        const cos = Math.cos(turn * Math.PI / 4), sin = -Math.sin(turn * Math.PI / 4);
        const left = a + far * cos - wide * (1 - Math.round(cos)) / 2, middle = b + far * sin;
        const own = [left, middle - 8, left + wide, middle + 8];
        if (own[0] < box.left || own[2] > box.right + 8 || own[1] < box.top || own[3] > box.bottom || taken.some(other => meets(own, other))) continue;
        taken.push(own);
        if (far > 20) labels.append(svg("line", { x1: a + 7 * cos, y1: b + 7 * sin, x2: a + (far - 3) * cos, y2: b + (far - 3) * sin, class: "leader" }));
        labels.append(svg("text", { x: left + 2, y: middle + 4, class: p.chosen ? "chosen" : "" }, words));
        break search;
      }
    }
    picture.append(labels);
    const order = [...points].sort((a, b) => a[across] - b[across]);
    const marks = order.map((p, n) => {
      const [a, b] = centre(p), ends = p.psnr_low === null || p.psnr_high === null ? "" : ` [${figure(p.psnr_low)}, ${figure(p.psnr_high)}]`;
      const words = [`${p.name}, ${p.kind}${p.chosen ? ", chosen" : ""}`, `predicted ${figure(p.speed, "x")}, measured ${figure(p.measured, "x")}`, `PSNR ${figure(p.psnr, " dB")}${ends}, output error ${figure(p.error)}`].join("\n");
      const mark = svg("g", { role: "img", class: `k-${p.mark}`, tabindex: n ? -1 : 0, "aria-label": words, transform: `translate(${a} ${b})` });
      if (p.chosen) mark.append(svg("circle", { r: 10, class: "ring" }));
      mark.append(svg("circle", { r: 11, fill: "transparent" }), svg("use", { href: `#m-${p.mark}` }));
      for (const name of ["pointerover", "focus"]) mark.addEventListener(name, () => showTip(mark, words));
      for (const name of ["pointerout", "blur"]) mark.addEventListener(name, hideTip);
      mark.addEventListener("keydown", event => {
        const to = marks[{ ArrowLeft: n - 1, ArrowDown: n - 1, ArrowRight: n + 1, ArrowUp: n + 1, Home: 0, End: marks.length - 1 }[event.key]];
        if (!to) return;
        event.preventDefault();
        mark.setAttribute("tabindex", -1);
        to.setAttribute("tabindex", 0);
        to.focus();
      });
      return mark;
    });
    picture.append(...marks);
    chart.replaceChildren(picture);
  };
  $$("#front .switch").forEach(field => { field.hidden = false; field.addEventListener("change", draw); });
  let last = chart.clientWidth;
  new ResizeObserver(() => { if (chart.clientWidth !== last) { last = chart.clientWidth; draw(); } }).observe(chart);
  draw();
}
