"use strict";
// The page's script: theme, tables, filters, charts, confusion matrix. It uses no library and no network.
const data = JSON.parse(document.getElementById("page-data").textContent);
const SVG = "http://www.w3.org/2000/svg";

function make(parent, name, attributes = {}, text = null) {
  const svg = parent.namespaceURI === SVG || name === "svg";
  const element = svg ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== null) element.textContent = text;
  parent.append(element);
  return element;
}

// -- theme: the system's until the button is used -------------------------------------------------------------------

function setUpTheme() {
  const root = document.documentElement, button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  try { chosen = localStorage.getItem("toolkit-theme"); } catch { /* storage may be unavailable for local files */ }
  const show = () => {
    const dark = chosen ? chosen === "dark" : system.matches;
    root.dataset.theme = dark ? "dark" : "light";
    button.textContent = dark ? "Light" : "Dark";
    button.setAttribute("aria-label", `Switch to the ${dark ? "light" : "dark"} theme`);
  };
  button.addEventListener("click", () => {
    chosen = root.dataset.theme === "dark" ? "light" : "dark";
    try { localStorage.setItem("toolkit-theme", chosen); } catch { /* as above */ }
    show();
  });
  system.addEventListener("change", show);
  addEventListener("beforeprint", () => { root.dataset.theme = "light"; });
  addEventListener("afterprint", show);
  show();
}

// -- tables -----------------------------------------------------------------------------------------------------------

function sortKey(cell) {
  return cell.dataset.value !== undefined ? Number(cell.dataset.value) : cell.textContent.trim();
}

function compare(one, other) {
  const kinds = [typeof one, typeof other];
  if (kinds[0] === "number" && kinds[1] === "number") return one - other;
  if (kinds[0] !== kinds[1]) return kinds[0] === "number" ? -1 : 1; // cells without a number come last
  return one.localeCompare(other, undefined, { numeric: true });
}

function setUpSorting(table) {
  const headers = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  headers.forEach((header, column) => header.firstElementChild.addEventListener("click", () => {
    const numeric = header.classList.contains("number");
    const first = numeric ? "descending" : "ascending", second = numeric ? "ascending" : "descending";
    const order = header.getAttribute("aria-sort") === first ? second : first;
    headers.forEach((other) => other.setAttribute("aria-sort", other === header ? order : "none"));
    const sign = order === "ascending" ? 1 : -1;
    const rows = [...body.rows].map((row) => [sortKey(row.cells[column]), row]);
    rows.sort((one, other) => sign * compare(one[0], other[0]));
    body.append(...rows.map(([, row]) => row));
  }));
}

function setUpFilter(id) {
  const list = document.getElementById(id);
  const items = [...(list.tBodies ? list.tBodies[0].rows : list.children)];
  const input = document.querySelector(`[data-filter="${id}"]`), count = document.querySelector(`[data-count="${id}"]`);
  const buttons = [...document.querySelectorAll(`[data-only="${id}"]`)];
  const apply = () => {
    const terms = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    const pressed = buttons.find((button) => button.getAttribute("aria-pressed") === "true");
    const kinds = pressed && pressed.dataset.kind ? pressed.dataset.kind.split(" ") : null;
    let shown = 0;
    for (const item of items) {
      const text = item.textContent.toLowerCase();
      const matches = terms.every((term) => text.includes(term)) && (!kinds || kinds.includes(item.dataset.kind));
      item.hidden = !matches;
      shown += matches;
    }
    count.textContent = shown === items.length ? `${shown} shown` : `${shown} of ${items.length} shown`;
  };
  input.addEventListener("input", apply);
  for (const button of buttons) {
    button.addEventListener("click", () => {
      buttons.forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
      apply();
    });
  }
  apply();
}

// -- curves -----------------------------------------------------------------------------------------------------------

function ticks(low, high, wanted) {
  const rough = (high - low) / wanted || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i += 1) found.push(i * step);
  return found;
}

