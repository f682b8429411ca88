// The LLaMA-family block, the target and the drafter.
#pragma once

#include <cmath>
#include <cstddef>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention.h"
#include "gemm.h"
#include "simd.h"
#include "threads.h"

namespace prism {

// Sizes of an engine, filled by the caller. Mirrored field by field by prism_trt/engines/cpu/library.py.
struct Dims {
    int32_t vocab, hidden, intermediate, layers, heads, kv_heads, head_dim, qkv_bias;
    int32_t modules, draft_hidden, draft_layers, draft_vocab, draft_intermediate, draft_heads, draft_kv_heads, draft_head_dim;
    int32_t draft_bias;    // fc has a bias
    int32_t draft_fusion;  // the features are fused by a matrix before step 0
    int32_t draft_feature_norm;  // each state in the features is divided by its root mean square before
    int32_t draft_is_lm;   // the drafter is a language model of its own: own embedding, every norm, no fc
    int32_t context, slots, tokens, threads;
    float rms_eps, draft_rms_eps;
};

struct Sizes {
    int hidden, intermediate, heads, kv_heads, head_dim;
    float rms_eps;

    int q_width() const { return heads * head_dim; }
    int kv_width() const { return kv_heads * head_dim; }
    int qkv_width() const { return q_width() + 2 * kv_width(); }
};

struct Block {
    const float* input_norm = nullptr;  // null in the first layer of a processing module
    const float* qkv_bias = nullptr;    // null in most families
    const float* post_norm = nullptr;
    Matrix qkv, o, gate, up, down;
};

struct Module {
    Matrix fc;                      // empty in a drafter that is a language model of its own
    const float* fc_bias = nullptr;
    std::vector<Block> blocks;
    const float* norm = nullptr;    // null unless the drafter is a language model of its own
};

// Reads the engine's weight file in the order in which prism_trt/engines/cpu/packing.py wrote it.
class Reader {
public:
    Reader(const char* data, size_t size) : data_(data), size_(size) {}

    const float* floats(size_t count) { return reinterpret_cast<const float*>(take(count * sizeof(float))); }
    const bf16* halves(size_t count) { return reinterpret_cast<const bf16*>(take(count * sizeof(bf16))); }
    Matrix matrix(int outputs, int inputs) {
        Matrix m{nullptr, outputs, inputs};
        m.weights = reinterpret_cast<const uint32_t*>(take(m.bytes()));
        return m;
    }
    void finish() const {
        if (at_ != size_) throw std::runtime_error("the weight file does not match the engine's sizes");
    }

private:
    const char* take(size_t bytes) {
        const char* p = data_ + at_;
        at_ += (bytes + 63) / 64 * 64;
        if (at_ > size_) throw std::runtime_error("the weight file is shorter than the engine's sizes");
        return p;
    }

    const char* data_;
    size_t size_;
    size_t at_ = 0;
};

// One over the root mean square of a row, whose vectors at(0), at(16), ... gives.
template <typename At>
static inline vf inverse_rms(int width, float eps, At&& at) {
    vf sum = {};
    for (int i = 0; i < width; i += kLanes) {
        const vf v = at(i);
        sum = fma(v, v, sum);
    }
    return splat(1.0f / std::sqrt(reduce_sum(sum) / float(width) + eps));
}

static inline void rms_norm(const float* x, const float* weight, float eps, int width, bf16* out) {
    const vf scale = inverse_rms(width, eps, [&](int i) { return load(x + i); });
    for (int i = 0; i < width; i += kLanes) store_bf16(out + i, load(x + i) * scale * load(weight + i));
}

// Divides a row by its root mean square.
static inline void normalize(const bf16* x, float eps, int width, bf16* out) {
    const vf scale = inverse_rms(width, eps, [&](int i) { return load_bf16(x + i); });
    for (int i = 0; i < width; i += kLanes) store_bf16(out + i, load_bf16(x + i) * scale);
}

static inline void round_row(const float* x, int width, bf16* out) {
    for (int i = 0; i < width; i += kLanes) store_bf16(out + i, load(x + i));
}

// Scratch of one transformer block; `tokens` rows each.
struct Scratch {
    std::vector<float> x;        // residual stream
    std::vector<float> qkv;
    std::vector<bf16> normed, q, attended, activated;
    std::vector<std::vector<float>> scores;  // per thread

