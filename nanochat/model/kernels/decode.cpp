// One token of several texts, on a CPU: the whole decoder in one call.
//
// Decoding reads every weight once per step, so its speed is that of memory, as long as nothing
// else gets in between. Therefore a step is a single parallel region in which the threads meet at
// barriers, activations stay in fp32 and in cache, and each weight that is loaded serves all texts.
//
// No number depends on how many texts there are, which ones, or how many threads: a dot product is
// summed in one fixed order, and no sum is divided between threads.
//
// Letters as in the model: B texts, C width, H query heads, K key/value heads, D head dim.

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "vectors.h"

namespace {

template <class W>
inline float dot(const W* w, const float* x, int64_t n) {
    F16 total = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) total += load(w + i) * load(x + i);
    float result = sum(total);
    for (; i < n; i++) result += to_float(w[i]) * x[i];
    return result;
}

// ---- matrices ----

// The dot products of OUT rows of a matrix with ROWS vectors. Each is summed as dot() does.
template <class W, int OUT, int ROWS>
inline void tile(const W* w, const float* x, int64_t n, float (&result)[OUT][ROWS]) {
    F16 total[OUT][ROWS] = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        F16 part[ROWS];
        for (int r = 0; r < ROWS; r++) part[r] = load(x + r * n + i);
        for (int o = 0; o < OUT; o++) {
            F16 weights = load(w + o * n + i);
            for (int r = 0; r < ROWS; r++) total[o][r] += weights * part[r];
        }
    }
    for (int o = 0; o < OUT; o++)
        for (int r = 0; r < ROWS; r++) {
            result[o][r] = sum(total[o][r]);
            for (int64_t j = i; j < n; j++) result[o][r] += to_float(w[o * n + j]) * x[r * n + j];
        }
}

template <class W, int OUT, int ROWS, class Use>
inline void rows_of(const W* w, const float* x, int64_t n, int64_t out, int64_t row, Use use) {
    float result[OUT][ROWS];
    tile<W, OUT, ROWS>(w + out * n, x + row * n, n, result);
    for (int o = 0; o < OUT; o++)
        for (int r = 0; r < ROWS; r++) use(row + r, out + o, result[o][r]);
}

template <class W, int OUT, class Use>
inline void outputs(const W* w, const float* x, int64_t n, int64_t out, int64_t B, Use use) {
    int64_t row = 0;
#if defined(__AVX512F__)
    for (; row + 4 <= B; row += 4) rows_of<W, OUT, 4>(w, x, n, out, row, use);
    for (; row + 2 <= B; row += 2) rows_of<W, OUT, 2>(w, x, n, out, row, use);
#else
    // Elsewhere a vector takes two registers of 16, or four of 32: more sums than of 2 outputs and
    // 2 rows would be kept in memory.
    constexpr int HALF = OUT > 2 ? 2 : OUT;
    for (; row + 2 <= B; row += 2)
        for (int part = 0; part < OUT; part += HALF)
            rows_of<W, HALF, 2>(w, x, n, out + part, row, use);
#endif
    for (; row < B; row++) rows_of<W, OUT, 1>(w, x, n, out, row, use);
}

struct Share {
    int64_t first, last;
};

// Thread t's share of n things, in multiples of `unit`.
inline Share share_of(int64_t n, int unit, int t, int threads) {
    int64_t units = (n + unit - 1) / unit;
    return {std::min(n, units * t / threads * unit), std::min(n, units * (t + 1) / threads * unit)};
}

// Calls use(row, output, value) for this thread's outputs of w x, where w is n_out x n.
template <class W, class Use>
inline void multiply(const W* w, int64_t n_out, int64_t n, const float* x, int64_t B, int t,
                     int threads, Use use) {
    Share share = share_of(n_out, 4, t, threads);
    int64_t out = share.first;
    for (; out + 4 <= share.last; out += 4) outputs<W, 4>(w, x, n, out, B, use);
    for (; out < share.last; out++) outputs<W, 1>(w, x, n, out, B, use);
}

// ---- threads ----

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Looks at a flag before a thread sleeps: some tens of microseconds, longer than it waits
// where every thread has a core.
constexpr int SPINS = 2000;

// Threads that run one function together, and meet at barriers in it.
class Team {
   public:
    explicit Team(int threads) : size(threads) {
        for (int t = 1; t < size; t++) workers.emplace_back([this, t] { work(t); });
    }

    ~Team() {
        ended = true;
        round.fetch_add(1);
        round.notify_all();
        for (auto& worker : workers) worker.join();
    }

    template <class Function>
    void run(Function function) {
        call = [](void* context, int t) { (*static_cast<Function*>(context))(t); };
        context = &function;
        round.fetch_add(1);
        round.notify_all();
        function(0);
        barrier();
    }

