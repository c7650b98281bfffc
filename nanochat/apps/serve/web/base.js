"use strict";

// ----- small things

const $ = (id) => document.getElementById(id);

// Every text is set as text, never as markup: names, prompts and samples may come from anybody.
function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function draw(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });

function duration(seconds) {
  if (seconds < 60) return `${Math.round(seconds)} s`;
  if (seconds < 3600) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${(seconds / 3600).toFixed(1)} h`;
  return `${(seconds / 86400).toFixed(1)} days`;
}

function percent(share) {
  if (share >= 0.0995) return `${(share * 100).toFixed(0)}%`;
  return share >= 0.0005 ? `${(share * 100).toFixed(1)}%` : "<0.1%";
}

// ----- the server

let apiKey = "";
let declined = false;
let asking = null;

// options.background: a request that nobody is waiting for opens no dialog after a Cancel
async function api(path, options = {}) {
  for (;;) {
    const used = apiKey;
    const headers = { ...options.headers };
    if (used) headers.Authorization = `Bearer ${used}`;
    const response = await unlessLost(fetch(path, {
      method: options.method, body: options.body, signal: options.signal, headers,
      credentials: "omit", cache: "no-store",
    }), "The server does not answer. Is it still running?");
    if (response.status === 401) {
      if (used !== apiKey) continue;
      if (options.background && declined) throw new Error("The API key is missing.");
      await askForKey(used !== "");
      continue;
    }
    if (!response.ok) throw await refusalOf(response);
    return response;
  }
}

// a promise of the network, whose failures browsers word for programmers
async function unlessLost(promise, message) {
  try {
    return await promise;
  } catch (error) {
    throw error instanceof TypeError ? new Error(message) : error;
  }
}

// the Error to throw, with the API's code
async function refusalOf(response) {
  try {
    const { message, code } = (await response.json()).error;
    return Object.assign(new Error(message), { code });
  } catch {
    return new Error(`The server answered with status ${response.status}.`);
  }
}

// The key stays in this variable: a reload asks for it again.
function askForKey(wasWrong) {
  asking ??= new Promise((resolve, reject) => {
    const dialog = $("ask");
    const form = dialog.querySelector("form");
    $("ask-note").textContent = wasWrong
      ? "The server refused that key."
      : "It was set by --api-key. The page keeps it until it is reloaded.";
    $("key").value = "";
    let given = false;
    form.onsubmit = (event) => {
      event.preventDefault();
      // a header holds nothing else
      apiKey = $("key").value.replace(/[^\x20-\x7e]/g, "").trim();
      given = true;
      dialog.close();
    };
    $("ask-cancel").onclick = () => dialog.close();
    dialog.onclose = () => {
      asking = null;
      declined = !given;
      $("give-key").hidden = given;
      $("key").value = "";
      if (given) resolve(); else reject(new Error("The API key is missing."));
    };
    dialog.showModal();
  });
  return asking;
}

// the objects of a stream of server-sent events; an error in it is thrown
async function* eventsOf(response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let isWhole = false;
  const lost = "The connection was lost.";
  for (;;) {
    const { value, done } = await unlessLost(reader.read(), lost);
    if (done && isWhole) return;
    if (done) throw new Error(lost);
    const parts = (rest + decoder.decode(value, { stream: true })).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.slice("data: ".length);
      isWhole = data === "[DONE]";
      if (isWhole) continue;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

// ----- models

let models = [];

const modelOf = (id) => models.find((model) => model.id === id);

// the name of a checkpoint; step "": the one that is always in memory
const nameOf = (id, step) => (step === "" ? id : `${id}@${step}`);

// the choice of a select stays where it can
function offerModels(select, wanted) {
  select.replaceChildren(...models.map((model) => make("option", { value: model.id }, model.id)));
  if (modelOf(wanted)) select.value = wanted;
}

// the newest first; a select without a choice is of no use
function offerSteps(select, model, wanted) {
  const newest = Math.max(model.step, ...model.steps);
  const name = (step) =>
    `${whole.format(step)}${step === newest ? " newest" : ""}${step === model.best_step ? " ★" : ""}`;
  select.title = model.best_step === null ? "" : "★ the best by validation";
  const others = model.steps.filter((step) => step !== model.step).reverse();
  select.replaceChildren(make("option", { value: "" }, name(model.step)),
    ...others.map((step) => make("option", { value: step }, name(step))));
  select.value = others.includes(Number(wanted)) && wanted !== "" ? wanted : "";
  select.disabled = !others.length;
}

// ----- what is shown of a token beside it

// an alternative: its text, a bar, its share
function alternative(text, logprob) {
  const bar = make("i");
  bar.style.width = `${Math.exp(logprob) * 100}%`;
  return [make("b", {}, visible(text)), make("span", { class: "bar" }, bar),
    make("span", { class: "share" }, percent(Math.exp(logprob)))];
}

// owner: has `out`, the text with the token's span
const tip = {
  node: $("tip"), owner: null, span: null, pinned: false,

  show(owner, span, pinned, ...content) {
    this.span?.classList.remove("on");
    Object.assign(this, { owner, span, pinned });
    span.classList.add("on");
    this.node.replaceChildren(...content);
    this.node.classList.toggle("pinned", pinned);
    this.node.hidden = false;
    const box = span.getClientRects()[0] ?? span.getBoundingClientRect();
    const width = this.node.offsetWidth, height = this.node.offsetHeight;
    const below = box.bottom + 6 + height < innerHeight;
    this.node.style.left = `${Math.max(8, Math.min(box.left, innerWidth - width - 8))}px`;
    this.node.style.top = `${Math.max(8, below ? box.bottom + 6 : box.top - height - 6)}px`;
  },

  focus() {
    this.node.querySelector("button:not(:disabled)")?.focus();
  },

  hide() {
    this.span?.classList.remove("on");
    const hadFocus = this.node.contains(document.activeElement);
    const owner = this.owner;
    Object.assign(this, { owner: null, span: null, pinned: false });
    this.node.hidden = true;
    if (hadFocus) owner?.out.focus();
  },
};

function visible(text) {
  return text.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥");
}
