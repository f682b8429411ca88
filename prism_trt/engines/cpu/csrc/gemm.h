// y[T, O] = x[T, I] W[O, I]^T with packed bf16 weights, bf16 inputs and fp32 accumulation.
//
// Packed layout: groups of 48 outputs; in a group, for each pair of inputs, three vectors of 16 outputs x 2 bf16. A
// thread streams its groups linearly. Each output accumulates over its inputs in one chain, in order, whatever the tile.
#pragma once

#include "simd.h"
#include "threads.h"

namespace prism {

constexpr int kBlocks = 3;                      // vectors of outputs per group
constexpr int kGroup = kBlocks * kLanes;        // outputs per group
#if defined(__AVX512F__)
constexpr int kTile = 8;                        // 24 accumulators + 3 weights + 1 input of 32 registers
#else
constexpr int kTile = 2;
#endif

struct Matrix {
    const uint32_t* weights = nullptr;  // [groups][inputs / 2][kBlocks][16] pairs of bf16
    int outputs = 0;
    int inputs = 0;

    int groups() const { return (outputs + kGroup - 1) / kGroup; }
    int pairs() const { return inputs / 2; }
    size_t group_words() const { return size_t(pairs()) * kGroup; }
    const uint32_t* group(int g) const { return weights + group_words() * g; }
    size_t bytes() const { return group_words() * groups() * sizeof(uint32_t); }
    const uint32_t* first_of(int id, int size) const { return group(Share(groups(), id, size).first); }
};

// One group by `T` tokens. A single tile prefetches its own weights: few tokens wait for memory, so theirs go straight to
// the first-level cache; with more, arithmetic takes as long as memory, and requests far ahead, into the second level,
// keep both busy. Where `period` tiles pass over the same group, tile `phase` prefetches every period-th part of `ahead`,
// the next group, so that its memory reads are spread over the whole time spent in this one.
constexpr int kFewTokens = 5;
constexpr int kLinesAheadFew = 240;   // 15 KiB
constexpr int kLinesAheadMany = 384;  // 24 KiB

template <int T>
static inline void tile(const uint32_t* __restrict w, int pairs, const bf16* __restrict x, size_t x_stride,
                        float* __restrict out, const uint32_t* ahead, int phase, int period) {
    vf acc[T][kBlocks] = {};
    int countdown = phase;
    for (int k = 0; k < pairs; ++k, w += kGroup) {
        if (period == 1) {
            for (int b = 0; b < kBlocks; ++b) {
                if (T <= kFewTokens) prefetch_near(w + (kLinesAheadFew + b) * kLanes);
                else prefetch(w + (kLinesAheadMany + b) * kLanes);
            }
        } else if (--countdown < 0) {
            for (int b = 0; b < kBlocks; ++b) prefetch(ahead + size_t(k) * kGroup + b * kLanes);
            countdown = period - 1;
        }
        vu weights[kBlocks];
        for (int b = 0; b < kBlocks; ++b) weights[b] = load_u(w + b * kLanes);
        for (int t = 0; t < T; ++t) {
            uint32_t pair;
            std::memcpy(&pair, x + t * x_stride + 2 * k, sizeof pair);
            const vu input = splat_u(pair);
            for (int b = 0; b < kBlocks; ++b) acc[t][b] = dot2(acc[t][b], weights[b], input);
        }
    }
    for (int t = 0; t < T; ++t)
        for (int b = 0; b < kBlocks; ++b) store(out + t * kGroup + b * kLanes, acc[t][b]);
}

static inline void tile_of(int tokens, const uint32_t* w, int pairs, const bf16* x, size_t x_stride, float* out,
                           const uint32_t* ahead, int phase, int period) {
    switch (tokens) {
        case 1: return tile<1>(w, pairs, x, x_stride, out, ahead, phase, period);
        case 2: return tile<2>(w, pairs, x, x_stride, out, ahead, phase, period);
#if defined(__AVX512F__)
        case 3: return tile<3>(w, pairs, x, x_stride, out, ahead, phase, period);
        case 4: return tile<4>(w, pairs, x, x_stride, out, ahead, phase, period);
        case 5: return tile<5>(w, pairs, x, x_stride, out, ahead, phase, period);
        case 6: return tile<6>(w, pairs, x, x_stride, out, ahead, phase, period);
        case 7: return tile<7>(w, pairs, x, x_stride, out, ahead, phase, period);
        case 8: return tile<8>(w, pairs, x, x_stride, out, ahead, phase, period);
#endif
    }
}

// Calls finish(group, first_token, tokens, out) with out[tokens][kGroup] for every tile of this thread's share.
// `next` is what this thread reads after this matrix.
template <typename Finish>
static inline void gemm(const Matrix& m, const bf16* x, size_t x_stride, int tokens, int id, int size,
                        const uint32_t* next, Finish&& finish) {
    alignas(64) float out[kTile * kGroup];
    const Share share(m.groups(), id, size);
    const int tiles = (tokens + kTile - 1) / kTile;
    for (int g = share.first; g < share.last; ++g) {
        const uint32_t* ahead = g + 1 < share.last ? m.group(g + 1) : next;
        for (int i = 0; i < tiles; ++i) {
            const Share part(tokens, i, tiles);
            const int count = part.last - part.first;
            tile_of(count, m.group(g), m.pairs(), x + part.first * x_stride, x_stride, out, ahead, i, tiles);
            finish(g, part.first, count, out);
        }
    }
}

}  // namespace prism
