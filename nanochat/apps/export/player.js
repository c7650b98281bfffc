"use strict";
// What the worker of the page runs: tokenizer, model and choice of tokens. Shapes: C width, H query
// heads, K key/value heads, D head dim, V vocabulary.

// ----- weights

function bytesOf(base64) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

// the bytes of all parts in a row; the parts are dropped as they are read
function joined(parts, total) {
  const all = new Uint8Array(total);
  let end = 0;
  for (let i = 0; i < parts.length; i++) {
    const bytes = bytesOf(parts[i]);
    parts[i] = "";
    all.set(bytes, end);
    end += bytes.length;
  }
  if (end !== total) throw new Error(`The file is damaged: it holds ${end} of ${total} bytes of weights.`);
  return all;
}

// A tensor as packed_weights.py stores it, decoded from a range of numbers on demand.
class Packed {
  constructor(buffer, { offset, shape, bits }, group) {
    this.columns = shape.at(-1);
    this.size = shape.reduce((product, n) => product * n, 1);
    this.group = group;
    this.bits = bits;
    if (bits === 32) {
      this.plain = new Float32Array(buffer, offset, this.size);
      return;
    }
    const groups = Math.ceil(this.size / group);
    const filled = groups * group;
    this.scales = new Float32Array(buffer, offset, groups);
    this.high = new Int8Array(buffer, offset + 4 * groups, filled);
    this.low = new Uint8Array(buffer, offset + 4 * groups + filled, (filled * (bits - 8)) / 8);
  }

  // fills out with the numbers from `first` on
  read(first, out) {
    const { group, scales, high, low, plain } = this;
    if (plain) {
      out.set(plain.subarray(first, first + out.length));
      return out;
    }
    for (let i = 0; i < out.length; i++) {
      const at = first + i;
      let integer = high[at];
      if (this.bits === 12) integer = integer * 16 + ((low[at >> 1] >> ((at & 1) * 4)) & 15);
      else if (this.bits === 16) integer = integer * 256 + low[at];
      out[i] = integer * scales[(at / group) | 0];
    }
    return out;
  }

  all(arena) {
    return this.read(0, arena.numbers(this.size));
  }

  // tables are read row by row: most of their rows are never needed
  row(index, out) {
    return this.read(index * this.columns, out);
  }
}

// ----- arithmetic

// The one loop in which a token's time is spent, as a WebAssembly module: dot4(rows, stride, x, end,
// out) stores the products of four rows of a matrix with x, four columns at a time. All are addresses
// in bytes; stride is that of a row, end that of the end of x.
function kernelBytes() {
  const section = (id, content) => [id, content.length, ...content];
  const text = (letter) => [1, letter.charCodeAt(0)];
  const get = (local) => [0x20, local];
  const set = (local) => [0x21, local];
  const load = [0xfd, 0x00, 2, 0], mul = [0xfd, 0xe6, 1], add4 = [0xfd, 0xe4, 1];
  const i32Add = 0x6a, f32Add = 0x92, end = 0x0b;
  const [stride, x, xEnd, out, value] = [1, 2, 3, 4, 12];
  const rows = [0, 5, 6, 7], sums = [8, 9, 10, 11];
  const lane = (sum, i) => [...get(sum), 0xfd, 0x1f, i];
  const code = [
    // three more addresses, and five vectors, which begin as zeros
    2, 3, 0x7f, 5, 0x7b,
    ...[1, 2, 3].flatMap((i) => [...get(rows[i - 1]), ...get(stride), i32Add, ...set(rows[i])]),
    0x03, 0x40,
    ...get(x), ...load, ...set(value),
    ...sums.flatMap((sum, i) => [...get(sum), ...get(rows[i]), ...load, ...get(value), ...mul, ...add4, ...set(sum)]),
    ...[...rows, x].flatMap((address) => [...get(address), 0x41, 16, i32Add, ...set(address)]),
    // again while x < xEnd
    ...get(x), ...get(xEnd), 0x49, 0x0d, 0, end,
    ...sums.flatMap((sum, i) => [
      ...get(out), ...lane(sum, 0), ...lane(sum, 1), f32Add, ...lane(sum, 2), ...lane(sum, 3), f32Add, f32Add, 0x38, 2, 4 * i,
    ]),
    end,
  ];
  const length = (n) => [(n & 127) | 128, n >> 7];
  const body = [1, ...length(code.length), ...code];
  return new Uint8Array([
    0, 0x61, 0x73, 0x6d, 1, 0, 0, 0,
    ...section(1, [1, 0x60, 5, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0]),
    ...section(2, [1, ...text("m"), ...text("m"), 2, 0, 1]),
    ...section(3, [1, 0]),
    ...section(7, [1, ...text("f"), 0, 0]),
    10, ...length(body.length), ...body,
  ]);
}