    void barrier() {
        uint32_t turn = turns.load();
        if (arrived.fetch_add(1) + 1 == size) {
            arrived.store(0);
            turns.fetch_add(1);
            turns.notify_all();
            return;
        }
        // Asleep, a thread leaves its core to the one that it waits for.
        for (int spin = 0; spin < SPINS && turns.load() == turn; spin++) relax();
        turns.wait(turn);
    }

    const int size;

   private:
    void work(int t) {
        uint32_t seen = 0;
        while (true) {
            for (int spin = 0; spin < SPINS && round.load() == seen; spin++) relax();
            round.wait(seen);
            seen++;
            if (ended) return;
            call(context, t);
            barrier();
        }
    }

    std::vector<std::thread> workers;
    void (*call)(void*, int) = nullptr;
    void* context = nullptr;
    bool ended = false;
    std::atomic<uint32_t> round{0}, turns{0};
    std::atomic<int> arrived{0};
};

}  // namespace

// ---- the model, as cpu_decode.py describes it ----

extern "C" {

struct Layer {
    const void *query, *key, *value, *out, *up, *gate, *down, *value_embedding;
    const float *attention_norm, *mlp_norm, *value_gate;
    void *keys, *values;  // (slots, K, capacity, D)
    float* key_before;    // (slots, K, D)
    int64_t window, capacity;
    float residual_lambda, x0_lambda;
};

struct Model {
    int64_t depth, width, n_head, n_kv_head, head_dim, hidden, vocab_size, gate_channels;
    int64_t is_speedrun, key_shift, middle_layer, is_bf16;
    float norm_eps, smear_lambda, backout_lambda, softcap;  // 0: no softcap
    const void *embedding, *head;
    const float *final_norm, *smear_gate, *rope_cos, *rope_sin;
    float* previous_embedding;  // (slots, C)
    const Layer* layers;
};
}

namespace {

// Buffers of a step, (B, n) each.
struct Buffers {
    explicit Buffers(const Model& m, int64_t B)
        : x(B * m.width), x0(B * m.width), middle(B * m.width), normed(B * m.width),
          q(B * m.n_head * m.head_dim), k(B * m.n_kv_head * m.head_dim),
          v(B * m.n_kv_head * m.head_dim), attended(B * m.n_head * m.head_dim), h(B * m.hidden) {}
    std::vector<float> x, x0, middle, normed, q, k, v, attended, h;
};

// RMSNorm of n numbers; weight may be null.
inline void norm(const float* x, const float* weight, int64_t n, float eps, float* out) {
    float scale = 1.0f / std::sqrt(dot(x, x, n) / n + eps);
    for (int64_t i = 0; i < n; i++) out[i] = x[i] * scale * (weight ? weight[i] : 1.0f);
}

// c tanh(x / c) of n numbers, in place.
inline void cap(float* x, int64_t n, float c) {
    for (int64_t i = 0; i < n; i += LANES) {
        float part[LANES] = {};
        int64_t here = std::min<int64_t>(LANES, n - i);
        std::copy_n(x + i, here, part);
        F16 tanh = 1.0f - 2.0f / (exp(load(part) * (2.0f / c)) + 1.0f);
        store(part, c * tanh);
        std::copy_n(part, here, x + i);
    }
}

// Rotary position, and QK-norm in a speedrun model; in place.
inline void position(float* head, const Model& m, int64_t at) {
    int64_t half = m.head_dim / 2;
    const float *cos = m.rope_cos + at * half, *sin = m.rope_sin + at * half;
    for (int64_t i = 0; i < half; i++) {
        float real = head[i], imaginary = head[i + half];
        head[i] = real * cos[i] - imaginary * sin[i];
        head[i + half] = imaginary * cos[i] + real * sin[i];
    }
    if (m.is_speedrun) norm(head, nullptr, m.head_dim, m.norm_eps, head);
}

// The first n pairs of channels turn fast and stay; the others come from the position before.
inline void shift_key(float* key, float* before, int64_t D) {
    int64_t half = D / 2, n = (half + 1) / 2;
    for (int64_t i = 0; i < D; i++) {
        float raw = key[i];
        if (i % half >= n) key[i] = before[i];
        before[i] = raw;
    }
}

// The sum of n values, each times its share; they begin at `first` in a ring of `capacity`.
template <class W>
inline void mix(const W* values, int64_t first, int64_t capacity, int64_t n, int64_t D,
                const float* shares, float* out) {
    int64_t i = 0;
    for (; i + LANES <= D; i += LANES) {
        F16 total = {};
        for (int64_t j = 0, at = first; j < n; j++) {
            total += shares[j] * load(values + at * D + i);
            if (++at == capacity) at = 0;
        }
        store(out + i, total);
    }
    for (; i < D; i++) {
        out[i] = 0;
        for (int64_t j = 0; j < n; j++)
            out[i] += shares[j] * to_float(values[(first + j) % capacity * D + i]);
    }
}

template <class W>
struct Step {
    const Model& m;
    Team& team;
    int64_t B;
    const int64_t *ids, *positions, *slots;
    float* logits;
    Buffers& b;

