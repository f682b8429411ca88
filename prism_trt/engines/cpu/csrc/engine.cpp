#include "engine.h"

#include <cerrno>
#include <cstdio>
#include <exception>
#include <new>
#include <numeric>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

namespace prism {

namespace {

constexpr size_t kHugePage = size_t(2) << 20;

void read_file(const char* path, char* to, size_t bytes) {
    const int file = open(path, O_RDONLY);
    if (file < 0) throw std::runtime_error(std::string("cannot open ") + path);
    for (size_t at = 0; at < bytes;) {
        const ssize_t got = read(file, to + at, bytes - at);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) {
            close(file);
            throw std::runtime_error(std::string("cannot read ") + path);
        }
        at += size_t(got);
    }
    close(file);
}

size_t file_size(const char* path) {
    struct stat status;
    if (stat(path, &status) != 0) throw std::runtime_error(std::string("cannot open ") + path);
    return size_t(status.st_size);
}

int round_up(int value, int to) { return (value + to - 1) / to * to; }

Block read_block(Reader& reader, const Sizes& s, bool input_norm, bool bias) {
    Block block;
    if (input_norm) block.input_norm = reader.floats(s.hidden);
    block.qkv = reader.matrix(s.qkv_width(), s.hidden);
    if (bias) block.qkv_bias = reader.floats(s.qkv_width());
    block.o = reader.matrix(s.hidden, s.q_width());
    block.post_norm = reader.floats(s.hidden);
    block.gate = reader.matrix(s.intermediate, s.hidden);
    block.up = reader.matrix(s.intermediate, s.hidden);
    block.down = reader.matrix(s.hidden, s.intermediate);
    return block;
}

// log-softmax of one row and its `width` best entries.
void rank_row(const float* logits, int count, int width, float* log_probs, int* indices, std::vector<float>& maxima,
              std::vector<float>& copy) {
    const int full = count / kLanes, blocks = (count + kLanes - 1) / kLanes;
    copy.assign(size_t(blocks) * kLanes, -INFINITY);
    std::memcpy(copy.data(), logits, count * sizeof(float));
    maxima.resize(blocks);
    vf top = splat(-INFINITY);
    for (int b = 0; b < blocks; ++b) {
        const vf v = load(copy.data() + b * kLanes);
        maxima[b] = reduce_max(v);
        top = maximum(top, v);
    }
    const float m = reduce_max(top);
    vf sum = {};
    for (int b = 0; b < full; ++b) sum = sum + exp_approx(load(copy.data() + b * kLanes) - splat(m));
    float total = reduce_sum(sum);
    for (int i = full * kLanes; i < count; ++i) total += std::exp(copy[i] - m);
    const float log_total = m + std::log(total);
    for (int w = 0; w < width; ++w) {
        const int b = int(std::max_element(maxima.begin(), maxima.end()) - maxima.begin());
        float* block = copy.data() + b * kLanes;
        const int lane = int(std::max_element(block, block + kLanes) - block);
        log_probs[w] = std::min(0.0f, block[lane] - log_total);
        indices[w] = b * kLanes + lane;
        block[lane] = -INFINITY;
        maxima[b] = reduce_max(load(block));
    }
}

}  // namespace

Engine::Mapping Engine::allocate(size_t bytes) {
    bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    void* data = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data == MAP_FAILED) throw std::bad_alloc();
    mappings_.push_back({static_cast<char*>(data), bytes + kHugePage});
    const uintptr_t aligned = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
    madvise(reinterpret_cast<void*>(aligned), bytes, MADV_HUGEPAGE);
    return {reinterpret_cast<char*>(aligned), bytes};
}