function format(value) {
  if (value === null || !Number.isFinite(value)) return "-";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e5)) return value.toExponential(2).replace(/\.?0*e/, "e");
  return String(Number(value.toPrecision(4)));
}

class Chart {
  constructor(figure, spec) {
    this.spec = spec;
    this.svg = figure.querySelector("svg");
    this.readout = figure.querySelector(".readout");
    this.groups = [...new Set(spec.series.map((series) => series.group ?? series.name))];
    this.hidden = new Set(spec.series.filter((series) => series.shown === false).map((series) => series.name));
    this.log = Boolean(spec.log);
    this.cursor = null;
    const legend = figure.querySelector(".legend");
    const toggles = this.groups.map((group) => this.addToggle(legend, group));
    if (spec.canLog) this.addScale(legend);
    if (toggles.length > 4) this.addAll(legend, toggles);
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerdown", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => this.moveTo(null));
    this.svg.addEventListener("keydown", (event) => this.key(event));
    this.svg.addEventListener("blur", () => this.moveTo(null));
    new ResizeObserver(() => this.draw()).observe(this.svg);
  }

  addToggle(legend, group) {
    const button = make(legend, "button", { type: "button", "aria-pressed": String(!this.hidden.has(group)) });
    const swatch = make(button, "svg", { width: 26, height: 8, "aria-hidden": "true" });
    const first = this.spec.series.find((series) => (series.group ?? series.name) === group);
    make(swatch, "path", { d: "M0 4H26", style: this.stroke(first) });
    button.append(group);
    button.addEventListener("click", () => {
      if (!this.hidden.delete(group)) this.hidden.add(group);
      button.setAttribute("aria-pressed", String(!this.hidden.has(group)));
      this.draw();
    });
    return button;
  }

  addAll(legend, toggles) {
    const button = make(legend, "button", { type: "button" }, "all or none");
    button.addEventListener("click", () => {
      this.hidden = this.hidden.size ? new Set() : new Set(this.groups);
      toggles.forEach((toggle) => toggle.setAttribute("aria-pressed", String(!this.hidden.size)));
      this.draw();
    });
    legend.prepend(button);
  }

  addScale(legend) {
    const button = make(legend, "button", { type: "button", "aria-pressed": String(this.log) }, "logarithmic");
    button.style.textDecoration = "none";
    button.addEventListener("click", () => {
      this.log = !this.log;
      button.setAttribute("aria-pressed", String(this.log));
      this.draw();
    });
  }

  stroke(series) {
    return `fill:none;stroke:${series.color};stroke-width:${this.spec.many ? 1.5 : 2};stroke-dasharray:${series.dash || "none"}`;
  }

  visible() {
    return this.spec.series.filter((series) => !this.hidden.has(series.group ?? series.name));
  }

  positions() {
    return [...new Set(this.visible().flatMap((series) => series.x))].sort((a, b) => a - b);
  }

  draw() {
    const { svg, spec } = this;
    const width = svg.clientWidth, height = svg.clientHeight;
    if (!width) return;
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const box = { right: width - 10, top: 36, bottom: height - 38 };
    const series = this.visible();
    const values = series.flatMap((one) => one.y).filter((y) => y !== null && (!this.log || y > 0));
    const markers = (spec.markers || []).map((marker) => marker.x);
    const all = spec.series.flatMap((one) => one.x).concat(markers);
    let [left, right] = [Math.min(...all), Math.max(...all)];
    if (left === right) [left, right] = [left - 1, right + 1];
    let [low, high] = values.length ? [Math.min(...values), Math.max(...values)] : [0, 1];
    const log = this.log && values.length > 0;
    if (log) [low, high] = [Math.log10(low), Math.log10(high)];
    const room = (high - low) * 0.05 || Math.abs(high) * 0.05 || 1;
    [low, high] = [spec.fromZero && !log ? 0 : low - room, high + room];
    const levels = log ? this.decades(low, high) : ticks(low, high, 5);
    // Space for the longest tick label (12 px font) next to the axis title.
    box.left = 30 + 7.2 * Math.max(3, ...levels.map((value) => format(value).length));
    this.x = (value) => box.left + ((value - left) / (right - left)) * (box.right - box.left);
    this.y = (value) => box.bottom - (((log ? Math.log10(value) : value) - low) / (high - low)) * (box.bottom - box.top);
    this.box = box;
    this.axes(levels, ticks(left, right, Math.max(2, width / 90)));
    for (const marker of spec.markers || []) this.marker(marker);
    for (const one of series) this.line(one, log);
    this.crosshair = make(svg, "g");
    this.moveTo(this.cursor);
  }