    Scratch(const Sizes& s, int tokens, int capacity, int threads)
        : x(size_t(tokens) * s.hidden), qkv(size_t(tokens) * s.qkv_width()), normed(size_t(tokens) * s.hidden),
          q(size_t(tokens) * s.q_width()), attended(size_t(tokens) * s.q_width()),
          activated(size_t(tokens) * s.intermediate),
          scores(threads, std::vector<float>(size_t(kMaxQueries) * capacity)) {}
};

// fc(x) style product into rows of `out`, optionally added to what is there.
static inline void project(const Matrix& m, const bf16* x, size_t x_stride, int tokens, const float* bias, float* out, bool add,
                           int id, int size, const uint32_t* next) {
    gemm(m, x, x_stride, tokens, id, size, next, [&](int g, int t0, int count, const float* y) {
        const int from = g * kGroup, width = std::min(kGroup, m.outputs - from);
        for (int t = 0; t < count; ++t) {
            float* row = out + size_t(t0 + t) * m.outputs + from;
            for (int i = 0; i < width; ++i) {
                const float v = bias ? y[t * kGroup + i] + bias[from + i] : y[t * kGroup + i];
                row[i] = add ? row[i] + v : v;
            }
        }
    });
}

// Rotates q and k by position, scales q, and writes k and v of this thread's share of tokens into the pool.
static inline void place(const Sizes& s, Scratch& scratch, const Pool& pool, int layer, const Batch& batch,
                         const int64_t* positions, const float* rope, int id, int size) {
    const int half = s.head_dim / 2;
    const float q_scale = 1.0f / std::sqrt(float(s.head_dim));
    std::vector<bf16> key(s.head_dim);
    const Share share(batch.tokens(), id, size);
    for (int t = share.first; t < share.last; ++t) {
        const float* row = scratch.qkv.data() + size_t(t) * s.qkv_width();
        const float* cosine = rope + size_t(positions[batch.padded(t)]) * s.head_dim;
        const float* sine = cosine + half;
        const auto rotate = [&](const float* from, float scale, bf16* to) {
            for (int d = 0; d < half; ++d) {
                const float a = from[d], b = from[d + half];
                to[d] = to_bf16((a * cosine[d] - b * sine[d]) * scale);
                to[d + half] = to_bf16((b * cosine[d] + a * sine[d]) * scale);
            }
        };
        for (int h = 0; h < s.heads; ++h)
            rotate(row + h * s.head_dim, q_scale, scratch.q.data() + size_t(t) * s.q_width() + h * s.head_dim);
        const int slot = int(batch.slots[batch.row[t]]), entry = batch.entry(t);
        for (int h = 0; h < s.kv_heads; ++h) {
            rotate(row + s.q_width() + h * s.head_dim, 1.0f, key.data());
            pool.put_key(layer, slot, h, entry, key.data());
            round_row(row + s.q_width() + s.kv_width() + h * s.head_dim, s.head_dim, pool.value(layer, slot, h, entry));
        }
    }
}

// The block from its placed q, k and v to the end, on the residual stream w.x.
static inline void attention_and_mlp(const Sizes& s, const Block& block, const Pool& pool, int layer, const Batch& batch, Scratch& w,
                                     Team& team, int id, const uint32_t* next) {
    const int size = team.size(), tokens = batch.tokens();
    attention(pool, layer, batch, s.heads, w.q.data(), w.attended.data(), w.scores[id].data(), w.scores[id].size() / kMaxQueries, id,
              size);
    team.barrier();
    project(block.o, w.attended.data(), s.q_width(), tokens, nullptr, w.x.data(), true, id, size, block.gate.first_of(id, size));
    team.barrier();
    const Share share(tokens, id, size);
    for (int t = share.first; t < share.last; ++t)
        rms_norm(w.x.data() + size_t(t) * s.hidden, block.post_norm, s.rms_eps, s.hidden, w.normed.data() + size_t(t) * s.hidden);
    team.barrier();
    // Gate and up in step, so that the product is formed while both are in cache.
    const Share groups(block.gate.groups(), id, size);
    const int tiles = (tokens + kTile - 1) / kTile;
    alignas(64) float gate[kTile * kGroup], up[kTile * kGroup];
    for (int g = groups.first; g < groups.last; ++g) {
        const bool last = g + 1 == groups.last;
        const uint32_t* ahead_gate = last ? block.down.first_of(id, size) : block.gate.group(g + 1);
        const uint32_t* ahead_up = last ? ahead_gate : block.up.group(g + 1);
        const int width = std::min(kGroup, s.intermediate - g * kGroup);
        for (int i = 0; i < tiles; ++i) {
            const Share part(tokens, i, tiles);
            const int count = part.last - part.first;
            const bf16* x = w.normed.data() + size_t(part.first) * s.hidden;
            tile_of(count, block.gate.group(g), block.gate.pairs(), x, s.hidden, gate, ahead_gate, i, tiles);
            tile_of(count, block.up.group(g), block.up.pairs(), x, s.hidden, up, ahead_up, i, tiles);
            for (int t = 0; t < count; ++t) {
                bf16* to = w.activated.data() + size_t(part.first + t) * s.intermediate + g * kGroup;
                for (int v = 0; v < width; v += kLanes) {
                    const vf a = load(gate + t * kGroup + v);
                    // silu(a) = a / (1 + exp(-a)); exp_approx is exact enough up to 87, where silu is 0 anyway
                    const vf low = maximum(a, splat(-80.0f));
                    store_bf16(to + v, a / (exp_approx(-low) + 1.0f) * load(up + t * kGroup + v));
                }
            }
        }
    }
    team.barrier();
    project(block.down, w.activated.data(), s.intermediate, tokens, nullptr, w.x.data(), true, id, size, next);
    team.barrier();
}

// Logits of `tokens` rows and their argmax (lowest index on ties). `logits` may be null.
struct Best {
    float value;
    int64_t index;
};

// `rows[t]` is the row of `logits` that token t fills.
static inline void head(const Matrix& m, const bf16* x, int hidden, int tokens, float* logits, const int* rows, Best* best, int id,
                        int size, const uint32_t* next) {
    for (int t = 0; t < tokens; ++t) best[t] = {-INFINITY, 0};
    gemm(m, x, hidden, tokens, id, size, next, [&](int g, int t0, int count, const float* y) {
        const int from = g * kGroup, width = std::min(kGroup, m.outputs - from);
        for (int t = 0; t < count; ++t) {
            const float* row = y + t * kGroup;
            if (logits) std::memcpy(logits + size_t(rows[t0 + t]) * m.outputs + from, row, width * sizeof(float));
            Best& b = best[t0 + t];
            if (width == kGroup) {
                const float top = reduce_max(maximum(maximum(load(row), load(row + kLanes)), load(row + 2 * kLanes)));
                if (top <= b.value) continue;
            }
            for (int i = 0; i < width; ++i)
                if (row[i] > b.value) b = {row[i], from + i};
        }
    });
}

}  // namespace prism
