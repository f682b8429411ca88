// The engine: weights, K/V pools, scratch, and the operations of prism_trt/engines/protocol.py.
#pragma once

#include <memory>

#include "transformer.h"

namespace prism {

struct DraftTree {
    int64_t *tokens, *parents, *depths;  // [rows][size]
    int64_t* counts;                     // [rows] nodes, root included; the rest of a row is not written
    uint8_t* mask;                       // [rows][size][size]
    float* log_probs;                    // [rows][size]
};

// The `width` best continuations of each drafted row, best first, ties to the lower draft-vocabulary index.
struct Ranking {
    int width;
    std::vector<float> log_probs;  // [rows][width]
    std::vector<int> indices;      // [rows][width]
};

class Engine {
public:
    // Takes its own copy of the weights at `path` in huge pages. Features are the residual streams after the given numbers of
    // layers, side by side; all of them means after the final norm.
    Engine(const Dims& dims, const int32_t* step_map, int steps, const int32_t* feature_layers, int features,
           const int64_t* draft_vocab, const char* path);
    ~Engine();
    Engine(const Engine&) = delete;
    Engine& operator=(const Engine&) = delete;

    // `logits_for`: 0 none, 1 the last token of each row, 2 all. Outputs are padded like the inputs ("last": one per row).
    void forward(Batch& batch, const int64_t* tokens, const int64_t* positions, int logits_for, bf16* features, float* logits,
                 int64_t* greedy);
    void commit(int rows, const int64_t* slots, const int64_t* lengths, const int64_t* accepted, const int64_t* counts, int stride);
    // K/V of the first `length` entries, target and drafter, from one slot to another.
    void copy_prefix(int from, int to, int length);
    void draft(Batch& batch, int step, const int64_t* tokens, const int64_t* positions, const bf16* hidden, bool last_only,
               float* logits, bf16* hidden_out);
    // Nodes whose cumulative log-probability is below `least` are neither extended nor part of the tree.
    void draft_round(Batch& batch, const int64_t* tokens, const int64_t* positions, const bf16* features, int depth, int width,
                     int size, float least, DraftTree tree);

    // A whole greedy round: draft_round, verification, commit. Row b gets counts[b] <= depth + 1 tokens (the accepted ones
    // and the bonus token) and the target's features of the tokens before each, rows of depth + 1; drafted[b] nodes were
    // verified besides the root.
    void speculate(Batch& batch, const int64_t* tokens, const int64_t* positions, const bf16* features, int depth, int width,
                   int size, float least, int64_t* out_tokens, int64_t* out_counts, int64_t* out_drafted, bf16* out_features);

    const Dims dims;

private:
    struct Mapping {
        char* data;
        size_t bytes;
    };

    Mapping allocate(size_t bytes);
    size_t feature_size() const { return feature_layers_.size() * size_t(dims.hidden); }
    const Module& module_of(int step) const { return modules_[step_map_[std::min<size_t>(step, step_map_.size() - 1)]]; }
    void check(const Batch& batch, const int64_t* tokens, const int64_t* positions) const;
    void run_draft(Batch& batch, int step, const int64_t* tokens, const int64_t* positions, const bf16* hidden, bool last_only,
                   float* logits, bf16* hidden_out, Ranking* ranking);

    Sizes sizes_, draft_sizes_;
    std::vector<int> step_map_;
    std::vector<int64_t> draft_vocab_;
    std::vector<Mapping> mappings_;
    std::vector<int> feature_layers_;
    const bf16* embedding_ = nullptr;
    const bf16* draft_embedding_ = nullptr;  // the target's, unless the drafter has its own
    const float *rope_ = nullptr, *draft_rope_ = nullptr, *final_norm_ = nullptr;
    std::vector<Block> blocks_;
    std::vector<Module> modules_;
    Matrix head_, draft_head_, fusion_;
    Pool pool_, draft_pool_;
    std::unique_ptr<Scratch> scratch_, draft_scratch_;
    std::vector<bf16> features_;          // [tokens][feature_size]: inputs of the fusion matrix
    std::vector<float> fused_features_;   // [tokens][hidden]
    std::vector<bf16> fused_;             // [tokens][2 * hidden]
    std::vector<bf16> final_;             // [tokens][hidden] post-norm rows that go to the head
    std::vector<std::vector<Best>> best_;  // per thread
    std::vector<float> draft_logits_;     // of draft_round
    std::vector<bf16> tree_features_;     // of speculate
    Team team_;
};

}  // namespace prism
