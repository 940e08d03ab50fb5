// The page's behavior. All text that comes from files is set as textContent, never as HTML.
"use strict";

const COLORS = ["#3b7dd8", "#d1495b", "#2e9b67", "#9a6fd0", "#c77d0a", "#3b9ab2"];
const SVG = "http://www.w3.org/2000/svg";
const $ = (id) => document.getElementById(id);

let page; // what /api/page returned
const chosen = {}; // image of each picker, by the tab's id

function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value !== null) node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

function svg(name, attributes = {}, text = "") {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = text;
  return node;
}

const messages = new Map(); // by what failed: the success of one thing must not hide the failure of another

function show(source, message) {
  if (message) messages.set(source, message);
  else messages.delete(source);
  $("message").textContent = [...messages.values()].join(" · ");
  $("message").hidden = !messages.size;
}

async function ask(path, query = {}, options = {}) {
  const response = await fetch(`${path}?${new URLSearchParams(query)}`, options);
  if (response.ok) return response.json();
  const text = await response.text();
  let error = text;
  try { error = JSON.parse(text).error; } catch { /* not JSON: the text itself */ }
  throw new Error(error || `${response.status}`);
}

const send = (path, values) => ask(path, {}, { method: "POST", body: JSON.stringify(values) });

// Run the newest of several overlapping requests; answers to older ones are dropped. A message of the same source
// stays until the next request starts.
function latest(source, work) {
  let number = 0;
  return async (...args) => {
    const own = ++number;
    show(source, "");
    try {
      await work(() => own === number, ...args);
    } catch (error) {
      if (own === number) show(source, error.message);
    }
  };
}

function debounce(work, delay) {
  let timer;
  return (...args) => { clearTimeout(timer); timer = setTimeout(() => work(...args), delay); };
}

// Charts

const round = (value) => (value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential(1) : value.toLocaleString("en", { maximumSignificantDigits: 4 }));

function ticks(low, high) {
  const span = high - low || 1, power = 10 ** Math.floor(Math.log10(span / 4));
  const step = [1, 2, 5, 10].map((k) => k * power).find((size) => span / size <= 5);
  const result = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-9; at += step) result.push(Math.abs(at) < step * 1e-9 ? 0 : at);
  return result;
}

