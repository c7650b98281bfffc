// ----- heat map

// bits of loss, and of a difference, that have the full shade; fixed, so that pictures compare
const MOST_LOSS = 10;
const MOST_CHANGE = 4;
// tokens whose loss changed most that are listed
const N_CHANGES = 8;
const VIEWS = [["difference", "Difference"], ["0", "First"], ["1", "Second"]];

// a loss, as the page shows it, in the unit that is chosen
function inUnit(nats, digits = 2) {
  if (nats === null) return "not a number";
  return (nats / ($("heat-unit").value === "bits" ? Math.LN2 : 1)).toFixed(digits);
}

function signed(text) {
  return text.startsWith("-") ? `−${text.slice(1)}` : `+${text}`;
}

// {text, parts: [tokens of the first, of the second]} for each stretch that begins and ends a token
// of both; models with another tokenizer cut a text elsewhere
function stretches(results) {
  const chars = Array.from(results[0].text);
  const starts = results.map((result) => new Set(result.offset));
  const common = [...starts[0]].filter((place) => starts.every((each) => each.has(place)));
  const found = common.map((place, i) => ({
    text: chars.slice(place, common[i + 1]).join(""), parts: results.map(() => []), cuts: false,
  }));
  results.forEach((result, side) => {
    const cuts = new Set(result.starts.slice(1));
    let i = 0;
    for (const [n, text] of result.tokens.entries()) {
      while (i + 1 < common.length && result.offset[n] >= common[i + 1]) i += 1;
      found[i].parts[side].push({ text, nats: result.nats[n], top: result.top[n] });
      if (side === 0 && cuts.has(n)) found[i].cuts = true;
    }
  });
  for (const stretch of found) {
    stretch.nats = stretch.parts.map((tokens) => sumOf(tokens.map((token) => token.nats)));
    const [first, second] = stretch.nats;
    stretch.change = second === undefined || first === null || second === null ? null : second - first;
  }
  return found;
}

function sumOf(numbers) {
  return numbers.includes(null) ? null : numbers.reduce((sum, each) => sum + each, 0);
}