  decades(low, high) {
    const found = [];
    for (let power = Math.ceil(low); power <= high; power += 1) found.push(10 ** power);
    return found.length > 1 ? found : ticks(10 ** low, 10 ** high, 4).filter((value) => value > 0);
  }

  axes(values, positions) {
    const { svg, box, spec } = this;
    for (const value of values) {
      const y = this.y(value);
      make(svg, "path", { d: `M${box.left} ${y}H${box.right}`, style: "stroke:var(--line)" });
      make(svg, "text", { x: box.left - 6, y: y + 4, "text-anchor": "end" }, format(value));
    }
    for (const value of positions.filter((position) => !spec.integerTicks || Number.isInteger(position))) {
      make(svg, "text", { x: this.x(value), y: box.bottom + 16, "text-anchor": "middle" }, format(value));
    }
    make(svg, "path", { d: `M${box.left} ${box.top}V${box.bottom}H${box.right}`, style: "stroke:var(--ink);fill:none" });
    make(svg, "text", { x: (box.left + box.right) / 2, y: box.bottom + 33, "text-anchor": "middle" }, spec.xLabel);
    const y = (box.top + box.bottom) / 2;
    make(svg, "text", { transform: `translate(12 ${y}) rotate(-90)`, "text-anchor": "middle" }, spec.yLabel);
  }

  marker(marker) {
    const x = this.x(marker.x), atRight = x > (this.box.left + this.box.right) / 2;
    const style = `stroke:var(--soft);stroke-dasharray:${marker.dash || "none"}`;
    const top = this.box.top - 8 - 14 * marker.row; // labels are above the curves, each in its own row
    make(this.svg, "path", { d: `M${x} ${top - 10}V${this.box.bottom}`, style });
    const place = { x: x + (atRight ? -4 : 4), y: top, "text-anchor": atRight ? "end" : "start" };
    make(this.svg, "text", place, marker.label);
  }

  path(series, log) {
    let path = "", pen = "M";
    series.x.forEach((x, i) => {
      const y = series.y[i];
      if (y === null || (log && y <= 0)) { pen = "M"; return; }
      path += `${pen}${this.x(x).toFixed(1)} ${this.y(y).toFixed(1)}`;
      pen = "L";
    });
    return path;
  }

  line(series, log) {
    const path = this.path(series, log);
    if (path) make(this.svg, "path", { d: path, class: "line", style: this.stroke(series) });
    if (series.x.length > (this.spec.many ? 1 : 40)) return;
    series.x.forEach((x, i) => {
      const y = series.y[i];
      if (y === null || (log && y <= 0)) return;
      make(this.svg, "circle", { cx: this.x(x), cy: this.y(y), r: 2.5, style: `fill:${series.color}` });
    });
  }

  point(event) {
    const positions = this.positions();
    if (!positions.length) return;
    const at = event.clientX - this.svg.getBoundingClientRect().left;
    this.moveTo(positions.reduce((a, b) => (Math.abs(this.x(b) - at) < Math.abs(this.x(a) - at) ? b : a)));
  }

  key(event) {
    const positions = this.positions(), step = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (step === undefined || !positions.length) return;
    event.preventDefault();
    const now = this.cursor === null ? (step > 0 ? -1 : positions.length) : positions.indexOf(this.cursor);
    this.moveTo(positions[Math.min(positions.length - 1, Math.max(0, now + step))]);
  }