// The memory of matrices and activations. dot4: see kernelBytes(); null where a browser has none.
class Arena {
  constructor(bytes) {
    this.used = 0;
    try {
      const memory = new WebAssembly.Memory({ initial: Math.ceil(bytes / 65536) });
      const { exports } = new WebAssembly.Instance(new WebAssembly.Module(kernelBytes()), { m: { m: memory } });
      this.buffer = memory.buffer;
      this.dot4 = exports.f;
    } catch {
      this.buffer = new ArrayBuffer(bytes);
      this.dot4 = null;
    }
  }

  // a new array of zeros
  numbers(n) {
    const first = this.used;
    this.used += Arena.bytes(n);
    return new Float32Array(this.buffer, first, n);
  }

  static bytes(n) {
    return Math.ceil(n / 4) * 16;
  }

  // out = matrix x, for a matrix of out.length rows. All three come from numbers().
  multiply(out, matrix, x) {
    const columns = x.length;
    const rows = out.length;
    const whole = this.dot4 && columns % 4 === 0 ? rows - (rows % 4) : 0;
    const stride = 4 * columns;
    const end = x.byteOffset + stride;
    for (let row = 0; row < whole; row += 4) {
      this.dot4(matrix.byteOffset + row * stride, stride, x.byteOffset, end, out.byteOffset + 4 * row);
    }
    for (let row = whole, at = whole * columns; row < rows; row++, at += columns) {
      let sum = 0;
      for (let i = 0; i < columns; i++) sum += matrix[at + i] * x[i];
      out[row] = sum;
    }
    return out;
  }
}

// RMSNorm of n numbers from `first` on, with a weight per channel or none; out may be x
function normalise(out, x, eps, weight = null, first = 0, n = x.length) {
  let squares = 0;
  for (let i = first; i < first + n; i++) squares += x[i] * x[i];
  const scale = 1 / Math.sqrt(squares / n + eps);
  for (let i = 0; i < n; i++) out[first + i] = x[first + i] * scale * (weight ? weight[i] : 1);
  return out;
}

function add(x, more) {
  for (let i = 0; i < x.length; i++) x[i] += more[i];
}

const sigmoid = (z) => 1 / (1 + Math.exp(-z));

// ----- the model

// What one layer has read: keys and values of each position, and keys before they are shifted.
class LayerCache {
  constructor(width, keepsRaw) {
    this.width = width;
    this.capacity = 0;
    this.names = keepsRaw ? ["keys", "values", "raw"] : ["keys", "values"];
    for (const name of this.names) this[name] = new Float32Array(0);
  }

  // room for one more position
  reach(position) {
    if (position < this.capacity) return;
    this.capacity = Math.max(256, 2 * this.capacity);
    for (const name of this.names) {
      const larger = new Float32Array(this.capacity * this.width);
      larger.set(this[name]);
      this[name] = larger;
    }
  }
}