Engine::Engine(const Dims& d, const int32_t* step_map, int steps, const int32_t* feature_layers, int features,
               const int64_t* draft_vocab, const char* path)
    : dims(d), sizes_{d.hidden, d.intermediate, d.heads, d.kv_heads, d.head_dim, d.rms_eps},
      draft_sizes_{d.draft_hidden, d.draft_intermediate, d.draft_heads, d.draft_kv_heads, d.draft_head_dim, d.draft_rms_eps},
      step_map_(step_map, step_map + steps), draft_vocab_(draft_vocab, draft_vocab + d.draft_vocab),
      feature_layers_(feature_layers, feature_layers + features), team_(d.threads) {
    const size_t bytes = file_size(path);
    char* weights = allocate(bytes).data;
    read_file(path, weights, bytes);
    Reader reader(weights, bytes);
    const int capacity = round_up(d.context, kLanes);

    embedding_ = reader.halves(size_t(d.vocab) * d.hidden);
    rope_ = reader.floats(size_t(d.context) * d.head_dim);
    for (int l = 0; l < d.layers; ++l) blocks_.push_back(read_block(reader, sizes_, true, d.qkv_bias));
    final_norm_ = reader.floats(d.hidden);
    head_ = reader.matrix(d.vocab, d.hidden);

    const auto pool = [&](int layers, const Sizes& s) {
        Pool p{{layers, d.slots, s.kv_heads, capacity, s.head_dim}};
        p.keys = reinterpret_cast<bf16*>(allocate(p.shape.total() * sizeof(bf16)).data);
        p.values = reinterpret_cast<bf16*>(allocate(p.shape.total() * sizeof(bf16)).data);
        return p;
    };
    pool_ = pool(d.layers, sizes_);
    scratch_ = std::make_unique<Scratch>(sizes_, d.tokens, capacity, d.threads);
    final_.resize(size_t(d.tokens) * d.hidden);
    best_.assign(d.threads, std::vector<Best>(d.tokens));

    if (d.modules > 0) {
        draft_rope_ = reader.floats(size_t(d.context) * d.draft_head_dim);
        draft_embedding_ = d.draft_is_lm ? reader.halves(size_t(d.vocab) * d.draft_hidden) : embedding_;
        if (d.draft_fusion) fusion_ = reader.matrix(d.hidden, int(feature_size()));
        for (int m = 0; m < d.modules; ++m) {
            Module module;
            if (!d.draft_is_lm) module.fc = reader.matrix(d.hidden, 2 * d.hidden);
            if (d.draft_bias) module.fc_bias = reader.floats(d.hidden);
            for (int l = 0; l < d.draft_layers; ++l)
                module.blocks.push_back(read_block(reader, draft_sizes_, l > 0 || d.draft_is_lm, false));
            if (d.draft_is_lm) module.norm = reader.floats(d.draft_hidden);
            modules_.push_back(module);
        }
        draft_head_ = reader.matrix(d.draft_vocab, d.draft_hidden);
        draft_pool_ = pool(d.draft_layers, draft_sizes_);
        draft_scratch_ = std::make_unique<Scratch>(draft_sizes_, d.tokens, capacity, d.threads);
        if (!d.draft_is_lm) fused_.resize(size_t(d.tokens) * 2 * d.hidden);
        if (d.draft_fusion) {
            features_.resize(size_t(d.tokens) * feature_size());
            fused_features_.resize(size_t(d.tokens) * d.hidden);
        }
    }
    reader.finish();
}

Engine::~Engine() {
    for (const Mapping& mapping : mappings_) munmap(mapping.data, mapping.bytes);
}

void Engine::check(const Batch& batch, const int64_t* tokens, const int64_t* positions) const {
    if (batch.tokens() == 0) throw std::runtime_error("the call holds no token");
    if (batch.tokens() > dims.tokens) throw std::runtime_error("the call holds more tokens than the engine's limit");
    for (int t = 0; t < batch.tokens(); ++t) {
        const int at = batch.padded(t);
        const int64_t slot = batch.slots[batch.row[t]];
        if (slot < 0 || slot >= dims.slots) throw std::runtime_error("a slot is outside the K/V pool");
        if (batch.lengths[batch.row[t]] < 0 || batch.entry(t) >= dims.context)
            throw std::runtime_error("a token lies outside the context");
        if (positions[at] < 0 || positions[at] >= dims.context) throw std::runtime_error("a position lies outside the context");
        if (tokens[at] < 0 || tokens[at] >= dims.vocab) throw std::runtime_error("a token id is outside the vocabulary");
    }
}

