// ----- chat

// how an answer without a text ended. It is one: the next message stands behind it, as the model saw it.
const EMPTY = "the answer is empty";

// A conversation with a model that was trained on some. The settings are those of the first pane.
// turns: {role, content}, of the user and of the assistant in turn.
const chat = {
  turns: [], abort: null, bubble: null,
  // what the reader chose; null: a conversation where the model is made for it
  wanted: null,

  // whether the model that is chosen can hold one
  fits: () => Boolean(modelOf(panes[0].model.value)?.chat),

  get isOn() {
    return this.fits() && this.wanted !== false;
  },

  // what outlives a reload: not an answer of which nothing has come
  get kept() {
    return this.abort && !this.turns.at(-1)?.content ? this.turns.slice(0, -1) : this.turns;
  },

  show() {
    const changes = $("chat").hidden === this.isOn;
    $("mode").hidden = !this.fits();
    $("mode").querySelector(`[value=${this.isOn ? "chat" : "text"}]`).checked = true;
    $("play").classList.toggle("chatting", this.isOn);
    $("ask-prompt").hidden = this.isOn;
    $("chat").hidden = !this.isOn;
    if (!this.isOn) this.stop();
    if (changes) this.draw();
    showPanes();
  },

  draw() {
    this.bubble = null;
    $("turns").replaceChildren(...this.turns.map((turn, i) => this.node(turn, i)));
    $("chat-start").hidden = this.turns.length > 0;
    this.enable();
  },

  node(turn, index) {
    const text = make("div", { class: "bubble", dir: "auto" }, turn.content);
    const row = make("div", { class: "row" });
    const add = (name, action) => {
      const button = make("button", { type: "button", class: "quiet" }, name);
      button.addEventListener("click", () => action(button));
      row.append(button);
    };
    if (turn.role === "user") add("Edit", () => this.edit(index));
    else add("Copy", (button) => copyText(turn.content, button));
    if (index === this.turns.length - 1) {
      this.bubble = text;
      add(turn.role === "user" ? "Answer" : "Regenerate", () => this.answer());
    }
    const who = make("div", { class: "label" }, turn.role === "user" ? "You" : "Model");
    return make("li", { class: `turn ${turn.role}` }, who, text, row);
  },

  enable() {
    $("chat-stop").disabled = !this.abort;
    $("chat-new").disabled = !this.turns.length;
    $("turns").classList.toggle("writing", Boolean(this.abort));
  },

  // what follows a message that is edited is asked for anew
  edit(index) {
    this.giveUp();
    $("message").value = this.turns[index].content;
    this.turns.length = index;
    this.draw();
    this.say("");
    $("message").focus();
    keepSettings();
  },

  clear() {
    this.giveUp();
    this.turns = [];
    this.draw();
    this.say("");
    $("message").focus();
    keepSettings();
  },

  send() {
    const content = $("message").value.trim();
    if (!content) return;
    this.stop();
    // to a message without an answer more is added
    if (this.turns.at(-1)?.role === "user") this.turns.at(-1).content += `\n${content}`;
    else this.turns.push({ role: "user", content });
    $("message").value = "";
    this.answer();
  },

  stop() {
    if (!this.abort) return;
    this.abort.abort();
    // an answer of which nothing came is none
    if (!this.turns.at(-1)?.content) this.turns.pop();
  },

  // how an answer ends that nobody waits for any more is no news
  giveUp() {
    this.stop();
    this.abort = null;
  },

  // the answer to the last message of the user, instead of one that is there
  async answer() {
    this.stop();
    if (this.turns.at(-1)?.role === "assistant") this.turns.pop();
    const abort = this.abort = new AbortController();
    const system = $("system").value.trim();
    const messages = [...(system ? [{ role: "system", content: system }] : []), ...this.turns];
    const turn = { role: "assistant", content: "" };
    const turns = this.turns;
    turns.push(turn);
    this.draw();
    this.follow();
    this.say("Waiting…");
    keepSettings();
    let note = "";
    let isBad = false;
    try {
      const response = await api("/v1/chat/completions", {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({
          ...panes[0].settings(), messages, stream: true, stream_options: { include_usage: true },
        }),
        signal: abort.signal,
      });
      note = await this.read(response, turn, abort);
    } catch (error) {
      isBad = !abort.signal.aborted;
      note = isBad ? this.reasonOf(error) : "stopped";
    }
    // it failed before anything came
    if (!turn.content && turns.at(-1) === turn && note !== EMPTY) turns.pop();
    if (this.abort !== abort) return;
    this.abort = null;
    this.draw();
    this.say(note, isBad);
    keepSettings();
    loadModels(true);
  },

  // takes an answer as it comes; returns how it ended
  async read(response, turn, abort) {
    let reason = "";
    let tokens = 0;
    let firstAt = 0;
    for await (const event of eventsOf(response)) {
      if (abort.signal.aborted) throw new Error("stopped");
      const choice = event.choices[0];
      tokens = event.usage?.completion_tokens ?? tokens;
      reason = choice?.finish_reason ?? reason;
      if (!choice?.delta.content) continue;
      firstAt ||= performance.now();
      turn.content += choice.delta.content;
      this.grow(turn);
    }
    const seconds = (performance.now() - firstAt) / 1000;
    const parts = [`${whole.format(tokens)} tokens`];
    if (tokens > 1 && firstAt) parts.push(`${whole.format((tokens - 1) / Math.max(seconds, 1e-3))} tokens/s`);
    if (reason === "length") parts.push("reached max tokens");
    return turn.content ? parts.join(" · ") : EMPTY;
  },

  // a full context in words about the conversation
  reasonOf(error) {
    if (error.code !== "context_length_exceeded") return error.message;
    return "The conversation and its answer do not fit into the model's context. Edit a message, begin a new conversation, or lower Max tokens.";
  },

  grow(turn) {
    const atEnd = $("turns").scrollHeight - $("turns").scrollTop - $("turns").clientHeight < 40;
    this.say("Writing…");
    this.bubble.textContent = turn.content;
    if (atEnd) this.follow();
  },

  follow() {
    $("turns").scrollTop = $("turns").scrollHeight;
  },

  say(text, isBad = false) {
    if ($("chat-state").textContent !== text) $("chat-state").textContent = text;
    $("chat-state").classList.toggle("bad", isBad);
  },
};