    void operator()(int t) {
        begin(t);
        for (int64_t l = 0; l < m.depth; l++) block(l, t);
        end(t);
    }

    Share rows(int t) { return share_of(B, 1, t, team.size); }

    void begin(int t) {
        int64_t C = m.width;
        for (auto [row, last] = rows(t); row < last; row++) {
            const W* from = static_cast<const W*>(m.embedding) + ids[row] * C;
            float* x = &b.x[row * C];
            for (int64_t i = 0; i < C; i++) x[i] = to_float(from[i]);
            if (!m.is_speedrun) continue;
            norm(x, nullptr, C, m.norm_eps, x);
            float gate = m.smear_lambda * sigmoid(dot(m.smear_gate, x, m.gate_channels));
            float* before = m.previous_embedding + slots[row] * C;
            for (int64_t i = 0; i < C; i++) {
                float own = x[i];
                x[i] = own + gate * before[i];
                before[i] = own;
                b.x0[row * C + i] = x[i];
            }
        }
    }

    void block(int64_t l, int t) {
        const Layer& layer = m.layers[l];
        int64_t C = m.width, D = m.head_dim;
        for (auto [row, last] = rows(t); row < last; row++) {
            float* x = &b.x[row * C];
            if (m.is_speedrun)
                for (int64_t i = 0; i < C; i++)
                    x[i] = layer.residual_lambda * x[i] + layer.x0_lambda * b.x0[row * C + i];
            norm(x, layer.attention_norm, C, m.norm_eps, &b.normed[row * C]);
        }
        team.barrier();
        into(layer.query, m.n_head * D, C, b.normed, b.q, t);
        into(layer.key, m.n_kv_head * D, C, b.normed, b.k, t);
        into(layer.value, m.n_kv_head * D, C, b.normed, b.v, t);
        team.barrier();
        Share heads = share_of(B * m.n_kv_head, 1, t, team.size);
        for (int64_t i = heads.first; i < heads.last; i++)
            attend(layer, i / m.n_kv_head, i % m.n_kv_head);
        team.barrier();
        onto(layer.out, C, m.n_head * D, b.attended, t);
        team.barrier();
        for (auto [row, last] = rows(t); row < last; row++)
            norm(&b.x[row * C], layer.mlp_norm, C, m.norm_eps, &b.normed[row * C]);
        team.barrier();
        hidden(layer, t);
        team.barrier();
        onto(layer.down, C, m.hidden, b.h, t);
        team.barrier();
        if (l == m.middle_layer)
            for (auto [row, last] = rows(t); row < last; row++)
                std::copy_n(&b.x[row * C], C, &b.middle[row * C]);
    }

    void end(int t) {
        int64_t C = m.width;
        for (auto [row, last] = rows(t); row < last; row++) {
            float* x = &b.x[row * C];
            if (m.is_speedrun)
                for (int64_t i = 0; i < C; i++) x[i] -= m.backout_lambda * b.middle[row * C + i];
            norm(x, m.final_norm, C, m.norm_eps, &b.normed[row * C]);
        }
        team.barrier();
        int64_t V = m.vocab_size;
        multiply(static_cast<const W*>(m.head), V, C, b.normed.data(), B, t, team.size,
                 [&](int64_t row, int64_t out, float value) { logits[row * V + out] = value; });
        if (m.softcap == 0) return;
        // This thread's own outputs: as many as multiply() gave it.
        Share share = share_of(V, 4, t, team.size);
        for (int64_t row = 0; row < B; row++)
            cap(logits + row * V + share.first, share.last - share.first, m.softcap);
    }

    void into(const void* w, int64_t n_out, int64_t n, const std::vector<float>& x,
              std::vector<float>& y, int t) {
        multiply(static_cast<const W*>(w), n_out, n, x.data(), B, t, team.size,
                 [&](int64_t row, int64_t out, float value) { y[row * n_out + out] = value; });
    }

    // Adds to the residual stream.
    void onto(const void* w, int64_t n_out, int64_t n, const std::vector<float>& x, int t) {
        multiply(static_cast<const W*>(w), n_out, n, x.data(), B, t, team.size,
                 [&](int64_t row, int64_t out, float value) { b.x[row * n_out + out] += value; });
    }