void Engine::forward(Batch& batch, const int64_t* tokens, const int64_t* positions, int logits_for, bf16* features, float* logits,
                     int64_t* greedy) {
    check(batch, tokens, positions);
    const int count = batch.tokens();
    Scratch& w = *scratch_;
    const int width = dims.hidden;
    std::vector<int> wanted, row_of;  // tokens that go to the head, and the rows they fill
    if (logits_for == 1)
        for (int b = 0; b < batch.rows; ++b) {
            wanted.push_back(batch.first[b + 1] - 1);
            row_of.push_back(b);
        }
    if (logits_for == 2)
        for (int t = 0; t < count; ++t) {
            wanted.push_back(t);
            row_of.push_back(batch.padded(t));
        }

    team_.run([&](int id) {
        const int size = team_.size();
        const Share share(count, id, size);
        const auto norm = [&](const float* weight) {
            for (int t = share.first; t < share.last; ++t)
                rms_norm(w.x.data() + size_t(t) * width, weight, dims.rms_eps, width, w.normed.data() + size_t(t) * width);
        };
        for (int t = share.first; t < share.last; ++t) {
            const bf16* row = embedding_ + size_t(tokens[batch.padded(t)]) * width;
            for (int i = 0; i < width; i += kLanes) store(w.x.data() + size_t(t) * width + i, load_bf16(row + i));
        }
        norm(blocks_[0].input_norm);
        team_.barrier();
        // Copies this thread's share of a state into its column of the features.
        const auto capture = [&](int layer, auto&& copy) {
            if (!features) return;
            for (size_t column = 0; column < feature_layers_.size(); ++column)
                if (feature_layers_[column] == layer)
                    for (int t = share.first; t < share.last; ++t)
                        copy(size_t(t) * width, features + size_t(batch.padded(t)) * feature_size() + column * width);
        };
        for (int layer = 0; layer < dims.layers; ++layer) {
            const Block& block = blocks_[layer];
            capture(layer, [&](size_t from, bf16* to) { round_row(w.x.data() + from, width, to); });
            project(block.qkv, w.normed.data(), width, count, block.qkv_bias, w.qkv.data(), false, id, size,
                    block.o.first_of(id, size));
            team_.barrier();
            place(sizes_, w, pool_, layer, batch, positions, rope_, id, size);
            team_.barrier();
            const bool last = layer + 1 == dims.layers;
            attention_and_mlp(sizes_, block, pool_, layer, batch, w, team_, id,
                              last ? head_.first_of(id, size) : blocks_[layer + 1].qkv.first_of(id, size));
            norm(last ? final_norm_ : blocks_[layer + 1].input_norm);
            team_.barrier();
        }
        capture(dims.layers, [&](size_t from, bf16* to) { std::memcpy(to, w.normed.data() + from, width * sizeof(bf16)); });
        if (wanted.empty()) return;
        const bf16* rows = w.normed.data();
        if (logits_for == 1) {
            const Share mine(int(wanted.size()), id, size);
            for (int i = mine.first; i < mine.last; ++i)
                std::memcpy(final_.data() + size_t(i) * width, w.normed.data() + size_t(wanted[i]) * width, width * sizeof(bf16));
            team_.barrier();
            rows = final_.data();
        }
        head(head_, rows, width, int(wanted.size()), logits, row_of.data(), best_[id].data(), id, size,
             blocks_[0].qkv.first_of(id, size));
    });
    for (size_t i = 0; i < wanted.size(); ++i) {
        Best best = best_[0][i];
        for (size_t id = 1; id < best_.size(); ++id)
            if (best_[id][i].value > best.value) best = best_[id][i];
        greedy[row_of[i]] = best.index;
    }
}

