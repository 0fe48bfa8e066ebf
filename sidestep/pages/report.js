// Draws the curves and joins the players. All data stands in this page; nothing is fetched.

const values = JSON.parse(document.getElementById("values").textContent);
const SVG = "http://www.w3.org/2000/svg";
const colour = (n) => `var(--${["first", "second", "third"][n]})`;
const element = (id) => document.getElementById(id);

function svg(name, attributes, text) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function html(name, className, text) {
  const node = document.createElement(name);
  node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

// ---- scales -------------------------------------------------------------------------------------------------------------------------

function short(value) {
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
  if (size >= 1e4) return `${+(value / 1e3).toPrecision(3)}k`;
  if (size < 1e-3) return value.toExponential(1).replace(".0e", "e");
  return String(+value.toPrecision(3));
}

function exact(value) {
  return Math.abs(value) < 1e-3 && value !== 0 ? value.toExponential(2) : String(+value.toPrecision(4));
}

function ticks(low, high, count) {
  if (high <= low) return [low];
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find((m) => m * power >= raw) * power;
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n += 1) found.push(n * step);
  return found;
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) {
    for (const m of high / low > 30 ? [1] : high / low > 6 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9]) {
      const value = m * 10 ** power;
      if (value >= low * 0.999 && value <= high * 1.001) found.push(value);
    }
  }
  return found.length > 1 ? found : ticks(low, high, 4);
}

// ---- curves -------------------------------------------------------------------------------------------------------------------------