// series: [{name, points: [[x, y], ...], color, dashed}]; returns a figure.
function chart(title, series, { x = "epoch", log = false, mark = null } = {}) {
  const [width, height, left, bottom, top] = [440, 230, 52, 34, 8];
  const points = series.flatMap((one) => one.points).filter(([, y]) => !log || y > 0);
  const figure = element("figure", { class: "plot" }, element("h3", {}, title));
  if (!points.length) return figure;
  const scale = (y) => (log ? Math.log10(y) : y);
  const xs = points.map((p) => p[0]), ys = points.map((p) => scale(p[1]));
  const range = (values) => [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))];
  const [x0, x1] = range(xs);
  let [y0, y1] = range(ys);
  if (log) y0 = Math.max(y0, y1 - 5);
  if (y0 === y1) [y0, y1] = [y0 - (Math.abs(y0) || 1) * 0.05, y1 + (Math.abs(y1) || 1) * 0.05];
  const px = (value) => left + ((value - x0) / (x1 - x0 || 1)) * (width - left - 10);
  const py = (value) => height - bottom - ((value - y0) / (y1 - y0)) * (height - bottom - top);
  const last = series.map((one) => (one.points.length ? `${one.name} ${round(one.points.at(-1)[1])}` : "")).filter(Boolean);
  const plot = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title} against ${x}; last: ${last.join(", ")}` });
  for (const at of ticks(y0, y1)) {
    plot.append(svg("line", { class: "grid", x1: left, x2: width - 10, y1: py(at), y2: py(at) }));
    plot.append(svg("text", { x: left - 6, y: py(at) + 4, "text-anchor": "end" }, log ? `1e${round(at)}` : round(at)));
  }
  for (const at of ticks(x0, x1)) plot.append(svg("text", { x: px(at), y: height - bottom + 16, "text-anchor": "middle" }, round(at)));
  plot.append(svg("text", { x: (left + width) / 2, y: height - 3, "text-anchor": "middle" }, x));
  for (const one of series) {
    const every = Math.ceil(one.points.length / 1500);
    const kept = one.points.filter(([, y], i) => (i % every === 0 || i === one.points.length - 1) && (!log || y > 0));
    const path = kept.map(([a, b]) => `${px(a).toFixed(1)},${py(Math.max(scale(b), y0)).toFixed(1)}`).join(" ");
    if (kept.length === 1) plot.append(svg("circle", { cx: px(kept[0][0]), cy: py(scale(kept[0][1])), r: 3, fill: one.color }));
    plot.append(svg("polyline", { class: "curve", points: path, stroke: one.color, "stroke-dasharray": one.dashed ? "5 4" : "none" }));
  }
  if (mark) {
    plot.append(svg("line", { class: "mark", x1: px(mark.at), x2: px(mark.at), y1: top, y2: height - bottom }));
    plot.append(svg("text", { x: px(mark.at) + 4, y: top + 10 }, mark.text));
  }
  figure.append(plot);
  if (mark) return figure; // one curve, whose last value means nothing
  const legend = element("div", { class: "legend" });
  for (const one of series) {
    if (!one.points.length) continue;
    const line = svg("svg", { viewBox: "0 0 22 8", "aria-hidden": "true" });
    line.append(svg("line", { x1: 0, x2: 22, y1: 4, y2: 4, stroke: one.color, "stroke-width": 2, "stroke-dasharray": one.dashed ? "5 4" : "none" }));
    legend.append(element("span", {}, line, ` ${one.name}: ${round(one.points.at(-1)[1])}`));
  }
  figure.append(legend);
  return figure;
}

// Training

const KINDS = [ // title, keys, suffix of a key, and the data that names of runs contain if they differ
  ["Loss", (key) => key === "loss" || key.startsWith("held_out"), (key) => (key === "loss" ? "" : "held out"), "data"],
  ["k-NN accuracy (%)", (key) => /^knn\/k\d+\/mean\/top1$/.test(key) || key === "knn/majority", (key) => (key === "knn/majority" ? "majority" : `k = ${key.match(/k(\d+)/)[1]}`), "knn"],
  ["Effective rank (RankMe)", (key) => key.includes("rankme"), () => "", "data"],
  ["Learning rate", (key) => key === "lr", () => ""],
  ["Images per second", (key) => key === "images_per_s", () => ""],
  ["Share of time spent waiting for data", (key) => key === "data_wait_fraction", () => ""],
];

const logs = []; // {records, position, broken, seen} of each run

async function poll() {
  let changed = false;
  for (const [run, log] of logs.entries()) {
    const answer = await ask("/api/metrics", { run, position: log.position });
    if (answer.restarted) { log.records = []; log.broken = 0; }
    if (answer.records.length || answer.restarted) { changed = true; log.seen = log.position ? Date.now() : 0; }
    for (const record of answer.records) log.records.push(record);
    log.position = answer.position;
    log.broken += answer.broken;
  }
  if (changed) drawCharts();
  const broken = logs.reduce((sum, log) => sum + log.broken, 0);
  const parts = logs.map((log, run) => {
    const last = log.records.at(-1);
    const fresh = Date.now() - log.seen < 60000 ? " · training" : ""; // it has grown since the page was opened
    return last ? `${page.runs[run].name}: step ${last.step.toLocaleString("en")}, epoch ${round(last.epoch)}${fresh}` : `${page.runs[run].name}: no metrics yet`;
  });
  $("live").textContent = parts.join(" · ") + (broken ? ` · ${broken} lines of metrics.jsonl are no records and are left out` : "");
  return changed;
}

function drawCharts() {
  const figures = KINDS.map(([title, wants, suffix, data]) => {
    const series = [], several = new Set(page.runs.map((run) => run[data]).filter(Boolean)).size > 1;
    logs.forEach((log, run) => {
      const keys = [...new Set(log.records.flatMap(Object.keys))].filter(wants).sort();
      keys.forEach((key, i) => {
        const points = log.records.filter((record) => Number.isFinite(record[key])).map((record) => [record.epoch, record[key]]);
        const name = [page.runs[run].name, suffix(key), several && `on ${page.runs[run][data]}`].filter(Boolean).join(", ");
        const dashed = key.startsWith("held_out") || key === "knn/majority";
        series.push({ name, points, color: COLORS[(run + (title.startsWith("k-NN") ? i * logs.length : 0)) % COLORS.length], dashed });
      });
    });
    return series.some((one) => one.points.length) ? chart(title, series) : null;
  });
  $("charts").replaceChildren(...figures.filter(Boolean));
}

async function keepPolling() {
  try {
    const grown = await poll();
    if (grown || statuses.some((status) => status.unfinished)) await updateStatus();
    show("server", "");
  } catch (error) {
    show("server", `the page's server does not answer (${error.message}); is pixmim view still running?`);
  }
  setTimeout(keepPolling, document.hidden ? 10000 : 2000);
}