void Engine::commit(int rows, const int64_t* slots, const int64_t* lengths, const int64_t* accepted, const int64_t* counts,
                    int stride) {
    for (int b = 0; b < rows; ++b)
        for (int j = 0; j < counts[b]; ++j) {
            const int from = int(lengths[b] + accepted[size_t(b) * stride + j]), to = int(lengths[b] + j);
            if (from < to || from >= dims.context) throw std::runtime_error("an accepted entry is out of order");
            if (from != to) pool_.move(int(slots[b]), from, to);
        }
}

void Engine::copy_prefix(int from, int to, int length) {
    if (std::min(from, to) < 0 || std::max(from, to) >= dims.slots) throw std::runtime_error("a slot is outside the K/V pool");
    if (length < 0 || length > dims.context) throw std::runtime_error("a token lies outside the context");
    if (from == to) return;
    pool_.copy(from, to, length);
    if (dims.modules > 0) draft_pool_.copy(from, to, length);
}

void Engine::run_draft(Batch& batch, int step, const int64_t* tokens, const int64_t* positions, const bf16* hidden, bool last_only,
                       float* logits, bf16* hidden_out, Ranking* ranking) {
    check(batch, tokens, positions);
    const Module& module = module_of(step);
    const int count = batch.tokens(), width = dims.draft_hidden;
    const bool fuse_features = dims.draft_fusion && step == 0;
    const size_t hidden_stride = step == 0 ? feature_size() : size_t(width);
    Scratch& w = *draft_scratch_;

    // For step 0 only K/V is read of the earlier tokens: after placing it, the last token of each row goes on alone.
    Batch last{batch.rows, batch.slots, nullptr, nullptr, 1, 0, nullptr, {}, {}, {}};
    std::vector<int64_t> last_lengths, ones(batch.rows, 1);
    Batch* rest = &batch;
    if (last_only) {
        for (int b = 0; b < batch.rows; ++b) last_lengths.push_back(batch.lengths[b] + batch.counts[b] - 1);
        last.lengths = last_lengths.data();
        last.counts = ones.data();
        last.flatten();
        rest = &last;
    }
    const int remaining = rest->tokens();
    std::vector<int> row_of;
    for (int t = 0; t < remaining; ++t) row_of.push_back(rest->padded(t));

    team_.run([&](int id) {
        const int size = team_.size();
        const Share share(count, id, size);
        const uint32_t* first_qkv = module.blocks[0].qkv.first_of(id, size);
        if (fuse_features) {
            for (int t = share.first; t < share.last; ++t) {
                const bf16* from = hidden + size_t(batch.padded(t)) * hidden_stride;
                bf16* to = features_.data() + size_t(t) * feature_size();
                if (dims.draft_feature_norm)
                    for (size_t i = 0; i < feature_size(); i += width) normalize(from + i, dims.draft_rms_eps, width, to + i);
                else
                    std::memcpy(to, from, feature_size() * sizeof(bf16));
            }
            team_.barrier();
            project(fusion_, features_.data(), feature_size(), count, nullptr, fused_features_.data(), false, id, size,
                    module.fc.first_of(id, size));
            team_.barrier();
        }
        if (dims.draft_is_lm) {
            for (int t = share.first; t < share.last; ++t) {
                const bf16* row = draft_embedding_ + size_t(tokens[batch.padded(t)]) * width;
                for (int i = 0; i < width; i += kLanes) store(w.x.data() + size_t(t) * width + i, load_bf16(row + i));
            }
        } else {
            for (int t = share.first; t < share.last; ++t) {
                bf16* row = fused_.data() + size_t(t) * 2 * width;
                const int at = batch.padded(t);
                std::memcpy(row, draft_embedding_ + size_t(tokens[at]) * width, width * sizeof(bf16));
                if (fuse_features)
                    round_row(fused_features_.data() + size_t(t) * width, width, row + width);
                else
                    std::memcpy(row + width, hidden + size_t(at) * hidden_stride, width * sizeof(bf16));
            }
            team_.barrier();
            project(module.fc, fused_.data(), 2 * width, count, module.fc_bias, w.x.data(), false, id, size, first_qkv);
        }
        for (int layer = 0; layer < dims.draft_layers; ++layer) {
            const Block& block = module.blocks[layer];
            const bool final_layer = layer + 1 == dims.draft_layers;
            team_.barrier();
            for (int t = share.first; t < share.last; ++t) {
                const float* from = w.x.data() + size_t(t) * width;
                bf16* to = w.normed.data() + size_t(t) * width;
                if (block.input_norm)
                    rms_norm(from, block.input_norm, dims.draft_rms_eps, width, to);
                else
                    round_row(from, width, to);
            }
            team_.barrier();
            project(block.qkv, w.normed.data(), width, count, nullptr, w.qkv.data(), false, id, size, block.o.first_of(id, size));
            team_.barrier();
            place(draft_sizes_, w, draft_pool_, layer, batch, positions, draft_rope_, id, size);
            team_.barrier();
            if (last_only && final_layer) {
                if (id == 0)
                    for (int b = 0; b < batch.rows; ++b) {
                        const size_t from = size_t(batch.first[b + 1] - 1), q_width = draft_sizes_.q_width();
                        std::memmove(w.x.data() + size_t(b) * width, w.x.data() + from * width, width * sizeof(float));
                        std::memmove(w.q.data() + b * q_width, w.q.data() + from * q_width, q_width * sizeof(bf16));
                    }
                team_.barrier();
            }
            attention_and_mlp(draft_sizes_, block, draft_pool_, layer, final_layer ? *rest : batch, w, team_, id,
                              final_layer ? draft_head_.first_of(id, size) : module.blocks[layer + 1].qkv.first_of(id, size));
        }
        const Share mine(remaining, id, size);
        for (int t = mine.first; t < mine.last; ++t) {
            bf16* row = w.normed.data() + size_t(t) * width;
            const float* from = w.x.data() + size_t(t) * width;
            if (module.norm)
                rms_norm(from, module.norm, dims.draft_rms_eps, width, row);
            else
                round_row(from, width, row);
            std::memcpy(hidden_out + size_t(row_of[t]) * width, row, width * sizeof(bf16));
        }
        team_.barrier();
        head(draft_head_, w.normed.data(), width, remaining, logits, row_of.data(), best_[id].data(), id, size,
             blocks_[0].qkv.first_of(id, size));
        if (!ranking) return;
        team_.barrier();
        std::vector<float> maxima, copy;
        for (int t = mine.first; t < mine.last; ++t)
            rank_row(logits + size_t(row_of[t]) * dims.draft_vocab, dims.draft_vocab, ranking->width,
                     ranking->log_probs.data() + size_t(row_of[t]) * ranking->width,
                     ranking->indices.data() + size_t(row_of[t]) * ranking->width, maxima, copy);
    });
}

