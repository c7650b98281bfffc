// ----- watch

const COLORS = 6;
// colours with a solid line, then with a dashed one
const MOST_CHOSEN = 2 * COLORS;
const POLL_MS = 3000;
const CHARTS = [
  { name: "train/loss", title: "Training loss", unit: "nats per token", digits: 4, noisy: true },
  { name: "val/bpb", title: "Validation", unit: "bits per byte", digits: 4 },
  { name: "core_metric", title: "CORE", unit: "with 95% interval", digits: 4, empty: "Not evaluated: nanochat evaluate RUN --core" },
  { name: "train/tok_per_sec", title: "Speed", unit: "tokens per second", digits: 0, fromZero: true, noisy: true },
];
// pixels
const DOT_RADIUS = 2.6;
// of the curves that are smoothed, the weight of what came before
const SMOOTHING = 0.9;
// share of a curve, at its start, that does not decide the range of the y axis
const EARLY = 0.08;

const watching = { runs: [], chosen: new Map(), began: false, timer: 0, busy: false, at: null };

// a place on the x axis, which all charts show together; null for none
function pointAt(place) {
  watching.at = place;
  charts.forEach((chart) => chart.showCross());
}

// from the first to the last place of any curve, so that the charts can be compared
function rangeOfX() {
  let low = Infinity, high = -Infinity;
  for (const run of watching.chosen.values()) {
    for (const curve of Object.values(run.data?.curves ?? {})) {
      for (const place of curve.axes[$("axis").value]) {
        if (place === null) continue;
        low = Math.min(low, place);
        high = Math.max(high, place);
      }
    }
  }
  return high > low ? [low, high] : [low - 0.5, high + 0.5];
}

class Chart {
  constructor(spec) {
    this.spec = spec;
    this.readout = make("div", { class: "readout" });
    this.svg = draw("svg", { role: "img", tabindex: 0 });
    this.node = make("div", { class: "card chart" },
      make("h2", {}, spec.title, make("small", {}, spec.unit)), this.svg, this.readout);
    this.svg.addEventListener("pointermove", (event) => {
      pointAt(this.fromPixel(event.clientX - this.svg.getBoundingClientRect().left));
    });
    const leave = () => pointAt(null);
    this.svg.addEventListener("pointerleave", leave);
    this.svg.addEventListener("blur", leave);
    // read out while somebody walks along the curves, and not whenever a run goes on
    this.svg.addEventListener("focus", () => this.readout.setAttribute("aria-live", "polite"));
    this.svg.addEventListener("blur", () => this.readout.removeAttribute("aria-live"));
    this.svg.addEventListener("keydown", (event) => this.walk(event));
    new ResizeObserver(() => this.draw()).observe(this.svg);
  }