const statuses = [];

async function updateStatus() {
  for (const run of page.runs.keys()) statuses[run] = await ask("/api/status", { run });
  const rows = statuses.flatMap((status, run) => status.skipped.map((row) => [page.runs[run].name, ...row]));
  const count = statuses.reduce((sum, status) => sum + status.count, 0);
  const problems = statuses.map((status) => status.problem).filter(Boolean);
  $("unfinished").replaceChildren(...statuses.flatMap((status, run) =>
    (status.unfinished ? [element("p", { class: "soft" }, `${page.runs[run].name} is not finished: ${status.unfinished}`)] : [])));
  $("skipped").replaceChildren(
    element("p", { class: "soft" }, count ? `${count.toLocaleString("en")} images could not be read.` : "None."),
    ...problems.map((text) => element("p", { class: "soft" }, text)),
    ...(rows.length ? [table(["run", "image", "reason"], rows.map((row) => [row[0], row.at(-2), row.at(-1)]))] : []),
  );
  drawCheckpoint();
}

function table(head, rows) {
  const cells = (name, row) => element("tr", {}, ...row.map((text) => element(name, {}, String(text))));
  return element("div", { class: "scroll" }, element("table", {}, cells("th", head), ...rows.map((row) => cells("td", row))));
}

function drawCheckpoint() {
  const run = Number($("checkpoint-run").value), steps = statuses[run] ? statuses[run].steps : [];
  const slider = $("checkpoint-step"), atEnd = slider.value === slider.max;
  slider.max = Math.max(0, steps.length - 1);
  slider.disabled = steps.length < 2;
  if (atEnd) slider.value = slider.max;
  const step = steps[Number(slider.value)];
  $("checkpoint-label").textContent = step === undefined ? "there is no checkpoint yet" : `step ${step.toLocaleString("en")} (${Number(slider.value) + 1} of ${steps.length})`;
  slider.setAttribute("aria-valuetext", $("checkpoint-label").textContent);
  const image = $("checkpoint-image"), source = `/api/checkpoint?run=${run}&step=${step}`;
  image.hidden = step === undefined || !page.dataset.count;
  if (!image.hidden && image.getAttribute("src") !== source) {
    image.src = source;
    image.alt = `Reconstructions by the checkpoint of step ${step}: image, masked, prediction, target, pasted and unaided`;
  }
}

// Choosing an image

const picked = {}; // what to do with a chosen image, by tab

function makePicker(place) {
  const tab = place.dataset.for;
  place.append($("picker").content.cloneNode(true));
  const [file, number] = [place.querySelector(".file input"), place.querySelector(".number input")];
  const count = page.dataset.count;
  place.querySelector(".of").textContent = count ? `of ${count.toLocaleString("en")} in ${page.dataset.name}` : "";
  for (const part of [place.querySelector(".number"), place.querySelector(".random")]) part.hidden = !count;
  number.max = Math.max(0, count - 1);
  number.addEventListener("change", () => choose(tab, `d${Math.min(count - 1, Math.max(0, Math.floor(Number(number.value))))}`));
  place.querySelector(".random").addEventListener("click", () => choose(tab, `d${Math.floor(Math.random() * count)}`));
  file.addEventListener("change", () => file.files.length && upload(tab, file.files[0]));
  const panel = $(tab);
  panel.addEventListener("dragover", (event) => { event.preventDefault(); panel.classList.add("drop"); });
  panel.addEventListener("dragleave", () => panel.classList.remove("drop"));
  panel.addEventListener("drop", (event) => {
    event.preventDefault();
    panel.classList.remove("drop");
    if (event.dataTransfer.files.length) upload(tab, event.dataTransfer.files[0]);
  });
  const some = [...Array(Math.min(count, 12)).keys()].map((i) => Math.floor((i * count) / Math.min(count, 12)));
  place.querySelector(".thumbnails").append(...some.map((index) => thumbnail(`d${index}`, `image ${index}`, 72, () => choose(tab, `d${index}`))));
  if (count) choose(tab, "d0");
}