void Engine::draft(Batch& batch, int step, const int64_t* tokens, const int64_t* positions, const bf16* hidden, bool last_only,
                   float* logits, bf16* hidden_out) {
    run_draft(batch, step, tokens, positions, hidden, last_only, logits, hidden_out, nullptr);
}

// EAGLE-2 dynamic tree; the rules of prism_trt/speculative/tree.py, tie-breaking included.
void Engine::draft_round(Batch& batch, const int64_t* tokens, const int64_t* positions, const bf16* features, int depth, int width,
                         int size, float least, DraftTree tree) {
    struct Node {
        int parent;    // among the nodes of its row; -1 for children of the root
        int depth;
        int expanded;  // index among the in-flight entries, or -1
        int64_t token;
        float log_prob;
    };
    const int rows = batch.rows, hidden = dims.draft_hidden;
    if (width > dims.draft_vocab) throw std::runtime_error("the tree is wider than the draft vocabulary");
    Ranking ranking{width, std::vector<float>(size_t(rows) * width * width), std::vector<int>(size_t(rows) * width * width)};
    draft_logits_.resize(std::max(draft_logits_.size(), size_t(rows) * std::max(width, 1) * dims.draft_vocab));

    std::vector<bf16> outputs(size_t(rows) * width * hidden), inputs(outputs.size());
    run_draft(batch, 0, tokens, positions, features, true, draft_logits_.data(), outputs.data(), &ranking);

    std::vector<std::vector<Node>> nodes(rows);
    std::vector<std::vector<int>> level(rows);  // expanded nodes of the last level fed
    std::vector<int64_t> lengths(rows), counts(rows), root_position(rows);
    const auto draft_token = [&](int index) { return draft_vocab_.empty() ? int64_t(index) : draft_vocab_[index]; };
    for (int b = 0; b < rows; ++b) {
        const int at = b * batch.stride + int(batch.counts[b]) - 1;
        lengths[b] = batch.lengths[b] + batch.counts[b];
        root_position[b] = positions[at];
        for (int i = 0; i < width; ++i)
            nodes[b].push_back({-1, 1, -1, draft_token(ranking.indices[size_t(b) * width + i]), ranking.log_probs[size_t(b) * width + i]});
    }

    // The likeliest `most` of a row's nodes that are likely enough, best first, ties in the given order.
    const auto keep_likeliest = [&](const std::vector<Node>& n, std::vector<int>& among, int most) {
        std::stable_sort(among.begin(), among.end(), [&](int x, int y) { return n[x].log_prob > n[y].log_prob; });
        size_t kept = 0;
        while (kept < among.size() && kept < size_t(most) && n[among[kept]].log_prob >= least) ++kept;
        among.resize(kept);
    };

    std::vector<int64_t> step_tokens(size_t(rows) * width), step_positions(step_tokens.size());
    std::vector<uint8_t> mask;
    for (int k = 1; k < depth; ++k) {
        const int offset = (k - 1) * width, seen = offset + width;
        mask.assign(size_t(rows) * width * seen, 0);
        bool any = false;
        for (int b = 0; b < rows; ++b) {
            auto& n = nodes[b];
            std::vector<int> candidates;
            for (int i = int(n.size()) - 1; i >= 0 && n[i].depth == k; --i) candidates.push_back(i);
            std::reverse(candidates.begin(), candidates.end());
            keep_likeliest(n, candidates, width);
            any = any || !candidates.empty();
            for (size_t i = 0; i < candidates.size(); ++i) {
                const int node = candidates[i];
                const size_t at = size_t(b) * width + i;
                step_tokens[at] = n[node].token;
                step_positions[at] = root_position[b] + k;
                const int parent = n[node].parent;
                const size_t source = parent < 0 ? size_t(b) : size_t(b) * width + (n[parent].expanded - (k - 2) * width);
                std::memcpy(inputs.data() + at * hidden, outputs.data() + source * hidden, hidden * sizeof(bf16));
                n[node].expanded = offset + int(i);
                for (int up = node; up >= 0; up = n[up].parent) mask[at * seen + n[up].expanded] = 1;
            }
            counts[b] = int64_t(candidates.size());
            level[b] = std::move(candidates);
        }
        if (!any) break;
        Batch fed{rows, batch.slots, lengths.data(), counts.data(), width, offset, mask.data(), {}, {}, {}};
        fed.flatten();
        run_draft(fed, k, step_tokens.data(), step_positions.data(), inputs.data(), false, draft_logits_.data(), outputs.data(), &ranking);
        for (int b = 0; b < rows; ++b)
            for (size_t i = 0; i < level[b].size(); ++i) {
                const int parent = level[b][i];
                for (int c = 0; c < width; ++c) {
                    const size_t at = (size_t(b) * width + i) * width + c;
                    nodes[b].push_back({parent, k + 1, -1, draft_token(ranking.indices[at]),
                                        nodes[b][parent].log_prob + ranking.log_probs[at]});
                }
            }
    }

    std::fill(tree.mask, tree.mask + size_t(rows) * size * size, uint8_t(0));
    for (int b = 0; b < rows; ++b) {
        const auto& n = nodes[b];
        // A child's log-probability is at most its parent's and it was generated later, so this order keeps ancestors first.
        std::vector<int> order(n.size());
        std::iota(order.begin(), order.end(), 0);
        keep_likeliest(n, order, size - 1);
        tree.counts[b] = 1 + int64_t(order.size());
        std::sort(order.begin(), order.end());  // generation order is depth order
        std::vector<int> place_of(n.size(), -1);
        const size_t base = size_t(b) * size;
        tree.tokens[base] = tokens[b * batch.stride + int(batch.counts[b]) - 1];
        tree.parents[base] = tree.depths[base] = 0;
        tree.log_probs[base] = 0.0f;
        tree.mask[base * size] = 1;
        for (size_t i = 0; i < order.size(); ++i) {
            const Node& node = n[order[i]];
            const int at = int(i) + 1, parent = node.parent < 0 ? 0 : place_of[node.parent];
            place_of[order[i]] = at;
            tree.tokens[base + at] = node.token;
            tree.parents[base + at] = parent;
            tree.depths[base + at] = node.depth;
            tree.log_probs[base + at] = node.log_prob;
            uint8_t* row = tree.mask + (base + at) * size;
            std::memcpy(row, tree.mask + (base + parent) * size, size);
            row[at] = 1;
        }
    }
}

