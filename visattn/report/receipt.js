// What the other scripts share: numbers, tooltips, colours of amounts, the theme; sorting and copying.
globalThis.$ = (query, node = document) => node.querySelector(query);
globalThis.$$ = (query, node = document) => [...node.querySelectorAll(query)];
const root = document.documentElement;
globalThis.report = JSON.parse($("#data").textContent);

globalThis.el = (name, attributes = {}, ...children) => {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
};
globalThis.figure = (value, unit = "") => {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  let text = String(value);
  if (!Number.isInteger(value)) {
    text = size < 1e-4 ? value.toExponential(1) : value.toFixed(Math.max(0, 2 - Math.floor(Math.log10(size))));
  }
  return text.replace("-", "−") + unit;
};

const tip = $("#tip");
globalThis.showTip = (node, text) => {
  tip.textContent = text;
  tip.hidden = false;
  const at = node.getBoundingClientRect(), own = tip.getBoundingClientRect();
  const above = at.top > own.height + 8;  // what comes next stays in sight
  tip.style.left = `${Math.max(4, Math.min(at.left + at.width / 2 - own.width / 2, innerWidth - own.width - 4))}px`;
  tip.style.top = `${above ? at.top - own.height - 8 : at.bottom + 8}px`;
};
globalThis.hideTip = () => { tip.hidden = true; };
addEventListener("scroll", hideTip, { passive: true, capture: true });
addEventListener("keydown", event => { if (event.key === "Escape") hideTip(); });

// Colours of amounts in 0..1, read anew when the theme changes.
let ramp = [];
globalThis.amount = share => ramp[Math.round(255 * Math.max(0, Math.min(1, share)))];
globalThis.colorOf = name => { tip.style.outlineColor = `var(${name})`; return getComputedStyle(tip).outlineColor; };
const readRamp = () => {
  const stops = [0, 1, 2, 3, 4].map(n => colorOf(`--r${n}`).match(/[\d.]+/g).slice(0, 3).map(Number));
  ramp = Array.from({ length: 256 }, (_, n) => {
    const place = n / 255 * 4, low = Math.min(3, Math.floor(place));
    return `rgb(${stops[low].map((v, i) => Math.round(v + (stops[low + 1][i] - v) * (place - low))).join()})`;
  });
};
const repaints = [];
globalThis.onTheme = paint => repaints.push(paint);
const repaint = () => { readRamp(); repaints.forEach(paint => paint()); };
readRamp();

const dark = matchMedia("(prefers-color-scheme: dark)"), themes = ["auto", "light", "dark"], button = $("#theme");
const setTheme = theme => {
  if (theme === "auto") delete root.dataset.theme; else root.dataset.theme = theme;
  button.textContent = `theme: ${theme}`;
  button.dataset.theme = theme;
  repaint();
};
button.hidden = false;
button.addEventListener("click", () => setTheme(themes[(themes.indexOf(button.dataset.theme) + 1) % 3]));
setTheme("auto");
dark.addEventListener("change", repaint);
let shown = "auto";  // paper is white
addEventListener("beforeprint", () => { shown = button.dataset.theme; setTheme("light"); });
addEventListener("afterprint", () => setTheme(shown));

for (const table of $$(".plans")) {
  const body = table.tBodies[0];
  for (const head of table.tHead.rows[0].cells) {
    const sort = el("button", { type: "button" }, ...head.childNodes);
    head.append(sort);
    sort.addEventListener("click", () => {
      const number = head.classList.contains("num");
      const first = number ? "descending" : "ascending", second = number ? "ascending" : "descending";
      const order = head.getAttribute("aria-sort") === first ? second : first;
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1, value = row => row.cells[head.cellIndex].dataset.v;
      body.append(...[...body.rows].sort((one, two) => {
        const a = value(one), b = value(two);
        if (!a || !b) return !a - !b;  // what is not known comes last, either way
        return sign * (number ? a - b : a.localeCompare(b, "en"));
      }));
    });
  }
}

const copyButton = pre => {
  const copy = el("button", { type: "button", class: "copied" }, "Copy");
  pre.after(copy);
  copy.addEventListener("click", async () => {
    getSelection().selectAllChildren(pre);
    try { await navigator.clipboard.writeText(pre.textContent); } catch { document.execCommand("copy"); }
    copy.textContent = "Copied";
    setTimeout(() => { copy.textContent = "Copy"; }, 2000);
  });
};
const file = $("#plan-file");
if (file) {  // a link to a blob, as browsers limit the length of data: links
  const bytes = Uint8Array.from(atob(file.href.split(",")[1]), sign => sign.charCodeAt(0));
  $("#plan-text code").textContent = new TextDecoder().decode(bytes);
  $("#plan-text").hidden = false;
  file.href = URL.createObjectURL(new Blob([bytes], { type: "application/json" }));
}
$$("pre").forEach(copyButton);