class Model {
  constructor(about, buffer) {
    const shape = (this.shape = about.shape);
    const packed = {};
    for (const tensor of about.tensors) packed[tensor.name] = new Packed(buffer, tensor, about.group);
    // Tables are unpacked row by row, unless one is the head.
    const isTable = (name) => name.includes("embedding") && (name !== "embedding.weight" || packed["head.weight"]);
    const unpacked = about.tensors.filter(({ name }) => !isTable(name)).map(({ name }) => packed[name]);
    // counted first: the memory cannot grow under arrays that lie in it
    const counter = { bytes: 0, numbers(n) { this.bytes += Arena.bytes(n); } };
    this.makeRoom(counter);
    for (const { size } of unpacked) counter.numbers(size);
    const arena = (this.arena = new Arena(counter.bytes));
    const matrix = (name) => packed[`${name}.weight`]?.all(arena);
    this.isLlama = shape.arch === "llama";
    this.embedding = packed["embedding.weight"];
    this.head = matrix(packed["head.weight"] ? "head" : "embedding");
    this.layers = Array.from({ length: shape.depth }, (_, i) => {
      const layer = {
        window: shape.windows[i],
        valueEmbedding: packed[`value_embeddings.${i}.weight`],
        cache: new LayerCache(shape.n_kv_head * shape.head_dim, shape.key_shift),
      };
      for (const name of ["attention_norm", "mlp_norm"]) layer[name] = matrix(`blocks.${i}.${name}`);
      for (const name of ["query", "key", "value", "out", "value_gate"]) layer[name] = matrix(`blocks.${i}.attention.${name}`);
      for (const name of ["gate", "up", "down"]) layer[name] = matrix(`blocks.${i}.mlp.${name}`);
      return layer;
    });
    this.finalNorm = matrix("final_norm");
    if (!this.isLlama) {
      for (const name of ["residual_lambdas", "x0_lambdas", "smear_lambda", "backout_lambda"]) this[name] = packed[name].all(arena);
      this.smearGate = matrix("smear_gate");
    }
    this.makeRoom(arena);
    // ids that the caches hold
    this.read = [];
  }

  // arrays that every token uses again
  makeRoom(arena) {
    const { width, n_head, n_kv_head, head_dim, mlp_width, vocab_size } = this.shape;
    const numbers = (n) => arena.numbers(n);
    this.x = numbers(width);
    this.x0 = numbers(width);
    this.before = numbers(width);
    this.middle = numbers(width);
    this.normed = numbers(width);
    this.added = numbers(width);
    this.q = numbers(n_head * head_dim);
    this.k = numbers(n_kv_head * head_dim);
    this.v = numbers(n_kv_head * head_dim);
    this.valueRow = numbers(n_kv_head * head_dim);
    this.kvGates = numbers(n_kv_head);
    this.attended = numbers(n_head * head_dim);
    this.inner = numbers(mlp_width);
    this.innerGate = numbers(mlp_width);
    this.logits = numbers(vocab_size);
    this.cos = new Float32Array(head_dim / 2);
    this.sin = new Float32Array(head_dim / 2);
    this.scores = new Float64Array(256);
  }

  // forget all but the first n tokens
  cut(n) {
    this.read.length = Math.min(this.read.length, n);
  }

  // Reads one more token. Returns the logits of the one after it if they are wanted.
  step(id, wantsLogits) {
    const position = this.read.length;
    this.turn(position);
    for (const { cache } of this.layers) cache.reach(position);
    if (this.isLlama) this.runLlama(id, position);
    else this.runSpeedrun(id, position);
    this.read.push(id);
    if (!wantsLogits) return null;
    const logits = this.arena.multiply(this.logits, this.head, this.normed);
    const { softcap } = this.shape;
    if (softcap) for (let i = 0; i < logits.length; i++) logits[i] = softcap * Math.tanh(logits[i] / softcap);
    return logits;
  }

  // cos and sin of a position's rotary angles
  turn(position) {
    const { frequencies, rounds_angles } = this.shape;
    for (let i = 0; i < frequencies.length; i++) {
      const angle = position * frequencies[i];
      const used = rounds_angles ? Math.fround(angle) : angle;
      this.cos[i] = Math.cos(used);
      this.sin[i] = Math.sin(used);
    }
  }

  runLlama(id, position) {
    const { x, normed, added, inner, innerGate } = this;
    const eps = this.shape.norm_eps;
    this.embedding.row(id, x);
    for (const layer of this.layers) {
      this.attend(layer, normalise(normed, x, eps, layer.attention_norm), id, position);
      add(x, added);
      normalise(normed, x, eps, layer.mlp_norm);
      this.arena.multiply(inner, layer.up, normed);
      this.arena.multiply(innerGate, layer.gate, normed);
      for (let i = 0; i < inner.length; i++) inner[i] *= innerGate[i] * sigmoid(innerGate[i]);
      add(x, this.arena.multiply(added, layer.down, inner));
    }
    normalise(normed, x, eps, this.finalNorm);
  }