void Engine::speculate(Batch& batch, const int64_t* tokens, const int64_t* positions, const bf16* features, int depth, int width,
                       int size, float least, int64_t* out_tokens, int64_t* out_counts, int64_t* out_drafted, bf16* out_features) {
    const int rows = batch.rows, most = depth + 1;
    const size_t nodes = size_t(rows) * size;
    std::vector<int64_t> tree_tokens(nodes), parents(nodes), depths(nodes), greedy(nodes), lengths(rows), counts(rows);
    std::vector<uint8_t> mask(nodes * size);
    std::vector<float> log_probs(nodes);
    draft_round(batch, tokens, positions, features, depth, width, size, least,
                {tree_tokens.data(), parents.data(), depths.data(), counts.data(), mask.data(), log_probs.data()});

    for (int b = 0; b < rows; ++b) {
        lengths[b] = batch.lengths[b] + batch.counts[b];
        for (int i = 0; i < counts[b]; ++i) depths[size_t(b) * size + i] += lengths[b];  // positions from here on
    }
    tree_features_.resize(std::max(tree_features_.size(), nodes * feature_size()));
    Batch tree{rows, batch.slots, lengths.data(), counts.data(), size, 0, mask.data(), {}, {}, {}};
    tree.flatten();
    forward(tree, tree_tokens.data(), depths.data(), 2, tree_features_.data(), nullptr, greedy.data());

    std::vector<int64_t> path(size_t(rows) * most), path_lengths(rows);
    for (int b = 0; b < rows; ++b) {
        const size_t base = size_t(b) * size;
        // Siblings hold different tokens, so at most one child of an accepted node is accepted.
        int64_t* accepted = path.data() + size_t(b) * most;
        int64_t last = 0, count = 1;
        accepted[0] = 0;
        for (int i = 1; i < counts[b]; ++i)
            if (parents[base + i] == last && tree_tokens[base + i] == greedy[base + last]) accepted[count++] = last = i;
        path_lengths[b] = out_counts[b] = count;
        out_drafted[b] = counts[b] - 1;
        for (int64_t j = 0; j < count; ++j) {
            const size_t node = base + size_t(accepted[j]), to = size_t(b) * most + size_t(j);
            out_tokens[to] = j + 1 < count ? tree_tokens[base + size_t(accepted[j + 1])] : greedy[node];
            std::memcpy(out_features + to * feature_size(), tree_features_.data() + node * feature_size(), feature_size() * sizeof(bf16));
        }
    }
    commit(rows, batch.slots, lengths.data(), path.data(), path_lengths.data(), most);
}

}  // namespace prism

