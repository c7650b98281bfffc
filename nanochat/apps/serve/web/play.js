// ----- play

const FIELDS = [
  { name: "temperature", label: "Temperature", value: "0.8", min: 0, max: 100, step: "any" },
  { name: "max_tokens", label: "Max tokens", value: "200", min: 1, step: 1 },
  { name: "seed", label: "Seed", value: "", min: 0, step: 1, hint: "random" },
  // the first ones are always shown
  { name: "top_k", label: "Top-k", value: "", min: 0, step: 1, hint: "off" },
  { name: "top_p", label: "Top-p", value: "", min: 0, max: 1, step: "any", hint: "off" },
  { name: "min_p", label: "Min-p", value: "", min: 0, max: 1, step: "any", hint: "off" },
  { name: "repetition_penalty", label: "Repetition", value: "", min: 0.01, step: "any", hint: "off" },
];
const N_FIRST = 3;
// alternatives of each token, the most that the API gives
const ALTERNATIVES = 5;
const SEEDS = 2 ** 31;
// a token of this many bits or more has the full shade
const MOST_BITS = 10;

class Pane {
  constructor(letter) {
    const content = $("pane").content.cloneNode(true);
    this.node = content.querySelector(".pane");
    this.node.setAttribute("aria-label", `Text ${letter}`);
    for (const part of this.node.querySelectorAll("[data-name]")) this[part.dataset.name] = part;
    this.inputs = {};
    const further = this.more.querySelector(".fields");
    this.more.open = innerWidth > 760;
    for (const [i, field] of FIELDS.entries()) {
      const input = make("input", { type: "number", step: field.step, placeholder: field.hint ?? "" });
      for (const bound of ["min", "max"]) if (field[bound] !== undefined) input[bound] = field[bound];
      input.value = field.value;
      this.inputs[field.name] = input;
      (i < N_FIRST ? this.fields : further).append(make("label", {}, field.label, input));
    }
    this.inputs.stop = make("textarea", {
      rows: 1, placeholder: "off", title: "Texts that end the answer, one a line; \\n stands for a line end",
    });
    further.append(make("label", {}, "Stop texts", this.inputs.stop));
    this.again.addEventListener("click", () => this.run(this.forced));
    this.edit.addEventListener("click", () => editAsPrompt(this.whole()));
    this.copy.addEventListener("click", () => copyText(this.whole(), this.copy));
    for (const part of [this.fields, this.more]) part.addEventListener("change", keepSettings);
    this.model.addEventListener("change", () => this.fit());
    this.listenToTokens();
    this.clear("", "");
    $("panes").append(content);
  }