function thumbnail(image, text, side, action) {
  const preview = element("img", { src: `/api/thumbnail?image=${image}&side=${2 * side}`, alt: text, loading: "lazy", width: side, height: side });
  return element("button", { title: text, "data-image": image, "aria-pressed": "false", onclick: action }, preview);
}

const upload = latest("image", async (current, tab, file) => {
  const answer = await ask("/api/upload", { name: file.name }, { method: "POST", body: file });
  if (current()) await choose(tab, answer.image);
});

const choose = latest("image", async (current, tab, image) => {
  const answer = await ask("/api/image", { image });
  if (!current()) return;
  chosen[tab] = image;
  const place = document.querySelector(`.picker[data-for="${tab}"]`);
  place.querySelector(".name").textContent = [answer.name, answer.class].filter(Boolean).join(" · ");
  if (image.startsWith("d")) place.querySelector(".number input").value = image.slice(1);
  for (const button of place.querySelectorAll(".thumbnails button")) button.setAttribute("aria-pressed", button.dataset.image === image);
  await picked[tab]();
});

// Reconstruct

const mask = { hidden: [], rows: 0, columns: 0, cursor: 0, painting: null };

const drawMask = () => {
  const canvas = $("painter-canvas"), { rows, columns } = mask;
  const [h, w] = page.runs[0].size, factor = Math.max(1, Math.round(720 / Math.max(h, w)));
  [canvas.width, canvas.height] = [w * factor, h * factor];
  const pen = canvas.getContext("2d"), [cw, ch] = [canvas.width / columns, canvas.height / rows];
  mask.hidden.forEach((hidden, i) => {
    const [x, y] = [(i % columns) * cw, Math.floor(i / columns) * ch];
    if (hidden) { pen.fillStyle = "#787878e8"; pen.fillRect(x, y, cw, ch); }
    pen.strokeStyle = "#ffffff50";
    pen.strokeRect(x, y, cw, ch);
  });
  if (document.activeElement === $("painter")) {
    pen.strokeStyle = "#ffb000";
    pen.lineWidth = 4;
    pen.strokeRect((mask.cursor % columns) * cw + 2, Math.floor(mask.cursor / columns) * ch + 2, cw - 4, ch - 4);
  }
  const count = mask.hidden.reduce((sum, value) => sum + value, 0);
  $("painter-state").textContent = `${count} of ${mask.hidden.length} patches hidden (${Math.round((100 * count) / mask.hidden.length)} %)`;
};

function setPatch(index, hidden) {
  if (mask.hidden[index] === hidden) return;
  mask.hidden[index] = hidden;
  drawMask();
  reconstructSoon();
}

function patchAt(event) {
  const box = $("painter-canvas").getBoundingClientRect();
  const column = Math.floor(((event.clientX - box.left) / box.width) * mask.columns), row = Math.floor(((event.clientY - box.top) / box.height) * mask.rows);
  return row >= 0 && row < mask.rows && column >= 0 && column < mask.columns ? row * mask.columns + column : -1;
}