// C interface, called by prism_trt/engines/cpu/library.py. Functions return 0, or -1 with a message in prism_error().
namespace {

thread_local std::string error_message;

template <typename Function>
int guarded(Function&& function) {
    try {
        function();
        return 0;
    } catch (const std::exception& error) {
        error_message = error.what();
        return -1;
    }
}

prism::Batch batch_of(int rows, const int64_t* slots, const int64_t* lengths, const int64_t* counts, int stride, int offset,
                      const uint8_t* mask) {
    prism::Batch batch{rows, slots, lengths, counts, stride, offset, mask, {}, {}, {}};
    batch.flatten();
    return batch;
}

}  // namespace

extern "C" {

const char* prism_error() { return error_message.c_str(); }

const char* prism_isa() {
#if defined(__AVX512BF16__)
    return "avx512-bf16";
#elif defined(__AVX512F__)
    return "avx512";
#elif defined(__AVX2__) && defined(__FMA__)
    return "avx2";
#else
    return "generic";
#endif
}

prism::Engine* prism_open(const prism::Dims* dims, const int32_t* step_map, int steps, const int32_t* feature_layers, int features,
                          const int64_t* draft_vocab, const char* path) {
    prism::Engine* engine = nullptr;
    guarded([&] { engine = new prism::Engine(*dims, step_map, steps, feature_layers, features, draft_vocab, path); });
    return engine;
}

void prism_close(prism::Engine* engine) { delete engine; }

int prism_forward(prism::Engine* engine, int rows, const int64_t* slots, const int64_t* lengths, const int64_t* counts, int stride,
                  int offset, const uint8_t* mask, const int64_t* tokens, const int64_t* positions, int logits_for,
                  uint16_t* features, float* logits, int64_t* greedy) {
    return guarded([&] {
        prism::Batch batch = batch_of(rows, slots, lengths, counts, stride, offset, mask);
        engine->forward(batch, tokens, positions, logits_for, features, logits, greedy);
    });
}

int prism_commit(prism::Engine* engine, int rows, const int64_t* slots, const int64_t* lengths, const int64_t* accepted,
                 const int64_t* counts, int stride) {
    return guarded([&] { engine->commit(rows, slots, lengths, accepted, counts, stride); });
}

int prism_copy_prefix(prism::Engine* engine, int from, int to, int length) {
    return guarded([&] { engine->copy_prefix(from, to, length); });
}

int prism_draft(prism::Engine* engine, int rows, const int64_t* slots, const int64_t* lengths, const int64_t* counts, int stride,
                int offset, const uint8_t* mask, const int64_t* tokens, const int64_t* positions, int step, const uint16_t* hidden,
                int last_only, float* logits, uint16_t* hidden_out) {
    return guarded([&] {
        prism::Batch batch = batch_of(rows, slots, lengths, counts, stride, offset, mask);
        engine->draft(batch, step, tokens, positions, hidden, last_only != 0, logits, hidden_out);
    });
}

int prism_draft_round(prism::Engine* engine, int rows, const int64_t* slots, const int64_t* lengths, const int64_t* counts,
                      int stride, const int64_t* tokens, const int64_t* positions, const uint16_t* features, int depth, int width,
                      int size, int64_t* tree_tokens, int64_t* tree_parents, int64_t* tree_depths, uint8_t* tree_mask,
                      float* tree_log_probs) {
    return guarded([&] {
        prism::Batch batch = batch_of(rows, slots, lengths, counts, stride, 0, nullptr);
        std::vector<int64_t> full(rows);
        engine->draft_round(batch, tokens, positions, features, depth, width, size, -INFINITY,
                            {tree_tokens, tree_parents, tree_depths, full.data(), tree_mask, tree_log_probs});
    });
}

int prism_speculate(prism::Engine* engine, int rows, const int64_t* slots, const int64_t* lengths, const int64_t* counts,
                    int stride, const int64_t* tokens, const int64_t* positions, const uint16_t* features, int depth, int width,
                    int size, float least_probability, int64_t* out_tokens, int64_t* out_counts, int64_t* out_drafted,
                    uint16_t* out_features) {
    return guarded([&] {
        prism::Batch batch = batch_of(rows, slots, lengths, counts, stride, 0, nullptr);
        engine->speculate(batch, tokens, positions, features, depth, width, size, std::log(least_probability), out_tokens, out_counts,
                          out_drafted, out_features);
    });
}

}  // extern "C"