  listenToTokens() {
    const indexOf = (event) => this.groups.findIndex((group) => group.span === event.target);
    this.out.addEventListener("pointerover", (event) => {
      if (event.pointerType === "mouse" && !tip.pinned) this.showTip(indexOf(event));
    });
    this.out.addEventListener("pointerleave", () => { if (!tip.pinned) tip.hide(); });
    this.out.addEventListener("scroll", () => { if (!tip.pinned) tip.hide(); });
    this.out.addEventListener("click", (event) => this.showTip(indexOf(event), true));
    this.out.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      const last = this.groups.length - 1;
      if (step && last >= 0) {
        event.preventDefault();
        this.showTip(Math.min(last, Math.max(0, this.cursor + step)));
      } else if (event.key === "Enter" && this.groups[this.cursor]) {
        event.preventDefault();
        this.showTip(this.cursor, true);
        tip.focus();
      }
    });
    this.out.addEventListener("blur", () => { if (!tip.pinned) tip.hide(); });
  }

  showTip(index, pinned = false) {
    const group = this.groups[index];
    if (!group) return tip.hide();
    this.cursor = index;
    const token = group.tokens[0];
    const rows = Object.entries(token.top).sort((one, other) => other[1] - one[1])
      .map(([text, logprob]) => this.row(group, text, logprob));
    const seen = group.tokens.map((each) => visible(each.text)).join(" + ");
    const head = make("div", {}, make("b", {}, seen), ` ${percent(Math.exp(token.logprob ?? 0))}`);
    const note = make("div", { class: "note" }, pinned ? "Choose one to continue from it." : "Click to choose another.");
    tip.show(this, group.span, pinned, head, ...rows, note);
  }

  row(group, text, logprob) {
    const row = make("button", { type: "button", class: text === group.tokens[0].text ? "each chosen" : "each" },
      ...alternative(text, logprob));
    // part of a character cannot be sent as text
    row.disabled = text.startsWith("bytes:") || text === "";
    row.addEventListener("click", () => this.branch(group, text));
    return row;
  }

  // models that the server has; the choice stays where it can
  offer(chosen, step) {
    offerModels(this.model, chosen ?? this.model.value);
    this.fit(step);
  }

  // a short context has no room for the usual number of tokens
  fit(step = this.step.value) {
    const model = modelOf(this.model.value);
    if (!model) return;
    if (this === panes[0]) chat.show();
    offerSteps(this.step, model, step);
    const most = Math.max(1, Math.min(model.max_tokens, Math.floor(model.positions / 2)));
    const input = this.inputs.max_tokens;
    if (Number(input.value) > most) input.value = most;
  }

  settings() {
    const values = { model: nameOf(this.model.value, this.step.value) };
    for (const field of FIELDS) {
      const value = this.inputs[field.name].value.trim();
      if (value !== "") values[field.name] = Number(value);
    }
    const stops = this.inputs.stop.value.split("\n").filter((line) => line !== "");
    const escapes = { n: "\n", t: "\t", "\\": "\\" };
    const texts = stops.map((line) => line.replace(/\\([nt\\])/g, (_, letter) => escapes[letter]));
    if (texts.length) values.stop = texts;
    return values;
  }

  // prompt: what was asked; forced: what was chosen to follow it, before the model goes on
  clear(prompt, forced) {
    this.prompt = prompt;
    this.forced = forced;
    this.chars = [];
    this.groups = [];
    this.cursor = -1;
    this.nTokens = 0;
    this.bits = 0;
    if (tip.owner === this) tip.hide();
    const given = [];
    if (prompt) given.push(make("span", { class: "given" }, prompt));
    if (forced) given.push(make("span", {}, forced));
    this.out.replaceChildren(...given);
    this.enable();
  }

  enable() {
    const text = this.forced || this.chars.length;
    this.edit.disabled = this.copy.disabled = !text;
    this.again.disabled = !text && !this.abort;
  }

  whole() {
    return this.prompt + this.forced + this.chars.join("");
  }

  async run(forced = "", seed = null, prompt = forced ? this.prompt : $("prompt").value) {
    this.abort?.abort();
    const abort = this.abort = new AbortController();
    this.clear(prompt, forced);
    showRunning();
    const settings = this.settings();
    settings.seed ??= seed ?? Math.floor(Math.random() * SEEDS);
    const model = modelOf(this.model.value);
    const text = prompt + forced;
    const began = performance.now();
    let firstAt = 0;
    let reason = "";
    this.say("", "Waiting…");
    try {
      const response = await api("/v1/completions", {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        // without a text a document begins, which the API asks for by the id of BOS
        body: JSON.stringify({
          ...settings, prompt: text || [model?.bos ?? 0], stream: true, logprobs: ALTERNATIVES,
        }),
        signal: abort.signal,
      });
      for await (const event of eventsOf(response)) {
        if (this.abort !== abort) return;
        const choice = event.choices[0];
        firstAt ||= performance.now();
        this.fingerprint = event.system_fingerprint;
        this.add(choice);
        reason = choice.finish_reason ?? reason;
        this.say(this.factsOf(began, firstAt, settings.seed));
      }
      const ends = { length: "reached max tokens", stop: "ended" };
      this.say(this.factsOf(began, firstAt, settings.seed), `· ${ends[reason] ?? reason}`);
    } catch (error) {
      if (this.abort !== abort) return;
      if (abort.signal.aborted) this.say(this.factsOf(began, firstAt, settings.seed), "· stopped");
      else this.say("", error.message, true);
    }
    this.abort = null;
    this.enable();
    showRunning();
    loadModels(true);
  }

  stop() {
    this.abort?.abort();
  }

  // the facts change with every token; only the ending is read out
  say(facts, ending = "", isBad = false) {
    this.facts.textContent = facts;
    this.ending.textContent = ending;
    this.ending.classList.toggle("bad", isBad);
  }

  factsOf(began, firstAt, seed) {
    if (!this.nTokens) return `seed ${seed}`;
    const seconds = (performance.now() - firstAt) / 1000;
    const parts = [`${whole.format(this.nTokens)} tokens`];
    if (this.nTokens > 1) parts.push(`${whole.format((this.nTokens - 1) / Math.max(seconds, 1e-3))} tokens/s`);
    parts.push(`first after ${whole.format(firstAt - began)} ms`);
    parts.push(`${(this.bits / this.nTokens).toFixed(2)} bits a token`);
    parts.push(`seed ${seed}`, (this.fingerprint ?? "").replace("_", " "));
    return parts.join(" · ");
  }

  // what a chunk adds. Tokens that share a character share a span.
  add(choice) {
    const atEnd = this.out.scrollHeight - this.out.scrollTop - this.out.clientHeight < 40;
    // places are counted in characters, of which some are two units of a JavaScript text
    this.chars.push(...Array.from(choice.text));
    let changed = Math.max(0, this.groups.length - 1);
    const { tokens = [], token_logprobs: logprobs = [], top_logprobs: tops = [], text_offset: places = [] } = choice.logprobs ?? {};
    for (const [i, text] of tokens.entries()) {
      const token = { text, logprob: logprobs[i], top: tops[i] ?? {} };
      this.nTokens += 1;
      this.bits -= (token.logprob ?? 0) / Math.LN2;
      const last = this.groups.at(-1);
      if (last && last.place === places[i]) {
        last.tokens.push(token);
      } else {
        const span = make("span", { class: "t" });
        this.groups.push({ place: places[i], tokens: [token], span });
        this.out.append(span);
      }
    }
    for (; changed < this.groups.length; changed++) {
      const group = this.groups[changed];
      const end = this.groups[changed + 1]?.place ?? this.chars.length;
      group.span.textContent = this.chars.slice(group.place, end).join("");
      const logprob = group.tokens.reduce((sum, token) => sum + (token.logprob ?? 0), 0);
      const surprise = Math.min(1, -logprob / Math.LN2 / MOST_BITS);
      group.span.style.setProperty("--surprise", `${(surprise * 70).toFixed(1)}%`);
    }
    if (atEnd) this.out.scrollTop = this.out.scrollHeight;
  }

  // go on from a token that was not chosen
  branch(group, text) {
    const before = this.chars.slice(0, group.place).join("");
    this.run(this.forced + before + text, null, this.prompt);
    this.out.focus();
  }
}