  walk(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || !this.range) return;
    event.preventDefault();
    const [low, high] = this.range.x;
    const start = watching.at ?? (step > 0 ? low : high);
    pointAt(Math.min(high, Math.max(low, start + (step * (high - low)) / 50)));
  }

  // [{run, x, y, low, high}] of the chosen runs that have this curve
  series() {
    const axis = $("axis").value;
    const found = [];
    for (const run of watching.chosen.values()) {
      const curve = run.data?.curves[this.spec.name];
      if (!curve?.value.length) continue;
      const kept = curve.axes[axis].map((x, i) => (x === null ? -1 : i)).filter((i) => i >= 0);
      if (!kept.length) continue;
      const of = (numbers) => kept.map((i) => numbers[i]);
      const raw = of(curve.value);
      const y = this.spec.noisy && $("smooth").checked ? smoothed(raw) : raw;
      found.push({ run, x: of(curve.axes[axis]), y, raw, low: of(curve.low), high: of(curve.high) });
    }
    return found;
  }

  draw() {
    const width = this.svg.clientWidth, height = this.svg.clientHeight;
    if (!width) return;
    this.found = this.series();
    this.svg.replaceChildren();
    this.range = null;
    if (!this.found.length) {
      const text = watching.chosen.size ? this.spec.empty ?? "Nothing yet." : "Choose a run.";
      this.svg.append(draw("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, text));
      this.svg.setAttribute("aria-label", `${this.spec.title}: ${text}`);
      this.readout.replaceChildren();
      return;
    }
    this.box = { left: 48, right: width - 12, top: 8, bottom: height - 22 };
    this.range = { x: rangeOfX(), y: this.rangeOfY() };
    this.drawAxes();
    const clip = `clip-${CHARTS.indexOf(this.spec)}`;
    const { left, right, top, bottom } = this.box;
    // only heights may leave the chart; dots at its sides are shown whole
    const shown = { x: left - DOT_RADIUS, y: top, width: right - left + 2 * DOT_RADIUS, height: bottom - top };
    this.svg.append(draw("clipPath", { id: clip }, draw("rect", shown)));
    const curves = draw("g", { "clip-path": `url(#${clip})` });
    for (const series of this.found) curves.append(this.drawSeries(series));
    this.cross = draw("g", {});
    this.svg.append(curves, this.cross);
    this.svg.setAttribute("aria-label", `${this.spec.title}: ${this.found.map((series) => `${series.run.name} ${this.number(series.y.at(-1))}`).join(", ")}`);
    this.showCross();
  }

  rangeOfY() {
    const numbers = [];
    for (const { x, y, low, high } of this.found) {
      const whiskers = this.spec.name === "core_metric";
      const early = x[0] + EARLY * (x.at(-1) - x[0]);
      y.forEach((value, i) => {
        // the first values of a loss would flatten the rest
        if (x[i] < early && y.length > 20) return;
        numbers.push(value);
        if (whiskers && low[i] !== null) numbers.push(low[i], high[i]);
      });
    }
    let low = Math.min(...numbers), high = Math.max(...numbers);
    if (this.spec.fromZero) low = Math.min(0, low);
    const room = (high - low || Math.abs(high) * 0.1 || 1) * 0.06;
    return [this.spec.fromZero && low === 0 ? 0 : low - room, high + room];
  }

  toX(x) {
    const [low, high] = this.range.x;
    return this.box.left + ((x - low) / (high - low)) * (this.box.right - this.box.left);
  }

  toY(y) {
    const [low, high] = this.range.y;
    return this.box.bottom - ((y - low) / (high - low)) * (this.box.bottom - this.box.top);
  }

  fromPixel(pixel) {
    if (!this.range) return null;
    const [low, high] = this.range.x;
    const share = (pixel - this.box.left) / (this.box.right - this.box.left);
    return low + Math.min(1, Math.max(0, share)) * (high - low);
  }

  drawAxes() {
    const { left, right, top, bottom } = this.box;
    for (const y of ticks(...this.range.y, 5)) {
      const at = this.toY(y);
      this.svg.append(draw("line", { class: "grid", x1: left, x2: right, y1: at, y2: at }),
        draw("text", { x: left - 6, y: at + 4, "text-anchor": "end" }, compact.format(y)));
    }
    const { scale, unit, format } = axisFormat(this.range.x[1]);
    const [low, high] = this.range.x;
    for (const x of ticks(low / scale, high / scale, Math.max(2, Math.floor((right - left) / 90)))) {
      const at = this.toX(x * scale);
      this.svg.append(draw("line", { class: "grid", x1: at, x2: at, y1: top, y2: bottom }),
        draw("text", { x: at, y: bottom + 15, "text-anchor": at > right - 24 ? "end" : "middle" }, `${format(x)}${unit}`));
    }
  }

  drawSeries({ run, x, y, raw, low, high }) {
    const group = draw("g", { class: `k${run.color % COLORS}` });
    const points = x.map((each, i) => `${this.toX(each).toFixed(1)},${this.toY(y[i]).toFixed(1)}`);
    const dashed = run.color >= COLORS ? " dashed" : "";
    if (this.spec.name === "core_metric") {
      x.forEach((each, i) => {
        if (low[i] === null) return;
        const at = this.toX(each);
        group.append(draw("line", { class: "whisker", x1: at, x2: at, y1: this.toY(low[i]), y2: this.toY(high[i]) }));
      });
    } else if (raw !== y) {
      const faint = x.map((each, i) => `${this.toX(each).toFixed(1)},${this.toY(raw[i]).toFixed(1)}`);
      group.append(draw("path", { class: "curve faint", d: `M${faint.join("L")}` }));
    } else if (low.some((value) => value !== null)) {
      const edge = (numbers) => x.map((each, i) => `${this.toX(each).toFixed(1)},${this.toY(numbers[i] ?? y[i]).toFixed(1)}`);
      group.append(draw("path", { class: "band", d: `M${edge(high).join("L")}L${edge(low).reverse().join("L")}Z` }));
    }
    group.append(draw("path", { class: `curve${dashed}`, d: `M${points.join("L")}` }));
    if (x.length <= 40) {
      x.forEach((each, i) => group.append(draw("circle", { class: "dot", cx: this.toX(each), cy: this.toY(y[i]), r: DOT_RADIUS })));
    }
    return group;
  }

  number(value) {
    return this.spec.digits ? value.toFixed(this.spec.digits) : whole.format(value);
  }

  // the values at the crosshair; without one, the newest
  showCross() {
    if (!this.range) return;
    this.cross.replaceChildren();
    const items = [];
    const values = [];
    for (const { run, x, y, low, high } of this.found) {
      const i = watching.at === null ? x.length - 1 : nearest(x, watching.at);
      values.push(y[i]);
      let text = this.number(y[i]);
      if (this.spec.name === "core_metric" && low[i] !== null) text += ` (${this.number(low[i])} to ${this.number(high[i])})`;
      items.push(make("span", { class: `k${run.color % COLORS}` }, swatch(run), make("span", {}, `${run.name} ${text}`)));
      if (watching.at === null) continue;
      this.cross.append(draw("circle", { class: `dot k${run.color % COLORS}`, cx: this.toX(x[i]), cy: this.toY(y[i]), r: 4 }));
    }
    if (watching.at !== null) {
      const at = this.toX(watching.at);
      this.cross.prepend(draw("line", { class: "cross", x1: at, x2: at, y1: this.box.top, y2: this.box.bottom }));
      const { scale, unit } = axisFormat(this.range.x[1]);
      const place = watching.at / scale;
      items.unshift(make("span", { class: "note" }, `at ${scale === 1 && $("axis").value !== "total_training_flops" ? whole.format(place) : compactOrPower(place)}${unit}`));
    }
    if (values.length === 2) {
      const difference = values[0] - values[1];
      items.push(make("span", { class: "note" }, `difference ${difference < 0 ? "−" : "+"}${this.number(Math.abs(difference))}`));
    }
    this.readout.replaceChildren(...items);
  }
}

// an exponential mean, without the bias of its start
function smoothed(values) {
  let sum = 0, weight = 0;
  return values.map((value) => {
    sum = SMOOTHING * sum + (1 - SMOOTHING) * value;
    weight = SMOOTHING * weight + (1 - SMOOTHING);
    return sum / weight;
  });
}

function swatch(run) {
  return make("i", { class: `swatch${run.color >= COLORS ? " dashed" : ""}` });
}

function nearest(sorted, wanted) {
  let low = 0, high = sorted.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < wanted) low = middle + 1; else high = middle;
  }
  return low > 0 && wanted - sorted[low - 1] < sorted[low] - wanted ? low - 1 : low;
}