  runSpeedrun(id, position) {
    const { x, x0, normed, added, middle, inner } = this;
    const eps = this.shape.norm_eps;
    this.smear(id, position);
    x.set(x0);
    this.layers.forEach((layer, i) => {
      const own = this.residual_lambdas[i], first = this.x0_lambdas[i];
      for (let c = 0; c < x.length; c++) x[c] = own * x[c] + first * x0[c];
      this.attend(layer, normalise(normed, x, eps), id, position);
      add(x, added);
      this.arena.multiply(inner, layer.up, normalise(normed, x, eps));
      for (let c = 0; c < inner.length; c++) inner[c] = inner[c] > 0 ? inner[c] * inner[c] : 0;
      add(x, this.arena.multiply(added, layer.down, inner));
      if (i === this.shape.backout_layer) middle.set(x);
    });
    const backout = this.backout_lambda[0];
    for (let c = 0; c < x.length; c++) x[c] -= backout * middle[c];
    normalise(normed, x, eps);
  }

  // x0: the normalised embedding, and some of the one before
  smear(id, position) {
    const { x0, before } = this;
    const eps = this.shape.norm_eps;
    normalise(x0, this.embedding.row(id, x0), eps);
    if (position === 0) return;
    normalise(before, this.embedding.row(this.read[position - 1], before), eps);
    let gate = 0;
    for (let i = 0; i < this.smearGate.length; i++) gate += this.smearGate[i] * x0[i];
    const share = this.smear_lambda[0] * sigmoid(gate);
    for (let c = 0; c < x0.length; c++) x0[c] += share * before[c];
  }

  // this.added: what attention adds to the residual stream. h: the stream, normalised
  attend(layer, h, id, position) {
    const { head_dim, n_head, n_kv_head, key_shift } = this.shape;
    const { cache } = layer;
    const { q, k, v } = this;
    const at = position * cache.width;
    this.arena.multiply(q, layer.query, h);
    this.arena.multiply(k, layer.key, h);
    this.arena.multiply(v, layer.value, h);
    if (layer.value_gate) this.addValueEmbedding(layer, h, id);
    if (key_shift) {
      cache.raw.set(k, at);
      this.shiftKeys(cache.raw, position);
    }
    this.place(q, n_head);
    this.place(k, n_kv_head);
    cache.keys.set(k, at);
    cache.values.set(v, at);
    const first = Math.max(0, position - layer.window + 1);
    const group = n_head / n_kv_head;
    this.attended.fill(0);
    for (let head = 0; head < n_head; head++) this.attendHead(cache, head * head_dim, Math.floor(head / group) * head_dim, first, position);
    this.arena.multiply(this.added, layer.out, this.attended);
  }

  // One head; only the positions from `first` on are read. queryAt, keyAt: where its channels begin
  attendHead(cache, queryAt, keyAt, first, position) {
    const { q, attended } = this;
    const { keys, values, width } = cache;
    const D = this.shape.head_dim;
    const scale = 1 / Math.sqrt(D);
    const n = position - first + 1;
    if (this.scores.length < n) this.scores = new Float64Array(2 * n);
    const scores = this.scores;
    let largest = -Infinity;
    for (let i = 0; i < n; i++) {
      const at = (first + i) * width + keyAt;
      let sum = 0;
      for (let c = 0; c < D; c++) sum += q[queryAt + c] * keys[at + c];
      scores[i] = sum * scale;
      if (scores[i] > largest) largest = scores[i];
    }
    let total = 0;
    for (let i = 0; i < n; i++) total += scores[i] = Math.exp(scores[i] - largest);
    for (let i = 0; i < n; i++) {
      const weight = scores[i] / total;
      const at = (first + i) * width + keyAt;
      for (let c = 0; c < D; c++) attended[queryAt + c] += weight * values[at + c];
    }
  }

  addValueEmbedding(layer, h, id) {
    const { n_kv_head, head_dim } = this.shape;
    const row = layer.valueEmbedding.row(id, this.valueRow);
    const channels = layer.value_gate.length / n_kv_head;
    this.arena.multiply(this.kvGates, layer.value_gate, h.subarray(0, channels));
    for (let i = 0; i < row.length; i++) this.v[i] += 2 * sigmoid(this.kvGates[Math.floor(i / head_dim)]) * row[i];
  }

  // the slowly turning half of each key comes from the position before
  shiftKeys(raw, position) {
    const { head_dim } = this.shape;
    const { k } = this;
    const half = head_dim / 2;
    const fast = Math.floor((half + 1) / 2);
    const before = (position - 1) * k.length;
    for (let i = 0; i < k.length; i++) if (i % half >= fast) k[i] = position ? raw[before + i] : 0;
  }