const panes = [new Pane("A"), new Pane("B")];

// whether the second column has settings of its own by now
const comparing = { started: false };

const shown = () => ($("compare").checked ? panes : panes.slice(0, 1));

async function runAll() {
  // whoever is quick, or was offline at first
  if (!models.length) await loadModels();
  // Both columns get one seed, so that only their settings differ; if those are the same, two.
  const seed = Math.floor(Math.random() * SEEDS);
  const [one, other] = panes.map((pane) => JSON.stringify(pane.settings()));
  shown().forEach((pane, i) => pane.run("", seed + (one === other ? i : 0)));
}

function stopAll() {
  panes.forEach((pane) => pane.stop());
  chat.stop();
}

function showRunning() {
  $("stop").disabled = !panes.some((pane) => pane.abort);
}

function showPanes() {
  const two = $("compare").checked && !chat.isOn;
  $("panes").classList.toggle("two", two);
  panes[1].node.hidden = !two;
  if (!two) panes[1].stop();
}

// the second column begins with what makes it worth a look
function startComparing() {
  const [one, other] = panes;
  if (comparing.started) return;
  comparing.started = true;
  for (const [name, input] of Object.entries(one.inputs)) other.inputs[name].value = input.value;
  const model = modelOf(one.model.value);
  const another = models.find((each) => each !== model);
  const earlier = model?.steps.find((step) => step !== model.step);
  if (another) other.offer(another.id, "");
  else if (earlier !== undefined) other.offer(model.id, earlier);
  else other.inputs.temperature.value = "1.2";
}

function editAsPrompt(text) {
  const prompt = $("prompt");
  prompt.value = text;
  prompt.focus();
  prompt.setSelectionRange(text.length, text.length);
  prompt.scrollTop = prompt.scrollHeight;
  keepSettings();
}

async function copyText(text, button) {
  let done = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // browsers offer the clipboard to pages of this machine and of https only
    const area = make("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    done = document.execCommand("copy");
    area.remove();
    button.focus();
  }
  button.textContent = done ? "Copied" : "Not copied";
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}

async function loadModels(background = false) {
  try {
    const response = await api("/v1/models", { background });
    models = (await response.json()).data;
  } catch (error) {
    if (!background) panes[0].say("", error.message, true);
    return;
  }
  for (const pane of panes) {
    pane.offer(...(pane.wanted ?? []));
    pane.wanted = undefined;
  }
  heat.offer();
}

// settings survive a reload of this tab, the key does not
function keepSettings() {
  const state = {
    chat: { wanted: chat.wanted, turns: chat.kept, system: $("system").value },
    prompt: $("prompt").value, compare: $("compare").checked, shade: $("shade").checked, started: comparing.started,
    panes: panes.map((pane) => ({
      model: pane.model.value, step: pane.step.value,
      values: Object.fromEntries(Object.entries(pane.inputs).map(([name, input]) => [name, input.value])),
    })),
  };
  try {
    sessionStorage.setItem("nanochat", JSON.stringify(state));
  } catch {
    // storage is switched off: nothing is kept
  }
}

function recallSettings() {
  try {
    const state = JSON.parse(sessionStorage.getItem("nanochat"));
    if (!state) return;
    $("prompt").value = state.prompt;
    $("compare").checked = state.compare;
    $("shade").checked = state.shade;
    comparing.started = state.started;
    Object.assign(chat, { wanted: state.chat.wanted, turns: state.chat.turns });
    $("system").value = state.chat.system;
    state.panes.forEach(({ model, step, values }, i) => {
      panes[i].wanted = [model, step];
      for (const [name, input] of Object.entries(panes[i].inputs)) input.value = values[name] ?? "";
    });
  } catch {
    // none, or of another version
  }
}

function showShade() {
  document.body.classList.toggle("shade", $("shade").checked);
  $("shade-key").hidden = !$("shade").checked;
}
