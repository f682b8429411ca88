// Attention of tree tokens over a K/V pool.
//
// Keys are packed so that one vector holds a pair of dimensions of 16 consecutive entries; values are rows. The softmax
// denominator and the weighted sum run over the entries one by one in pool order, and an entry that is not visible adds
// an exact zero. A token's result is therefore the same bits whether its ancestors lie side by side (plain decoding) or
// among the nodes of a tree, as long as ancestors come first.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "simd.h"
#include "threads.h"

namespace prism {

struct PoolShape {
    int layers, slots, kv_heads, capacity, head_dim;  // capacity is a multiple of 16

    size_t head_words() const { return size_t(capacity) * head_dim; }
    size_t total() const { return head_words() * kv_heads * slots * layers; }
};

// K and V of all layers and slots; storage is owned by the engine and starts as zeros.
struct Pool {
    PoolShape shape;
    bf16* keys = nullptr;
    bf16* values = nullptr;

    size_t head_offset(int layer, int slot, int head) const {
        return ((size_t(layer) * shape.slots + slot) * shape.kv_heads + head) * shape.head_words();
    }
    bf16* key_block(int layer, int slot, int head, int entry) const {
        return keys + head_offset(layer, slot, head) + size_t(entry / kLanes) * shape.head_dim * kLanes;
    }
    bf16* value(int layer, int slot, int head, int entry) const {
        return values + head_offset(layer, slot, head) + size_t(entry) * shape.head_dim;
    }
    void put_key(int layer, int slot, int head, int entry, const bf16* key) const {
        bf16* block = key_block(layer, slot, head, entry) + 2 * (entry % kLanes);
        for (int d = 0; d < shape.head_dim; d += 2, block += 2 * kLanes) std::memcpy(block, key + d, 2 * sizeof(bf16));
    }
    void get_key(int layer, int slot, int head, int entry, bf16* key) const {
        const bf16* block = key_block(layer, slot, head, entry) + 2 * (entry % kLanes);
        for (int d = 0; d < shape.head_dim; d += 2, block += 2 * kLanes) std::memcpy(key + d, block, 2 * sizeof(bf16));
    }
    void move(int slot, int from, int to) const {
        std::vector<bf16> key(shape.head_dim);
        for (int layer = 0; layer < shape.layers; ++layer)
            for (int head = 0; head < shape.kv_heads; ++head) {
                get_key(layer, slot, head, from, key.data());
                put_key(layer, slot, head, to, key.data());
                std::memcpy(value(layer, slot, head, to), value(layer, slot, head, from), shape.head_dim * sizeof(bf16));
            }
    }
    // The first `length` entries of slot `from` to slot `to`, with those that share their last key block.
    void copy(int from, int to, int length) const {
        const size_t bytes = size_t(length + kLanes - 1) / kLanes * kLanes * shape.head_dim * sizeof(bf16);
        for (int layer = 0; layer < shape.layers; ++layer)
            for (int head = 0; head < shape.kv_heads; ++head) {
                std::memcpy(key_block(layer, to, head, 0), key_block(layer, from, head, 0), bytes);
                std::memcpy(value(layer, to, head, 0), value(layer, from, head, 0), bytes);
            }
    }
};

// The tokens of one call: rows of requests, each with its slot and what its tokens may read.
struct Batch {
    int rows;
    const int64_t* slots;    // [rows]
    const int64_t* lengths;  // [rows] committed entries, visible to every token of the row
    const int64_t* counts;   // [rows] tokens of the row
    int stride;              // tokens per row in padded inputs and outputs
    int offset;              // in-flight entries written by earlier calls
    const uint8_t* mask;     // [rows][stride][offset + stride], or null for causal
    std::vector<int> row, index;  // of each token, without padding
    std::vector<int> first;       // first token of each row