  // rotary positions and, in a speedrun model, QK-norm, of all heads in x
  place(x, heads) {
    const D = this.shape.head_dim;
    const { cos, sin } = this;
    const half = D / 2;
    for (let head = 0; head < heads; head++) {
      const at = head * D;
      for (let i = 0; i < half; i++) {
        const real = x[at + i], imaginary = x[at + half + i];
        x[at + i] = real * cos[i] - imaginary * sin[i];
        x[at + half + i] = imaginary * cos[i] + real * sin[i];
      }
      if (!this.isLlama) normalise(x, x, this.shape.norm_eps, null, at, D);
    }
  }
}

// ----- the tokenizer

// bytes as text of one character a byte, for maps
function latin(bytes) {
  let text = "";
  for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192));
  return text;
}

class Tokenizer {
  constructor({ kind, tokens, specials, end_ids, chat, pattern, classes, longest_text }) {
    this.kind = kind;
    this.bytes = tokens.map(bytesOf);
    this.bos = tokens.length;
    for (const name of specials) this.bytes.push(new TextEncoder().encode(name));
    this.ends = new Set(end_ids);
    this.chat = chat;
    this.longest = longest_text;
    const names = this.bytes.slice(0, this.bos).map(latin);
    this.ids = new Map(names.map((name, id) => [name, id]));
    // The classes are those of the engine that split the training text: a browser may know more
    // letters, or fewer.
    if (kind === "bpe") this.pattern = new RegExp(pattern.replace(/\\p\{[LN]\}|\\s/g, (name) => classes[name]), "gu");
  }

  // ids of a text, without BOS
  encode(text) {
    if (text.length > this.longest) throw new Error(`The prompt has more than ${this.longest} characters. Shorten it.`);
    // UTF-8 has no halves of surrogate pairs
    const bytes = new TextEncoder();
    const whole = text.replace(/\p{Surrogate}/gu, "?");
    if (this.kind === "byte") return Array.from(bytes.encode(whole));
    if (this.kind === "char") return Array.from(whole, (character) => this.idOf(character, bytes.encode(character)));
    const ids = [];
    for (const [piece] of whole.matchAll(this.pattern)) this.encodePiece(bytes.encode(piece), ids);
    return ids;
  }

  // ids of a conversation ({role, content} each) whose next message is the assistant's, without BOS.
  // A content that spells a special token is plain text.
  render(messages) {
    const { chat } = this;
    const turns = messages.flatMap(({ role, content }) => [chat[role], ...this.encode(content), chat.end]);
    return [...turns, chat.assistant];
  }

  idOf(character, bytes) {
    const id = this.ids.get(latin(bytes));
    if (id !== undefined) return id;
    const point = character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    throw new Error(`The character ${JSON.stringify(character)} (U+${point}) is not among this model's ${this.bos} characters. Leave it out.`);
  }

  // Byte-pair encoding: of all neighbours whose joint bytes are a token, the lowest id first.
  encodePiece(bytes, ids) {
    const text = latin(bytes);
    const whole = this.ids.get(text);
    if (whole !== undefined) {
      ids.push(whole);
      return;
    }
    const none = 0x7fffffff;
    // where each part begins, and the id that it has together with the next one
    const starts = Int32Array.from({ length: bytes.length + 1 }, (_, i) => i);
    const joint = new Int32Array(bytes.length).fill(none);
    let n = bytes.length;
    const rank = (i) => {
      joint[i] = i + 2 > n ? none : this.ids.get(text.slice(starts[i], starts[i + 2])) ?? none;
    };
    for (let i = 0; i + 1 < n; i++) rank(i);
    for (;;) {
      let best = 0;
      for (let i = 1; i + 1 < n; i++) if (joint[i] < joint[best]) best = i;
      if (n < 2 || joint[best] === none) break;
      starts.copyWithin(best + 1, best + 2, n + 1);
      joint.copyWithin(best, best + 1, n);
      n -= 1;
      rank(best);
      if (best) rank(best - 1);
    }
    for (let i = 0; i < n; i++) ids.push(this.ids.get(text.slice(starts[i], starts[i + 1])));
  }

  decoder() {
    return new TextDecoder("utf-8", { ignoreBOM: true });
  }