  moveTo(x) {
    this.cursor = x;
    this.crosshair.replaceChildren();
    if (x === null) { this.readout.textContent = ""; return; }
    make(this.crosshair, "path", { d: `M${this.x(x)} ${this.box.top}V${this.box.bottom}`, style: "stroke:var(--ink)" });
    const parts = [];
    for (const series of this.visible()) {
      const y = series.y[series.x.indexOf(x)];
      if (y === undefined || y === null) continue;
      parts.push(`${series.name} ${format(y)}`);
      if (this.log && y <= 0) continue;
      make(this.crosshair, "circle", { cx: this.x(x), cy: this.y(y), r: 4, style: `fill:${series.color};stroke:var(--paper)` });
    }
    this.readout.textContent = `${this.spec.xLabel} ${format(x)}: ${parts.join(", ")}`;
  }
}

// Curves of many runs: the readout shows the curve nearest to the pointer, or the one selected by the arrow keys.
class ManyCurvesChart extends Chart {
  at(x) {
    const points = this.visible().map((series) => ({ series, y: series.y[series.x.indexOf(x)] }));
    const there = points.filter(({ y }) => y !== undefined && y !== null && !(this.log && y <= 0));
    return there.sort((one, other) => one.y - other.y);
  }

  point(event) {
    const height = event.clientY - this.svg.getBoundingClientRect().top;
    const distance = ({ y }) => Math.abs(this.y(y) - height);
    this.choose = (found) => found.reduce((a, b) => (distance(b) < distance(a) ? b : a));
    super.point(event);
  }

  key(event) {
    const step = { ArrowUp: 1, ArrowDown: -1 }[event.key], last = this.chosen;
    this.choose = (found) => {
      const index = found.findIndex(({ series }) => series === last);
      return index < 0 ? found.at(-1) : found[Math.min(found.length - 1, Math.max(0, index + (step ?? 0)))];
    };
    if (step === undefined) { super.key(event); return; }
    event.preventDefault();
    this.moveTo(this.cursor ?? this.positions().at(-1) ?? null);
  }

  moveTo(x) {
    const found = x === null ? [] : this.at(x);
    this.cursor = x;
    this.crosshair.replaceChildren();
    if (!found.length) {
      this.readout.textContent = "";
      this.chosen = null;
      return;
    }
    const { series, y } = (this.choose ?? ((all) => all.at(-1)))(found);
    this.chosen = series;
    make(this.crosshair, "path", { d: `M${this.x(x)} ${this.box.top}V${this.box.bottom}`, style: "stroke:var(--line)" });
    const path = this.path(series, this.log);
    make(this.crosshair, "path", { d: path, style: `${this.stroke(series)};stroke-width:5;stroke-dasharray:none` });
    make(this.crosshair, "circle", { cx: this.x(x), cy: this.y(y), r: 6, style: `fill:${series.color};stroke:var(--paper)` });
    this.readout.textContent = `${series.name}, ${this.spec.xLabel} ${format(x)}: ${format(y)}`;
  }
}

// -- confusion matrix -------------------------------------------------------------------------------------------------

class MatrixChart {
  constructor(figure, spec) {
    this.spec = spec;
    this.svg = figure.querySelector("svg");
    this.readout = figure.querySelector(".readout");
    this.count = spec.names.length;
    this.named = this.count <= 250;
    const longest = Math.min(26, Math.max(...spec.names.map((name) => name.length)));
    const smallest = this.count <= 25 ? 26 : this.count <= 60 ? 18 : this.count <= 250 ? 10 : 3;
    this.font = Math.min(12, smallest);
    this.room = this.named ? 14 + longest * this.font * 0.58 : 14;
    // As large as fits on the page, up to 44 px per cell; below the smallest legible size the matrix scrolls.
    const available = figure.clientWidth - this.room - 4;
    this.side = Math.max(smallest, Math.min(44, Math.floor(available / this.count)));
    this.values = new Map(spec.cells.map(([row, column, value]) => [row * this.count + column, value]));
    this.place = [0, 0];
    this.draw();
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerdown", (event) => this.point(event));
    this.svg.addEventListener("keydown", (event) => this.key(event));
    this.svg.addEventListener("focus", () => this.moveTo(...this.place));
  }