    void flatten() {
        for (int b = 0; b < rows; ++b) {
            first.push_back(int(row.size()));
            for (int i = 0; i < counts[b]; ++i) {
                row.push_back(b);
                index.push_back(i);
            }
        }
        first.push_back(int(row.size()));
    }
    int tokens() const { return int(row.size()); }
    int padded(int t) const { return row[t] * stride + index[t]; }
    int entry(int t) const { return int(lengths[row[t]]) + offset + index[t]; }
    int in_flight() const { return offset + stride; }
    bool visible(int t, int j) const { return mask ? mask[size_t(padded(t)) * in_flight() + j] != 0 : j <= index[t]; }
    // One past the last in-flight entry token t may read.
    int visible_end(int t) const {
        if (!mask) return index[t] + 1;
        int end = offset + int(counts[row[t]]);
        while (end > 0 && !visible(t, end - 1)) --end;
        return end;
    }
};

constexpr float kHidden = -1e30f;

// Prefetch distances: hardware prefetchers stop at 4 KiB pages, and one head's entries are a few of those.
constexpr int kKeysAhead = 4;     // blocks of 16 entries
constexpr int kValuesAhead = 48;  // entries

// One unit of work: `N` queries (token, head) that share a row and a K/V head.
template <int N, int V>
static inline void attend(const Pool& pool, int layer, const Batch& batch, int kv_head, const int* token, const bf16* const* query,
                          bf16* const* out, float* scores, size_t score_stride) {
    const int head_dim = V * kLanes;
    const int b = batch.row[token[0]];
    const int slot = int(batch.slots[b]);
    const int base = int(batch.lengths[b]);
    int ends[N];
    int end = 0;
    for (int n = 0; n < N; ++n) {
        ends[n] = base + batch.visible_end(token[n]);
        end = std::max(end, ends[n]);
    }
    const int blocks = (end + kLanes - 1) / kLanes;

    const uint32_t* keys = reinterpret_cast<const uint32_t*>(pool.key_block(layer, slot, kv_head, 0));
    const size_t block_words = size_t(head_dim / 2) * kLanes;
    int block = 0;
    for (; block + 2 <= blocks; block += 2) {
        const uint32_t* k = keys + block * block_words;
        vf acc[N][2] = {};
        for (int d = 0; d < head_dim / 2; ++d) {
            prefetch(k + kKeysAhead * block_words + 2 * d * kLanes);
            prefetch(k + kKeysAhead * block_words + (2 * d + 1) * kLanes);
            const vu k0 = load_u(k + d * kLanes), k1 = load_u(k + block_words + d * kLanes);
            for (int n = 0; n < N; ++n) {
                uint32_t pair;
                std::memcpy(&pair, query[n] + 2 * d, sizeof pair);
                const vu q = splat_u(pair);
                acc[n][0] = dot2(acc[n][0], k0, q);
                acc[n][1] = dot2(acc[n][1], k1, q);
            }
        }
        for (int n = 0; n < N; ++n) {
            store(scores + n * score_stride + block * kLanes, acc[n][0]);
            store(scores + n * score_stride + (block + 1) * kLanes, acc[n][1]);
        }
    }
    for (; block < blocks; ++block) {
        const uint32_t* k = keys + block * block_words;
        vf acc[N] = {};
        for (int d = 0; d < head_dim / 2; ++d) {
            const vu k0 = load_u(k + d * kLanes);
            for (int n = 0; n < N; ++n) {
                uint32_t pair;
                std::memcpy(&pair, query[n] + 2 * d, sizeof pair);
                acc[n] = dot2(acc[n], k0, splat_u(pair));
            }
        }
        for (int n = 0; n < N; ++n) store(scores + n * score_stride + block * kLanes, acc[n]);
    }

    const bf16* values = pool.value(layer, slot, kv_head, 0);
    for (int j = 0; j < std::min(end, kValuesAhead); ++j)
        for (int i = 0; i < V; i += 2) prefetch(values + j * head_dim + i * kLanes);
    for (int n = 0; n < N; ++n) {
        float* s = scores + n * score_stride;
        if (batch.mask)
            for (int j = base; j < ends[n]; ++j)
                if (!batch.visible(token[n], j - base)) s[j] = kHidden;
        for (int j = ends[n]; j < blocks * kLanes; ++j) s[j] = kHidden;
        vf top = splat(kHidden);
        for (int j = 0; j < blocks; ++j) top = maximum(top, load(s + j * kLanes));
        const vf m = splat(reduce_max(top));
        for (int j = 0; j < blocks; ++j) {
            const vf x = load(s + j * kLanes);
            const vi seen = x > splat(kHidden);
            store(s + j * kLanes, (vf)((vi)exp_approx(x - m) & seen));
        }
    }

    vf acc[N][V] = {};
    vf total[N] = {};
    for (int j = 0; j < end; ++j, values += head_dim) {
        vf v[V];
        for (int i = 0; i < V; ++i) {
            if (i % 2 == 0) prefetch(values + kValuesAhead * head_dim + i * kLanes);
            v[i] = load_bf16(values + i * kLanes);
        }
        for (int n = 0; n < N; ++n) {
            const vf p = splat(scores[n * score_stride + j]);
            total[n] = total[n] + p;
            for (int i = 0; i < V; ++i) acc[n][i] = fma(p, v[i], acc[n][i]);
        }
    }
    for (int n = 0; n < N; ++n)
        for (int i = 0; i < V; ++i) store_bf16(out[n] + i * kLanes, acc[n][i] / total[n]);
}

// Queries q[tokens][heads][head_dim] (scaled) against the pool, into out of the same layout. Splits units over threads.
template <int N, int V>
static inline void attention_units(const Pool& pool, int layer, const Batch& batch, int heads, const bf16* q, bf16* out,
                                   float* scores, size_t score_stride, int id, int size) {
    const int kv_heads = pool.shape.kv_heads;
    const int shared = heads / kv_heads;
    const int head_dim = V * kLanes;
    std::vector<int> units(1, 0);  // running count of units over rows
    for (int b = 0; b < batch.rows; ++b)
        units.push_back(units.back() + kv_heads * ((int(batch.counts[b]) * shared + N - 1) / N));
    const Share share(units.back(), id, size);
    int b = 0;
    for (int unit = share.first; unit < share.last; ++unit) {
        while (unit >= units[b + 1]) ++b;
        const int queries = int(batch.counts[b]) * shared;
        const int chunks = (queries + N - 1) / N;
        const int kv_head = (unit - units[b]) / chunks;
        const Share part(queries, (unit - units[b]) % chunks, chunks);
        int token[N];
        const bf16* query[N];
        bf16* result[N];
        alignas(64) bf16 unused[V * kLanes];
        for (int n = 0; n < N; ++n) {
            const int i = std::min(part.first + n, part.last - 1);
            token[n] = batch.first[b] + i / shared;
            const size_t at = (size_t(token[n]) * heads + kv_head * shared + i % shared) * head_dim;
            query[n] = q + at;
            result[n] = part.first + n < part.last ? out + at : unused;
        }
        attend<N, V>(pool, layer, batch, kv_head, token, query, result, scores, score_stride);
    }
}

static inline void attention(const Pool& pool, int layer, const Batch& batch, int heads, const bf16* q, bf16* out, float* scores,
                             size_t score_stride, int id, int size) {
    switch (pool.shape.head_dim / kLanes) {
        case 1: return attention_units<4, 1>(pool, layer, batch, heads, q, out, scores, score_stride, id, size);
        case 2: return attention_units<4, 2>(pool, layer, batch, heads, q, out, scores, score_stride, id, size);
        case 4: return attention_units<4, 4>(pool, layer, batch, heads, q, out, scores, score_stride, id, size);
        case 5: return attention_units<4, 5>(pool, layer, batch, heads, q, out, scores, score_stride, id, size);
        case 6: return attention_units<2, 6>(pool, layer, batch, heads, q, out, scores, score_stride, id, size);
        case 8: return attention_units<2, 8>(pool, layer, batch, heads, q, out, scores, score_stride, id, size);
    }
}

constexpr int kMaxQueries = 4;

}  // namespace prism