  // a token alone, where half a character shows as its bytes
  label(id) {
    try {
      return new TextDecoder("utf-8", { ignoreBOM: true, fatal: true }).decode(this.bytes[id]);
    } catch {
      return `bytes ${Array.from(this.bytes[id], (byte) => byte.toString(16).padStart(2, "0")).join(" ")}`;
    }
  }
}

// ----- the choice of a token, as nanochat/eval/generation.py makes it

// PyTorch's generator on CPUs (MT19937), so that a seed draws here what it draws there
class Random {
  constructor(seed) {
    this.state = new Uint32Array(624);
    this.state[0] = seed % 2 ** 32;
    for (let i = 1; i < 624; i++) {
      const last = this.state[i - 1] ^ (this.state[i - 1] >>> 30);
      this.state[i] = Math.imul(1812433253, last) + i;
    }
    this.next = 624;
  }

  word() {
    if (this.next === 624) this.refill();
    let y = this.state[this.next++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  }

  refill() {
    const { state } = this;
    for (let i = 0; i < 624; i++) {
      const y = (state[i] & 0x80000000) | (state[(i + 1) % 624] & 0x7fffffff);
      state[i] = state[(i + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
    }
    this.next = 0;
  }

  // from 0 to 1, of 53 bits
  uniform() {
    const high = this.word();
    const low = this.word();
    return ((high % 2 ** 21) * 2 ** 32 + low) / 2 ** 53;
  }
}

// tokens whose shares nearly always decide; sorting all takes longer
const SORTED_FIRST = 64;

// ids of the k largest numbers, the largest first
function largest(numbers, k) {
  if (k > 8 * SORTED_FIRST) return Array.from(numbers.keys()).sort((one, other) => numbers[other] - numbers[one]).slice(0, k);
  const found = [];
  for (let id = 0; id < numbers.length; id++) {
    if (found.length === k && numbers[id] <= numbers[found[k - 1]]) continue;
    let place = found.length === k ? k - 1 : found.length;
    for (; place > 0 && numbers[found[place - 1]] < numbers[id]; place--) found[place] = found[place - 1];
    found[place] = id;
  }
  return found;
}

// the logits with the tokens of a text made less likely
function penalised(logits, penalty, seen) {
  const changed = Float32Array.from(logits);
  for (const id of seen) changed[id] = logits[id] > 0 ? logits[id] / penalty : logits[id] * penalty;
  return changed;
}

// the id that a number between 0 and 1 draws
function choose(logits, point, { temperature, top_k, top_p }) {
  const V = logits.length;
  if (temperature === 0) return largest(logits, 1)[0];
  const k = top_k > 0 ? Math.min(top_k, V) : V;
  if (k < V || V <= SORTED_FIRST) return draw(logits, largest(logits, k), point, temperature, top_p, null);
  const first = largest(logits, SORTED_FIRST);
  let total = 0;
  for (let id = 0; id < V; id++) total += Math.exp((logits[id] - logits[first[0]]) / temperature);
  return draw(logits, first, point, temperature, top_p, total) ?? draw(logits, largest(logits, V), point, temperature, top_p, null);
}

// choose() among some sorted ids. total: the sum over all tokens if others may be drawn too; then
// undefined is returned where these do not decide.
function draw(logits, ids, point, temperature, topP, total) {
  const shares = ids.map((id) => Math.exp((logits[id] - logits[ids[0]]) / temperature));
  const kept = total ?? shares.reduce((sum, share) => sum + share, 0);
  let running = 0;
  const cumulative = shares.map((share) => (running += share / kept));
  let last = ids.length - 1;
  if (topP < 1) {
    const reached = cumulative.findIndex((sum) => sum >= topP);
    if (reached >= 0) last = reached;
    if (total !== null && last === ids.length - 1) return undefined;
  }
  const mass = total !== null && topP >= 1 ? 1 : cumulative[last];
  if (total !== null && topP >= 1 && point >= cumulative.at(-1)) return undefined;
  const place = cumulative.findIndex((sum) => sum > point * mass);
  return ids[place < 0 ? ids.length - 1 : place];
}

// ----- runs

// tokens of the prompt that are read before the worker looks for messages
const READ_AT_ONCE = 16;
const ALTERNATIVES = 5;

class Player {
  constructor(about, parts, send) {
    this.about = about;
    this.send = send;
    this.tokenizer = new Tokenizer(about.tokenizer);
    this.model = new Model(about, joined(parts, about.weight_bytes).buffer);
    this.current = 0;
    const channel = new MessageChannel();
    this.later = () => new Promise((resolve) => {
      channel.port1.onmessage = resolve;
      // a timer would wait for 4 ms
      channel.port2.postMessage(null);
    });
  }

  stop() {
    this.current = 0;
  }

  // Continues a prompt, or answers the messages of a conversation. kept: ids that follow already.
  async run({ run, prompt, messages, kept, settings }) {
    this.current = run;
    try {
      const given = messages ? this.tokenizer.render(messages) : this.tokenizer.encode(prompt);
      const ids = [this.tokenizer.bos, ...given, ...kept];
      const { positions } = this.about.shape;
      if (ids.length >= positions) {
        const remedy = messages ? "Edit a message, or begin a new conversation." : "Shorten it.";
        throw new Error(`The ${messages ? "conversation" : "prompt"} has ${ids.length} tokens, and this model has ${positions} positions. ${remedy}`);
      }
      const decoder = this.tokenizer.decoder();
      const pieces = kept.map((id) => decoder.decode(this.tokenizer.bytes[id], { stream: true }));
      this.send({ kind: "began", run, pieces, tokens: ids.length });
      const logits = await this.readPrompt(ids, run);
      if (!logits) return;
      const n = Math.min(settings.max_tokens, positions - ids.length);
      await this.write(logits, ids, n, { run, settings, decoder });
    } catch (error) {
      if (this.current === run) this.send({ kind: "failed", run, message: error.message });
    }
  }

  // The logits behind the prompt; null if the run was stopped. What an earlier run read is kept.
  async readPrompt(ids, run) {
    const { model } = this;
    let same = 0;
    while (same < model.read.length && same < ids.length - 1 && model.read[same] === ids[same]) same += 1;
    model.cut(same);
    for (let i = same; i < ids.length - 1; i++) {
      model.step(ids[i], false);
      if ((i - same) % READ_AT_ONCE !== READ_AT_ONCE - 1) continue;
      this.send({ kind: "reading", run, done: i + 1 });
      await this.later();
      if (this.current !== run) return null;
    }
    return model.step(ids.at(-1), true);
  }

  async write(logits, ids, n, { run, settings, decoder }) {
    const { bytes, ends } = this.tokenizer;
    const random = new Random(settings.seed);
    const seen = new Set(ids);
    for (let i = 0; i < n; i++) {
      const { repetition_penalty: penalty } = settings;
      const point = settings.temperature === 0 ? 0 : random.uniform();
      const id = choose(penalty === 1 ? logits : penalised(logits, penalty, seen), point, settings);
      if (id === undefined || !Number.isFinite(logits[id])) throw new Error("The model's logits are not numbers: its weights are damaged.");
      if (ends.has(id)) {
        this.send({ kind: "ended", run, reason: "document", rest: decoder.decode() });
        return;
      }
      seen.add(id);
      const text = decoder.decode(bytes[id], { stream: true });
      this.send({ kind: "token", run, id, text, ...this.likely(logits, id) });
      await this.later();
      if (this.current !== run) return;
      if (i + 1 < n) logits = this.model.step(id, true);
    }
    const reason = n < settings.max_tokens ? "positions" : "length";
    this.send({ kind: "ended", run, reason, rest: decoder.decode() });
  }

  // log-probabilities under the model's own distribution: of a token, and of the most likely ones
  likely(logits, id) {
    const top = largest(logits, ALTERNATIVES);
    let sum = 0;
    for (let i = 0; i < logits.length; i++) sum += Math.exp(logits[i] - logits[top[0]]);
    const logprob = (each) => logits[each] - logits[top[0]] - Math.log(sum);
    return {
      logprob: logprob(id), label: this.tokenizer.label(id),
      top: top.map((each) => ({ id: each, logprob: logprob(each), label: this.tokenizer.label(each) })),
    };
  }
}

let player = null;

self.onmessage = ({ data }) => {
  if (data.kind === "run") player.run(data);
  if (data.kind === "stop") player.stop();
  if (data.kind !== "load") return;
  try {
    player = new Player(data.about, data.parts, (message) => self.postMessage(message));
    self.postMessage({ kind: "loaded" });
  } catch (error) {
    self.postMessage({ kind: "broken", message: error.message });
  }
};