  draw() {
    const { svg, count, side, room } = this, size = room + count * side + 4;
    svg.setAttribute("viewBox", `0 0 ${size} ${size}`);
    svg.setAttribute("width", size);
    svg.setAttribute("height", size);
    const lines = Array.from({ length: count + 1 }, (_, i) => room + i * side);
    const grid = lines.map((at) => `M${room} ${at}H${room + count * side}M${at} ${room}V${room + count * side}`).join("");
    if (side > 3) make(svg, "path", { d: grid, style: "stroke:var(--line);stroke-width:.5" });
    for (const [row, column, value] of this.spec.cells) {
      const share = value / this.spec.support[row];
      const place = { x: room + column * side, y: room + row * side, width: side, height: side };
      make(svg, "rect", { ...place, class: "cell", style: `fill-opacity:${(0.12 + 0.88 * Math.sqrt(share)).toFixed(2)}` });
      if (count > 25) continue;
      const middle = { x: place.x + side / 2, y: place.y + side / 2 + 4, "text-anchor": "middle" };
      make(svg, "text", { ...middle, style: share > 0.3 ? "fill:var(--paper)" : "" }, value);
    }
    if (this.named) this.spec.names.forEach((name, index) => this.label(name, index));
    this.frame = make(svg, "rect", { width: side, height: side, style: "fill:none;stroke:none;stroke-width:2" });
  }

  label(name, index) {
    const at = this.room + (index + 0.5) * this.side + this.font * 0.35, style = `font-size:${this.font}px`;
    const text = name.length > 26 ? `${name.slice(0, 25)}\u2026` : name;
    make(this.svg, "text", { x: this.room - 5, y: at, "text-anchor": "end", style }, text);
    make(this.svg, "text", { transform: `translate(${at} ${this.room - 5}) rotate(-90)`, style }, text);
  }

  point(event) {
    const box = this.svg.getBoundingClientRect(), scale = this.svg.viewBox.baseVal.width / box.width;
    const row = Math.floor(((event.clientY - box.top) * scale - this.room) / this.side);
    const column = Math.floor(((event.clientX - box.left) * scale - this.room) / this.side);
    if (row >= 0 && column >= 0 && row < this.count && column < this.count) this.moveTo(row, column);
  }

  key(event) {
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!move) return;
    event.preventDefault();
    this.moveTo(...this.place.map((at, axis) => Math.min(this.count - 1, Math.max(0, at + move[axis]))));
  }

  moveTo(row, column) {
    this.place = [row, column];
    this.frame.setAttribute("x", this.room + column * this.side);
    this.frame.setAttribute("y", this.room + row * this.side);
    this.frame.style.stroke = "var(--ink)";
    const value = this.values.get(row * this.count + column) || 0, support = this.spec.support[row];
    const share = support ? ` (${format((100 * value) / support)} %)` : "";
    const [truth, found] = [this.spec.names[row], this.spec.names[column]];
    const words = this.spec.words || ["true", "predicted"];
    this.readout.textContent = `${words[0]} ${truth}, ${words[1]} ${found}: ${value} of ${support} images${share}`;
  }
}

setUpTheme();
document.querySelectorAll("main table").forEach(setUpSorting);
document.querySelectorAll("[data-filter]").forEach((input) => setUpFilter(input.dataset.filter));
document.querySelectorAll("[data-chart]").forEach((figure) => {
  const spec = data.charts[figure.dataset.chart];
  new (spec.many ? ManyCurvesChart : Chart)(figure, spec);
});
document.querySelectorAll("[data-cells]").forEach((figure) => new MatrixChart(figure, data.cells[figure.dataset.cells]));
document.documentElement.dataset.ready = "true";