const heat = {
  out: $("heat-out"), results: [], stretches: [], cursor: -1, view: "difference", abort: null, began: false,
  sides: [0, 1].map((i) => ({ model: $(`heat-model-${i}`), step: $(`heat-step-${i}`) })),
  // the held-out text that is offered, and whose it is
  passages: 0, of: "",

  // models came, or came anew
  offer() {
    for (const side of this.sides) {
      offerModels(side.model, side.model.value);
      if (modelOf(side.model.value)) offerSteps(side.step, modelOf(side.model.value), side.step.value);
    }
    this.begin();
  },

  // the first look: an early and the newest checkpoint, or two runs
  begin() {
    if (this.began || !models.length || $("heat").hidden) return;
    this.began = true;
    const [first, second] = this.sides;
    const model = modelOf(first.model.value);
    const early = model.steps.find((step) => step !== model.step);
    if (early !== undefined) first.step.value = early;
    else if (models.length > 1) this.choose(second, models[1].id);
    $("heat-compare").checked = early !== undefined || models.length > 1;
    this.showChoice();
    this.findText().then(() => { if (this.passages) this.run(); });
  },

  choose(side, id) {
    side.model.value = id;
    offerSteps(side.step, modelOf(id), "");
  },

  get ownText() {
    return document.querySelector("#heat-form [name=source]:checked").value === "text";
  },

  showChoice() {
    $("heat-text").hidden = !this.ownText;
    $("heat-passages").hidden = this.ownText;
    for (const select of $("heat-second").querySelectorAll("select")) {
      select.disabled = !$("heat-compare").checked || select.options.length < 2;
    }
  },

  // which held-out text the first run has
  async findText() {
    const of = this.sides[0].model.value;
    if (of === this.of) return;
    this.of = of;
    this.passages = 0;
    let note = "";
    try {
      const found = await (await api(`/heat/held-out/${of.split("/").map(encodeURIComponent).join("/")}`)).json();
      this.passages = found.passages;
      note = `of ${whole.format(found.passages)} of ${found.name.split("/").at(-1)}`;
    } catch (error) {
      note = error.message;
      document.querySelector("#heat-form [value=text]").checked = true;
    }
    if (this.of !== of) return;
    $("heat-source").textContent = note;
    $("heat-passage").max = this.passages;
    document.querySelector("#heat-form [value=passage]").disabled = !this.passages;
    if (!this.passages) this.say(note, true);
    this.showChoice();
  },

  turn(by) {
    if (this.ownText || !this.passages) return;
    $("heat-passage").value = this.passage + by;
    this.run();
  },

  // whatever was typed
  get passage() {
    const typed = Math.floor(Number($("heat-passage").value)) || 1;
    return Math.min(this.passages, Math.max(1, typed));
  },

  say(text, isBad = false) {
    $("heat-state").textContent = text;
    $("heat-state").classList.toggle("bad", isBad);
  },

  async ask(side, text, signal) {
    const question = { model: nameOf(side.model.value, side.step.value) };
    if (text !== null) question.text = text;
    else Object.assign(question, { passage: this.passage - 1, of: this.of });
    const response = await api("/heat/scores", {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(question), signal,
    });
    return response.json();
  },

  async run() {
    this.abort?.abort();
    const abort = this.abort = new AbortController();
    const sides = $("heat-compare").checked ? this.sides : this.sides.slice(0, 1);
    const text = this.ownText ? $("heat-text").value : null;
    if (text === "") {
      this.say("Paste a text first.", true);
      $("heat-text").focus();
      return;
    }
    if (text === null) $("heat-passage").value = this.passage;
    this.say("Reading…");
    try {
      const results = [];
      for (const side of sides) results.push(await this.ask(side, text, abort.signal));
      // a passage that begins within a character reads differently with another tokenizer
      if (results[1] && results[1].text !== results[0].text) results[1] = await this.ask(sides[1], results[0].text, abort.signal);
      this.results = results;
      this.stretches = stretches(results);
      this.cursor = -1;
      this.view = results[1] ? "difference" : "0";
      this.show();
      this.say("");
    } catch (error) {
      if (!abort.signal.aborted) this.say(error.message, true);
    }
  },

  show() {
    $("heat-result").hidden = !this.results.length;
    if (!this.results.length) return;
    tip.hide();
    this.showFigures();
    this.showViews();
    this.showKey();
    this.spans = this.stretches.map((stretch) => {
      const span = make("span", { class: stretch.cuts ? "t cut" : "t" }, stretch.text);
      if (stretch.text.startsWith("\n")) span.classList.add("line");
      this.shade(span, stretch);
      return span;
    });
    this.out.replaceChildren(...this.spans);
    this.showChanges();
  },

  shade(span, stretch) {
    const change = this.view === "difference";
    const nats = change ? stretch.change : stretch.nats[this.view];
    if (nats === null) {
      span.classList.add("unknown");
      return;
    }
    // of a token: a stretch of several is as bad as their mean
    const n = Math.max(1, ...stretch.parts.map((tokens) => tokens.length));
    const share = Math.min(1, Math.abs(nats) / n / Math.LN2 / (change ? MOST_CHANGE : MOST_LOSS));
    if (change) span.classList.add(nats > 0 ? "worse" : "better");
    span.style.setProperty("--shade", `${(share * 85).toFixed(1)}%`);
  },

  showFigures() {
    const figure = (title, big, ...notes) => make("div", { class: "figure" }, make("span", { class: "note" }, title),
      make("span", {}, make("b", {}, big), " bits per byte"), ...notes.map((note) => make("span", { class: "note" }, note)));
    const bpb = (result) => (result.bpb === null ? "no number of" : result.bpb.toFixed(3));
    const loss = (result) => `${inUnit(result.loss, 3)} ${$("heat-unit").value} a token`;
    const nodes = this.results.map((result, i) => figure(`${"AB"[i]} · ${this.titleOf(result)}`, bpb(result), loss(result),
      `${whole.format(result.tokens.length)} tokens, ${whole.format(result.bytes)} bytes`));
    const [first, second] = this.results;
    if (second && first.bpb !== null && second.bpb !== null) {
      const known = this.stretches.filter((stretch) => stretch.change !== null);
      const better = known.filter((stretch) => stretch.change < 0).length;
      const share = (second.bpb - first.bpb) / first.bpb;
      nodes.push(figure("From A to B", signed((second.bpb - first.bpb).toFixed(3)),
        `${signed((share * 100).toFixed(1))}%, ${share < 0 ? "better" : "worse"}`,
        `${percent(better / Math.max(1, known.length))} of the tokens are less surprising`));
      nodes.at(-1).classList.add(share < 0 ? "good" : "bad");
    }
    $("heat-figures").replaceChildren(...nodes);
  },

  titleOf(result) {
    return `${result.model.split("@")[0]}, step ${whole.format(result.step)}`;
  },

  showViews() {
    const offered = VIEWS.filter(([view]) => this.results.length > 1 || view === "0");
    const labels = { difference: "Difference", 0: this.results.length > 1 ? "Loss of A" : "Loss", 1: "Loss of B" };
    $("heat-view").hidden = offered.length < 2;
    $("heat-view").replaceChildren(...offered.map(([view]) => {
      const radio = make("input", { type: "radio", name: "view", value: view });
      radio.checked = view === this.view;
      radio.addEventListener("change", () => {
        this.view = view;
        const cursor = this.cursor;
        this.show();
        this.cursor = cursor;
        document.querySelector("#heat-view :checked").focus();
      });
      return make("label", {}, radio, labels[view]);
    }));
  },

  showKey() {
    const scale = $("heat-unit").value === "bits" ? 1 : Math.LN2;
    const number = (bits) => Number((bits * scale).toFixed(1));
    const change = this.view === "difference";
    $("heat-key").replaceChildren(...(change
      ? [`better −${number(MOST_CHANGE)}`, make("i", { class: "diverging" }), `+${number(MOST_CHANGE)} worse`]
      : ["0", make("i", { class: "loss" }), `${number(MOST_LOSS)} or more`]));
  },

  // where the two differ most
  showChanges() {
    const known = this.stretches.filter((stretch) => stretch.change !== null && stretch.change !== 0);
    const largest = known.sort((one, other) => Math.abs(other.change) - Math.abs(one.change)).slice(0, N_CHANGES);
    const node = $("heat-changes");
    node.hidden = !largest.length;
    node.querySelector("h2").textContent = "Largest changes";
    node.querySelector(".chips").replaceChildren(...largest.map((stretch) => {
      const chip = make("button", { type: "button", class: stretch.change > 0 ? "chip worse" : "chip better" },
        make("b", {}, visible(stretch.text)), signed(inUnit(stretch.change, 1)));
      chip.addEventListener("click", () => {
        const index = this.stretches.indexOf(stretch);
        this.spans[index].scrollIntoView({ block: "center" });
        this.out.focus();
        this.point(index, true);
      });
      return chip;
    }));
  },

  // what is known of a token
  point(index, pinned = false) {
    const stretch = this.stretches[index];
    if (!stretch) return tip.hide();
    this.cursor = index;
    const unit = $("heat-unit").value;
    const head = make("div", {}, make("b", {}, visible(stretch.text)));
    if (stretch.change !== null) {
      head.append(make("span", { class: stretch.change > 0 ? "worse-text" : "better-text" },
        ` ${signed(inUnit(stretch.change))} ${unit}`));
    }
    const columns = stretch.parts.map((tokens, side) => {
      const share = stretch.nats[side] === null ? "" : ` (${percent(Math.exp(-stretch.nats[side]))})`;
      const title = this.results.length > 1 ? `${"AB"[side]}, step ${whole.format(this.results[side].step)}: ` : "";
      const rows = (tokens[0]?.top ?? []).map(([text, logprob]) =>
        make("div", { class: text === tokens[0].text ? "each chosen" : "each" }, ...alternative(text, logprob ?? -Infinity)));
      return make("div", {}, make("div", { class: "note" }, `${title}${inUnit(stretch.nats[side])} ${unit}${share}`), ...rows);
    });
    tip.node.classList.toggle("wide", columns.length > 1);
    tip.show(this, this.spans[index], pinned, head, make("div", { class: "columns" }, ...columns));
  },

  listen() {
    const indexOf = (event) => this.spans?.indexOf(event.target) ?? -1;
    const hide = () => { if (!tip.pinned) tip.hide(); };
    this.out.addEventListener("pointerover", (event) => {
      if (event.pointerType === "mouse" && !tip.pinned) this.point(indexOf(event));
    });
    this.out.addEventListener("click", (event) => this.point(indexOf(event), true));
    for (const kind of ["pointerleave", "scroll", "blur"]) this.out.addEventListener(kind, hide);
    this.out.addEventListener("keydown", (event) => this.walk(event));
    $("heat-form").addEventListener("submit", (event) => { event.preventDefault(); this.run(); });
    $("heat-previous").addEventListener("click", () => this.turn(-1));
    $("heat-next").addEventListener("click", () => this.turn(1));
    $("heat-passage").addEventListener("change", () => this.turn(0));
    $("heat-unit").addEventListener("change", () => this.show());
    for (const node of [$("heat-compare"), ...document.querySelectorAll("#heat-form [name=source]")]) {
      node.addEventListener("change", () => { this.showChoice(); this.again(); });
    }
    this.sides.forEach((side, i) => {
      side.model.addEventListener("change", async () => {
        this.choose(side, side.model.value);
        this.showChoice();
        if (i === 0) await this.findText();
        this.again();
      });
      side.step.addEventListener("change", () => this.again());
    });
  },

  // a choice changed: the picture follows where nothing has to be pasted first
  again() {
    if (!this.ownText || $("heat-text").value) this.run();
    else $("heat-text").focus();
  },

  walk(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const last = this.stretches.length - 1;
    const places = {
      ArrowRight: this.cursor + 1, ArrowLeft: this.cursor - 1, Home: 0, End: last,
    };
    if (event.key === "n" || event.key === "p") this.turn(event.key === "n" ? 1 : -1);
    const place = places[event.key];
    if (place === undefined || last < 0) return;
    event.preventDefault();
    const index = Math.min(last, Math.max(0, place));
    this.spans[index].scrollIntoView({ block: "nearest" });
    this.point(index);
  },
};

heat.listen();