function preparePainter() {
  const painter = $("painter");
  painter.addEventListener("pointerdown", (event) => {
    const index = patchAt(event);
    if (index < 0) return;
    mask.painting = mask.hidden[index] ? 0 : 1;
    mask.cursor = index;
    painter.setPointerCapture(event.pointerId);
    setPatch(index, mask.painting);
  });
  painter.addEventListener("pointermove", (event) => {
    const index = mask.painting === null ? -1 : patchAt(event);
    if (index >= 0) setPatch(index, mask.painting);
  });
  for (const name of ["pointerup", "pointercancel"]) painter.addEventListener(name, () => { mask.painting = null; });
  painter.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -mask.columns, ArrowDown: mask.columns }[event.key];
    if (move !== undefined) mask.cursor = Math.min(mask.hidden.length - 1, Math.max(0, mask.cursor + move));
    else if (event.key === " ") setPatch(mask.cursor, mask.hidden[mask.cursor] ? 0 : 1);
    else return;
    event.preventDefault();
    drawMask();
    const place = `row ${Math.floor(mask.cursor / mask.columns) + 1}, column ${(mask.cursor % mask.columns) + 1}`;
    $("painter-state").textContent = `${place}: ${mask.hidden[mask.cursor] ? "hidden" : "visible"}. ${$("painter-state").textContent}`;
  });
  for (const name of ["focus", "blur"]) painter.addEventListener(name, drawMask);
}

const drawNewMask = latest("mask", async (current) => {
  const values = { run: 0, kind: $("mask-kind").value, ratio: $("mask-ratio").value, block_size: 2 * page.runs[0].patch, seed: $("mask-seed").value };
  const answer = await ask("/api/mask", values);
  if (!current()) return;
  [mask.rows, mask.columns] = answer.grid;
  mask.hidden = answer.hidden;
  drawMask();
  await reconstruct();
});

function drawing(url, name, text) {
  return element("figure", {}, element("img", { src: url, alt: `${name}: ${text}` }), element("figcaption", {}, element("strong", {}, name), ` ${text}`));
}

const reconstruct = latest("reconstruction", async (current) => {
  const runs = [...document.querySelectorAll("#models input:checked")].map((box) => Number(box.value));
  if (!chosen.reconstruct || !mask.hidden.length || !runs.length) return;
  $("predictions").setAttribute("aria-busy", "true");
  const answers = await send("/api/reconstruct", { image: chosen.reconstruct, hidden: mask.hidden, runs });
  if (!current()) return;
  const painted = answers.find((one) => one.columns);
  if (painted) $("painter-image").src = painted.columns.image;
  $("predictions").replaceChildren(...answers.flatMap((one) => [
    element("h3", {}, one.error ? one.name : `${one.name}, step ${one.step.toLocaleString("en")}`),
    ...(one.note ? [element("p", { class: "soft" }, one.note)] : []),
    one.error ? element("p", { class: "soft" }, one.error) : element("div", { class: "strip" }, ...Object.entries(one.columns).map(([name, url]) => drawing(url, name, page.columns[name]))),
  ]));
  $("predictions").removeAttribute("aria-busy");
});

const reconstructSoon = debounce(reconstruct, 150);

const drawLowPass = latest("low-pass", async (current) => {
  const radius = Number($("radius").value);
  const isTarget = page.runs[0].target === "low-frequency" && radius === page.runs[0].radius;
  $("radius-label").textContent = `${radius} bins${isTarget ? `, the target of ${page.runs[0].name}` : ""}`;
  if (!chosen.reconstruct) return;
  const answer = await ask("/api/low-pass", { image: chosen.reconstruct, run: 0, radius });
  if (!current()) return;
  const points = answer.spectrum.map((power, r) => [r, power]).slice(1);
  $("low-pass").replaceChildren(
    drawing(answer.kept, "kept", `${(100 * answer.share).toFixed(1)} % of the variance`),
    drawing(answer.removed, "removed", "around gray"),
    chart("Spectrum of the image", [{ name: "power", points, color: COLORS[0] }], { x: "frequency (cycles per shorter side)", log: true, mark: { at: radius, text: `r = ${radius}` } }),
  );
});

picked.reconstruct = async () => {
  if (mask.hidden.length) await reconstruct();
  else await drawNewMask();
  await drawLowPass();
};

// Neighbors

let indexes = [];

function drawEncoders() {
  const boxes = page.encoders.map((name, i) => {
    const status = indexes[i], started = Boolean(status && !status.error); // what failed can be tried again
    const box = element("input", { type: "checkbox", value: i, checked: started, disabled: started, onchange: () => startIndex(i) });
    const parts = [box, ` ${name} `];
    if (status && status.error) parts.push(element("span", { class: "soft" }, status.error));
    else if (status && !status.complete) parts.push(element("progress", { value: status.done, max: status.total || 1, "aria-label": `index of ${name}` }), ` ${status.total ? Math.round((100 * status.done) / status.total) : 0} %`);
    return element("label", {}, ...parts);
  });
  $("encoders").replaceChildren(element("legend", {}, "Encoders (a tick computes features of all images, once)"), ...boxes);
}