// series: [{name, colour, points: [[x, y], …], faint, dots}]
function drawLines(box, series, { logarithmic = false, fromZero = false, unit = "step" } = {}) {
  series = series.map((s) => ({ ...s, points: s.points.filter(([, y]) => y !== null && (!logarithmic || y > 0)) })).filter((s) => s.points.length);
  box.replaceChildren();
  if (!series.length) {
    box.append(html("p", "tip", "no values yet"));
    return;
  }
  const width = box.clientWidth, height = box.clientHeight;
  const margin = { left: 46, right: 20, top: series.length > 1 ? 30 : 14, bottom: 24 };
  const all = series.flatMap((s) => s.points);
  const dotted = series.filter((s) => s.dots).flatMap((s) => s.points.map(([, y]) => y));
  const xs = all.map(([x]) => x), sorted = all.map(([, y]) => y).sort((a, b) => a - b);
  const x0 = Math.min(...xs), x1 = Math.max(...xs, x0 + 1e-9);
  // A few wild steps must not press the rest of the curve flat: lines may leave the picture, dots may not.
  const cut = (share) => sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
  let low = Math.min(cut(0.005), ...dotted), high = Math.max(cut(0.995), ...dotted);
  if (fromZero) low = 0;
  if (logarithmic) {
    const pad = (high / low) ** 0.06 || 1.05;
    low /= Math.max(pad, 1.02); high *= Math.max(pad, 1.02);
  } else {
    const pad = (high - low) * 0.06 || Math.abs(high) * 0.05 || 1;
    low = fromZero ? 0 : low - pad; high += pad;
  }
  const scale = logarithmic ? Math.log : (v) => v;
  const px = (x) => margin.left + ((x - x0) / (x1 - x0 || 1)) * (width - margin.left - margin.right);
  const py = (y) => {
    const share = (scale(y) - scale(low)) / (scale(high) - scale(low) || 1);
    return height - margin.bottom - Math.max(-0.02, Math.min(1.02, share)) * (height - margin.top - margin.bottom);
  };
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${series.map((s) => s.name).join(", ")} by ${unit}` });
  for (const y of logarithmic ? logTicks(low, high) : ticks(low, high, height > 200 ? 6 : 5)) {
    picture.append(svg("line", { class: "grid", x1: margin.left, x2: width - margin.right, y1: py(y), y2: py(y) }));
    picture.append(svg("text", { x: margin.left - 7, y: py(y) + 4, "text-anchor": "end" }, short(y)));
  }
  const wide = ticks(x0, x1, Math.max(3, Math.floor(width / 90))).filter((x) => Number.isInteger(x) || x1 - x0 < 3);
  for (const x of wide.length ? wide : [x0]) picture.append(svg("text", { x: px(x), y: height - 7, "text-anchor": "middle" }, short(x)));
  for (const s of series) {
    const d = s.points.map(([x, y], i) => `${i ? "L" : "M"}${px(x).toFixed(1)} ${py(y).toFixed(1)}`).join("");
    picture.append(svg("path", { d, stroke: s.colour, opacity: s.faint ? 0.45 : 1, style: s.faint ? "stroke-width:1" : "" }));
    if (s.dots || s.points.length === 1) {
      for (const [x, y] of s.points) picture.append(svg("circle", { cx: px(x), cy: py(y), r: s.points.length > 80 ? 1.5 : 3, fill: s.colour }));
    }
  }
  box.append(picture);
  if (series.length > 1) {
    const legend = html("div", "legend");
    for (const s of series.filter((one) => !one.faint || series.length === 1)) {
      const entry = html("span", "");
      const mark = document.createElement("i");
      mark.style.background = s.colour;
      entry.append(mark, s.name);
      legend.append(entry);
    }
    box.append(legend);
  }
  hover(box, picture, series, { px, py, x0, x1, margin, width, height, unit });
}

function nearest(points, x) {
  let low = 0, high = points.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < x) low = middle; else high = middle;
  }
  return Math.abs(points[low][0] - x) <= Math.abs(points[high][0] - x) ? points[low] : points[high];
}

function hover(box, picture, series, { px, py, x0, x1, margin, width, height, unit }) {
  const cursor = svg("line", { class: "cursor", y1: margin.top, y2: height - margin.bottom, visibility: "hidden" });
  const marks = series.map((s) => svg("circle", { r: 3.5, fill: s.colour, visibility: "hidden" }));
  const tip = html("div", "tip");
  tip.hidden = true;
  picture.append(cursor, ...marks);
  box.append(tip);
  const longest = series.reduce((a, b) => (b.points.length > a.points.length ? b : a));
  picture.addEventListener("pointermove", (event) => {
    const place = ((event.clientX - picture.getBoundingClientRect().left) * width) / picture.getBoundingClientRect().width;
    const x = x0 + ((place - margin.left) / (width - margin.left - margin.right)) * (x1 - x0);
    const at = nearest(longest.points, x)[0];
    tip.replaceChildren(html("div", "", `${unit} ${at.toLocaleString("en")}`));
    series.forEach((s, i) => {
      const [sx, sy] = nearest(s.points, at);
      const line = html("div", "", `${s.name} ${exact(sy)}${sx === at ? "" : ` (${unit} ${sx.toLocaleString("en")})`}`);
      line.style.color = s.colour;
      tip.append(line);
      marks[i].setAttribute("cx", px(sx));
      marks[i].setAttribute("cy", py(sy));
      marks[i].setAttribute("visibility", s.faint ? "hidden" : "visible");
    });
    cursor.setAttribute("x1", px(at));
    cursor.setAttribute("x2", px(at));
    cursor.setAttribute("visibility", "visible");
    tip.hidden = false;
    const left = px(at) + 12 + tip.offsetWidth > width ? px(at) - 12 - tip.offsetWidth : px(at) + 12;
    tip.style.left = `${Math.max(2, left)}px`;
    tip.style.top = `${margin.top + 4}px`;
  });
  picture.addEventListener("pointerleave", () => {
    tip.hidden = true;
    for (const node of [cursor, ...marks]) node.setAttribute("visibility", "hidden");
  });
}

// Exponential mean that is right from the first value on (it divides by the weight it has gathered).
function smoothed(points, factor) {
  let mean = 0, weight = 0;
  return points.filter(([, y]) => y !== null).map(([x, y]) => {
    mean = factor * mean + (1 - factor) * y;
    weight = factor * weight + 1 - factor;
    return [x, mean / weight];
  });
}

// ---- bars ---------------------------------------------------------------------------------------------------------------------------

function drawBars(box, values, name, fill) {
  box.replaceChildren();
  const width = box.clientWidth, height = box.clientHeight, margin = { left: 46, right: 14, top: 14, bottom: 24 };
  const high = Math.max(...values.map((v) => v ?? 0)) * 1.08 || 1;
  const py = (y) => height - margin.bottom - (y / high) * (height - margin.top - margin.bottom);
  const each = (width - margin.left - margin.right) / values.length;
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": name });
  for (const y of ticks(0, high, 3)) {
    picture.append(svg("line", { class: "grid", x1: margin.left, x2: width - margin.right, y1: py(y), y2: py(y) }));
    picture.append(svg("text", { x: margin.left - 7, y: py(y) + 4, "text-anchor": "end" }, short(y)));
  }
  values.forEach((value, i) => {
    const left = margin.left + i * each;
    if (value) {
      const bar = svg("rect", { x: left + 1.5, width: Math.max(1, each - 3), y: py(value), height: Math.max(1, py(0) - py(value)), rx: 2, fill });
      bar.append(svg("title", {}, `t ${(i / values.length).toFixed(1)} – ${((i + 1) / values.length).toFixed(1)}: ${exact(value)}`));
      picture.append(bar);
    }
    if (i % 2 === 0) picture.append(svg("text", { x: left, y: height - 7, "text-anchor": "middle" }, (i / values.length).toFixed(1)));
  });
  picture.append(svg("text", { x: width - margin.right, y: height - 7, "text-anchor": "end" }, "1.0"));
  box.append(picture);
}

// ---- this page ----------------------------------------------------------------------------------------------------------------------

const column = (n) => values.points.map((p) => [p[0], p[n]]);

function draw() {
  if (element("chart-loss")) {
    const raw = column(1), factor = +element("smooth").value;
    const series = [{ name: "each step", colour: colour(0), points: raw, faint: factor > 0 }];
    if (factor > 0) series.push({ name: "training", colour: colour(0), points: smoothed(raw, factor) });
    else series[0].name = "training";
    series.push({ name: "validation", colour: colour(1), points: values.validation.map((v) => [v[0], v[1]]), dots: true });
    series.push({ name: "validation, averaged weights", colour: colour(2), points: values.validation.map((v) => [v[0], v[2]]), dots: true });
    drawLines(element("chart-loss"), series, { logarithmic: element("log").checked });
    drawLines(element("chart-lr"), [{ name: "learning rate", colour: colour(0), points: column(2) }], { fromZero: true });
    drawLines(element("chart-grad"), [{ name: "gradient norm", colour: colour(0), points: column(3) }], { fromZero: true });
  }
  if (element("chart-memory")) {
    const points = column(4).map(([x, y]) => [x, y === null ? null : y / 2 ** 30]);
    drawLines(element("chart-memory"), [{ name: "GiB", colour: colour(0), points }], { fromZero: true });
  }
  if (element("chart-binloss")) {
    drawBars(element("chart-binloss"), values.bins.map((b) => b.loss), "Mean loss by timestep", colour(0));
    drawBars(element("chart-bincount"), values.bins.map((b) => b.samples), "Samples by timestep", colour(2));
  }
}

// A short run has few points: as much smoothing as a long one bears would draw its curve far behind the loss.
if (element("smooth")) element("smooth").value = Math.max(0, Math.min(0.8, 1 - 20 / values.points.length));
draw();
let lastWidth = window.innerWidth;
window.addEventListener("resize", () => {
  if (window.innerWidth !== lastWidth) { lastWidth = window.innerWidth; draw(); }
});
for (const id of ["log", "smooth"]) element(id)?.addEventListener("input", draw);

for (const preview of document.querySelectorAll(".preview")) {
  const players = [...preview.querySelectorAll("audio")];
  const take = preview.querySelector(".take");
  take?.addEventListener("change", () => {
    const player = players[players.length - 1], place = player.currentTime, playing = !player.paused;
    player.src = take.value;
    player.currentTime = place;
    if (playing) player.play();
  });
  preview.querySelector(".switch")?.addEventListener("click", () => {
    const from = players.find((p) => !p.paused) ?? players[1], to = players.find((p) => p !== from);
    to.currentTime = from.ended ? 0 : from.currentTime;
    from.pause();
    to.play();
  });
}
const copy = element("copy");
if (navigator.clipboard) {
  copy.hidden = false;
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(element("command").textContent);
    copy.textContent = "Copied";
  });
}