function ticks(low, high, most) {
  const rough = (high - low) / most;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((each) => each * power >= rough);
  const found = [];
  if (!Number.isFinite(step) || step <= 0) return found;
  for (let i = Math.ceil(low / step); i * step <= high && found.length < 50; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}

function compactOrPower(value) {
  return Math.abs(value) < 1e13 ? compact.format(value) : value.toExponential(1).replace("e+", "e");
}

// how places on the x axis are written
function axisFormat(largest) {
  if ($("axis").value !== "total_training_time") return { scale: 1, unit: "", format: compactOrPower };
  const units = [[1, " s"], [60, " min"], [3600, " h"], [86400, " d"]];
  const [scale, unit] = units.findLast(([seconds]) => largest >= 2 * seconds) ?? units[0];
  return { scale, unit, format: compactOrPower };
}

const charts = CHARTS.map((spec) => new Chart(spec));

function choose(name, isChosen) {
  if (!isChosen) {
    watching.chosen.delete(name);
  } else if (watching.chosen.size < MOST_CHOSEN) {
    const taken = new Set([...watching.chosen.values()].map((run) => run.color));
    let color = 0;
    while (taken.has(color)) color += 1;
    watching.chosen.set(name, { name, color, stamp: null, data: null });
  }
  showRuns();
  poll();
}

function matches(run) {
  return run.name.toLowerCase().includes($("filter").value.trim().toLowerCase());
}

function showRuns() {
  const focused = document.activeElement?.dataset?.run;
  const rows = watching.runs.filter(matches).map(rowOf);
  $("runs").replaceChildren(...rows);
  if (focused !== undefined) [...$("runs").querySelectorAll("input")].find((box) => box.dataset.run === focused)?.focus();
  const n = watching.runs.length;
  $("count").textContent = n === rows.length ? `${n} run${n === 1 ? "" : "s"}` : `${rows.length} of ${n} runs`;
  if (!rows.length) $("runs").append(make("li", { class: "note" }, n ? "No run has such a name." : "No runs yet."));
}

function rowOf(run) {
  const chosen = watching.chosen.get(run.name);
  const box = make("input", { type: "checkbox" });
  box.dataset.run = run.name;
  box.checked = Boolean(chosen);
  box.disabled = !chosen && watching.chosen.size >= MOST_CHOSEN;
  box.addEventListener("change", () => choose(run.name, box.checked));
  const name = make("span", { class: "name" });
  if (chosen) name.append(make("span", { class: `k${chosen.color % COLORS}` }, swatch(chosen)));
  name.append(run.name);
  const state = make("span", { class: "state" }, run.status);
  if (["running", "failed", "died"].includes(run.status)) state.classList.add(run.status);
  if (run.reason) state.title = run.reason;
  const label = make("label", {}, box, name, state, make("span", { class: "facts" }, factsOf(run)));
  if (run.status === "running" && run.steps) {
    const progress = make("progress", { max: run.steps, value: run.step ?? 0, "aria-label": "Progress" });
    label.append(progress);
  }
  return make("li", {}, label);
}

function factsOf(run) {
  const facts = [];
  const isDone = run.step === run.steps || run.steps === null;
  if (run.step !== null) facts.push(`step ${whole.format(run.step)}${isDone ? "" : ` of ${whole.format(run.steps)}`}`);
  if (run.val_bpb !== null) facts.push(`${run.val_bpb.toFixed(4)} bpb`);
  if (run.core_metric !== null) facts.push(`CORE ${run.core_metric.toFixed(4)}`);
  if (run.tok_per_sec !== null) facts.push(`${compact.format(run.tok_per_sec)} tok/s`);
  if (run.seconds) facts.push(duration(run.seconds));
  return facts.map((fact) => fact.replaceAll(" ", "\u00a0")).join(" · ");
}

async function poll() {
  clearTimeout(watching.timer);
  if ($("watch").hidden || document.hidden) return;
  if (watching.busy) {
    watching.again = true;
    return;
  }
  watching.busy = true;
  watching.again = false;
  try {
    const background = watching.asked;
    watching.asked = true;
    const listing = await (await api("/watch/runs", { background })).json();
    watching.runs = listing.runs;
    const text = JSON.stringify([listing, [...watching.chosen.keys()]]);
    const isNew = text !== watching.listing;
    watching.listing = text;
    $("folder").textContent = listing.folder || "Runs";
    showProblems(listing.problems);
    if (!watching.began) chooseFirst();
    watching.began = true;
    for (const name of watching.chosen.keys()) if (!watching.runs.some((run) => run.name === name)) watching.chosen.delete(name);
    if (isNew) showRuns();
    await Promise.all([...watching.chosen.values()].map(refresh));
    $("connection").textContent = "";
  } catch (error) {
    $("connection").textContent = `Not up to date: ${error.message}`;
  }
  watching.busy = false;
  watching.timer = setTimeout(poll, watching.again ? 0 : POLL_MS);
}

// what runs now, or else what was written last
function chooseFirst() {
  const running = watching.runs.filter((run) => run.status === "running");
  for (const run of (running.length ? running : watching.runs).slice(0, 2)) {
    watching.chosen.set(run.name, { name: run.name, color: watching.chosen.size, stamp: null, data: null });
  }
}

async function refresh(run) {
  const listed = watching.runs.find((each) => each.name === run.name);
  if (listed.stamp === run.stamp) return;
  const path = run.name.split("/").map(encodeURIComponent).join("/");
  run.data = await (await api(`/watch/run/${path}`, { background: true })).json();
  run.stamp = listed.stamp;
  drawAll();
}

function drawAll() {
  charts.forEach((chart) => chart.draw());
  showSamples();
}

function showProblems(problems) {
  const node = $("problems");
  node.hidden = !problems.length;
  node.querySelector("summary").textContent = problems.length === 1 ? "1 folder cannot be read" : `${problems.length} folders cannot be read`;
  node.querySelector("ul").replaceChildren(...problems.map((problem) => make("li", {}, problem)));
}

function showSamples() {
  const chosen = [...watching.chosen.values()].filter((run) => run.data?.samples.length);
  $("samples").hidden = !chosen.length;
  if (!chosen.length) return;
  const prompts = [...new Set(chosen.flatMap((run) => run.data.samples.map((sample) => sample.prompt)))];
  const select = $("sample-prompt");
  const wanted = prompts[select.selectedIndex] !== undefined && prompts.includes(watching.prompt) ? watching.prompt : prompts[0];
  select.replaceChildren(...prompts.map((prompt, i) => make("option", { value: i }, prompt.slice(0, 80) || "(empty)")));
  select.selectedIndex = prompts.indexOf(wanted);
  watching.prompt = wanted;
  watching.prompts = prompts;
  const steps = [...new Set(chosen.flatMap((run) => run.data.samples.filter((sample) => sample.prompt === wanted).map((sample) => sample.step)))];
  steps.sort((one, other) => one - other);
  watching.steps = steps;
  const slider = $("sample-step");
  // a slider at its end stays there as samples come
  const follows = watching.step === undefined || watching.step === null;
  const at = follows ? steps.length - 1 : Math.max(0, steps.findLastIndex((step) => step <= watching.step));
  slider.max = steps.length - 1;
  slider.value = at;
  showTexts(chosen, wanted, steps[at]);
}

function showTexts(chosen, prompt, step) {
  $("sample-step-name").textContent = `Step ${whole.format(step)}`;
  $("sample-step").setAttribute("aria-valuetext", `step ${step}`);
  const cards = chosen.map((run) => {
    const sample = run.data.samples.findLast((each) => each.prompt === prompt && each.step <= step);
    const title = make("h3", { class: `k${run.color % COLORS}` }, swatch(run),
      `${run.name}${sample ? `, step ${whole.format(sample.step)}` : ""}`);
    const text = make("p", { class: "out" });
    if (!sample) text.append("No sample by this step.");
    // samples repeat their prompt
    else if (prompt && sample.text.startsWith(prompt)) text.append(make("span", { class: "given" }, prompt), sample.text.slice(prompt.length));
    else text.append(sample.text);
    return make("div", {}, title, text);
  });
  $("texts").replaceChildren(...cards);
}