const startIndex = latest("index", async (_, encoder) => {
  await send("/api/index", { encoder });
  await watchIndexes();
});

const watchIndexes = latest("indexes", async () => {
  const before = indexes.map((one) => Boolean(one && one.complete));
  indexes = await ask("/api/indexes");
  drawEncoders();
  if (indexes.some((one, i) => one && one.complete && !before[i])) { await findNeighbors(); await drawLists(); }
  if (indexes.some((one) => one && !one.complete && !one.error)) setTimeout(watchIndexes, 700);
});

function neighbor(one, text) {
  return element("figure", { class: "neighbor" }, thumbnail(one.image, one.name, 108, () => choose("neighbors", one.image)),
    element("figcaption", {}, [one.class, text].filter(Boolean).join(" · ")));
}

const findNeighbors = latest("neighbors", async (current) => {
  if (!chosen.neighbors) return;
  const answers = await ask("/api/neighbors", { image: chosen.neighbors, count: 10 });
  if (!current()) return;
  const rows = answers.flatMap((one) => [
    element("h3", {}, `Nearest by ${page.encoders[one.encoder]}`),
    element("div", { class: "strip" }, ...one.images.map((found) => neighbor(found, found.cosine.toFixed(3)))),
  ]);
  const query = element("figure", { class: "neighbor" }, thumbnail(chosen.neighbors, "the query", 108, () => {}), element("figcaption", {}, "query"));
  $("found").replaceChildren(element("div", { class: "strip" }, query), ...rows);
});

const drawAttention = latest("attention", async (current) => {
  if (!chosen.neighbors) return;
  const image = chosen.neighbors;
  const rows = await Promise.all(page.runs.map(async (run, i) => {
    let answer;
    try { answer = await ask("/api/attention", { image, run: i }); } catch (error) { answer = { about: error.message, columns: {} }; }
    const figures = Object.entries(answer.columns).map(([name, url]) =>
      element("figure", {}, element("img", { src: url, alt: `attention of ${run.name}, ${name}` }), element("figcaption", {}, name)));
    return [element("h3", {}, `${run.name}: ${answer.about}`), element("div", { class: "strip" }, ...figures)];
  }));
  if (current()) $("attention").replaceChildren(...rows.flat());
});

async function drawLists() {
  const parts = [];
  for (const [encoder, status] of indexes.entries()) {
    if (!status || !status.complete) continue;
    const duplicates = await ask("/api/list", { encoder, kind: "duplicates", count: 12 });
    const outliers = await ask("/api/list", { encoder, kind: "outliers", count: 12 });
    const link = (kind) => element("a", { href: `/api/list.csv?encoder=${encoder}&kind=${kind}`, download: `${kind}.csv` }, "all as CSV");
    parts.push(
      element("h2", {}, `Most alike by ${page.encoders[encoder]} (`, link("duplicates"), ")"),
      element("div", { class: "strip" }, ...duplicates.map((one) => element("div", { class: "pair" }, neighbor(one, ""), neighbor(one.other, one.cosine.toFixed(3))))),
      element("h2", {}, `Least like any other by ${page.encoders[encoder]} (`, link("outliers"), ")"),
      element("div", { class: "strip" }, ...outliers.map((one) => neighbor(one, one.cosine.toFixed(3)))),
    );
  }
  $("lists").replaceChildren(...parts);
}

picked.neighbors = async () => { await findNeighbors(); await drawAttention(); };

// Map