    // ReLU^2 of a speedrun model, SwiGLU of a llama.
    void hidden(const Layer& layer, int t) {
        if (m.is_speedrun) {
            multiply(static_cast<const W*>(layer.up), m.hidden, m.width, b.normed.data(), B, t,
                     team.size, [&](int64_t row, int64_t out, float value) {
                         float positive = std::max(value, 0.0f);
                         b.h[row * m.hidden + out] = positive * positive;
                     });
            return;
        }
        into(layer.up, m.hidden, m.width, b.normed, b.h, t);
        // The same outputs belong to the same thread: no barrier between the two.
        multiply(static_cast<const W*>(layer.gate), m.hidden, m.width, b.normed.data(), B, t,
                 team.size, [&](int64_t row, int64_t out, float value) {
                     b.h[row * m.hidden + out] *= value * sigmoid(value);
                 });
    }

    // Stores a key and a value of one head of one text, and answers its queries.
    void attend(const Layer& layer, int64_t row, int64_t head) {
        int64_t D = m.head_dim, slot = slots[row], at = positions[row];
        int64_t kv = slot * m.n_kv_head + head;
        float* key = &b.k[(row * m.n_kv_head + head) * D];
        float* value = &b.v[(row * m.n_kv_head + head) * D];
        if (layer.value_gate) {
            const float* x = &b.normed[row * m.width];
            float gate = 2 * sigmoid(dot(layer.value_gate + head * m.gate_channels, x, m.gate_channels));
            const W* embedding = static_cast<const W*>(layer.value_embedding) +
                                 (ids[row] * m.n_kv_head + head) * D;
            for (int64_t i = 0; i < D; i++) value[i] += gate * to_float(embedding[i]);
        }
        if (m.key_shift) shift_key(key, layer.key_before + kv * D, D);
        position(key, m, at);
        // A layer with a window writes over what it no longer sees.
        W* keys = static_cast<W*>(layer.keys) + kv * layer.capacity * D;
        W* values = static_cast<W*>(layer.values) + kv * layer.capacity * D;
        int64_t place = at % layer.capacity;
        for (int64_t i = 0; i < D; i++) {
            store(keys + place * D + i, key[i]);
            store(values + place * D + i, value[i]);
        }
        int64_t n = std::min(at + 1, std::min(layer.window, layer.capacity));
        // Before the ring is full, and where it is larger than the window, it is read from here.
        int64_t first = (at + 1 - n) % layer.capacity;
        int64_t group = m.n_head / m.n_kv_head;
        thread_local std::vector<float> scores;
        scores.resize((n + LANES - 1) / LANES * LANES);
        for (int64_t g = 0; g < group; g++) {
            float* query = &b.q[((row * m.n_kv_head + head) * group + g) * D];
            position(query, m, at);
            float scale = 1.0f / std::sqrt(float(D)), highest = -INFINITY;
            for (int64_t j = 0, from = first; j < n; j++) {
                scores[j] = scale * dot(keys + from * D, query, D);
                highest = std::max(highest, scores[j]);
                if (++from == layer.capacity) from = 0;
            }
            std::fill(scores.begin() + n, scores.end(), -INFINITY);
            F16 total = {};
            for (size_t j = 0; j < scores.size(); j += LANES)
                store(&scores[j], exp(load(&scores[j]) - highest));
            std::fill(scores.begin() + n, scores.end(), 0.0f);
            for (size_t j = 0; j < scores.size(); j += LANES) total += load(&scores[j]);
            float norm = 1.0f / sum(total);
            for (int64_t j = 0; j < n; j++) scores[j] *= norm;
            float* out = &b.attended[((row * m.n_kv_head + head) * group + g) * D];
            mix(values, first, layer.capacity, n, D, scores.data(), out);
        }
    }
};

}  // namespace

extern "C" {

void* nanochat_team(int threads) { return new Team(threads); }

void nanochat_disband(void* team) { delete static_cast<Team*>(team); }

// Reads one token of each of B texts: ids, their positions, and the slots of the cache that hold
// what was read before. logits: (B, V). No slot may occur twice.
void nanochat_decode(const Model* model, void* team, int64_t B, const int64_t* ids,
                     const int64_t* positions, const int64_t* slots, float* logits) {
    Team& threads = *static_cast<Team*>(team);
    Buffers buffers(*model, B);
    if (model->is_bf16)
        threads.run(Step<BFloat16>{*model, threads, B, ids, positions, slots, logits, buffers});
    else
        threads.run(Step<float>{*model, threads, B, ids, positions, slots, logits, buffers});
}
}