async function drawMap(_, again = false) { // again: an attempt that waits for the one that a click started
  const encoder = Number($("map-encoder").value), say = (text) => { $("map-state").textContent = text; };
  const wait = (text) => { say(text); setTimeout(() => startMap(true), 700); };
  indexes = await ask("/api/indexes");
  const index = indexes[encoder];
  if (again && index && index.error) return say(index.error);
  if (!index || index.error) await send("/api/index", { encoder });
  if (!index || !index.complete) {
    return wait(index && index.total ? `features of all images: ${Math.round((100 * index.done) / index.total)} %` : "features of all images: starting");
  }
  const state = (await ask("/api/maps"))[encoder], failed = !["", "working", "ready"].includes(state);
  if (state === "" || (failed && !again)) await send("/api/map", { encoder });
  if (state === "" || state === "working" || (failed && !again)) return wait("projecting, and writing thumbnails");
  if (state !== "ready") return say(state);
  say("");
  $("map-frame").src = `/map/${encoder}/`;
  $("map-frame").hidden = false;
}

const startMap = latest("map", drawMap);

// Tabs

function select(tab) {
  for (const one of document.querySelectorAll('[role="tab"]')) {
    const selected = one === tab;
    one.setAttribute("aria-selected", selected);
    one.tabIndex = selected ? 0 : -1;
    $(one.getAttribute("aria-controls")).hidden = !selected;
  }
  const name = tab.getAttribute("aria-controls"), place = document.querySelector(`.picker[data-for="${name}"]`);
  history.replaceState(null, "", `#${name}`);
  if (place && !place.childElementCount) makePicker(place);
  if (name === "neighbors") watchIndexes();
}

function prepareTabs() {
  const tabs = [...document.querySelectorAll('[role="tab"]')];
  for (const tab of tabs) {
    tab.addEventListener("click", () => select(tab));
    tab.addEventListener("keydown", (event) => {
      const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!move) return;
      const next = tabs[(tabs.indexOf(tab) + move + tabs.length) % tabs.length];
      next.focus();
      select(next);
    });
  }
  const named = tabs.find((tab) => `#${tab.getAttribute("aria-controls")}` === location.hash);
  if (named) select(named);
}

async function start() {
  page = await ask("/api/page");
  document.title = `${page.runs.map((run) => run.name).join(", ")} · pixmim view`;
  $("about").textContent = page.runs.map((run) => `${run.name}: ${run.about}`).join(" · ");
  show("dataset", page.problem);
  page.runs.forEach((run, i) => {
    logs.push({ records: [], position: "", broken: 0, seen: 0 });
    $("checkpoint-run").append(element("option", { value: i }, run.name));
    $("models").append(element("label", {}, element("input", { type: "checkbox", value: i, checked: true, onchange: () => reconstruct() }), ` ${run.name}`));
  });
  const several = page.runs.length > 1;
  $("settings-title").hidden = !several;
  const settings = page.settings.map((row) => [row.name, ...row.values]);
  if (several) $("settings").append(settings.length ? table(["setting", ...page.runs.map((run) => run.name)], settings) : element("p", { class: "soft" }, "None."));
  const first = page.runs[0];
  $("mask-ratio").value = first.ratio;
  $("mask-ratio-label").textContent = `${Math.round(100 * first.ratio)} %`;
  $("radius").max = Math.floor(Math.min(...first.size) / 2);
  $("radius").value = first.radius || Math.round((40 * Math.min(...first.size)) / 224);
  $("map-encoder").append(...page.encoders.map((name, i) => element("option", { value: i }, name)));
  $("map-start").addEventListener("click", () => startMap());
  $("checkpoint-run").addEventListener("change", drawCheckpoint);
  $("checkpoint-step").addEventListener("input", drawCheckpoint);
  $("mask-ratio").addEventListener("input", () => {
    $("mask-ratio-label").textContent = `${Math.round(100 * $("mask-ratio").value)} %`;
    if ($("mask-kind").value === "as-trained") $("mask-kind").value = "random";
  });
  for (const id of ["mask-kind", "mask-ratio", "mask-seed"]) $(id).addEventListener("change", () => drawNewMask());
  $("mask-next").addEventListener("click", () => { $("mask-seed").value = Number($("mask-seed").value) + 1; drawNewMask(); });
  $("mask-clear").addEventListener("click", () => { mask.hidden = mask.hidden.map((_, i) => (i ? 0 : 1)); drawMask(); reconstruct(); });
  $("radius").addEventListener("input", debounce(() => drawLowPass(), 60));
  preparePainter();
  prepareTabs();
  await keepPolling();
  await updateStatus();
}

start().catch((error) => show("server", error.message));
