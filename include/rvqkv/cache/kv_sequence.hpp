// SPDX-License-Identifier: MIT
/// @file
/// One conversation in a cache: the keys and values of its tokens, which stream in, fork, roll back, shift and age.
#pragma once

#include "rvqkv/attend/layer_config.hpp"
#include "rvqkv/attend/page_layout.hpp"
#include "rvqkv/cache/append_job.hpp"
#include "rvqkv/cache/cache_bytes.hpp"
#include "rvqkv/cache/cache_core.hpp"
#include "rvqkv/cache/cache_layer.hpp"
#include "rvqkv/cache/kv_workspace.hpp"
#include "rvqkv/cache/layer_tokens.hpp"
#include "rvqkv/cache/page_stock.hpp"
#include "rvqkv/cache/run_list.hpp"
#include "rvqkv/cache/writer_flag.hpp"
#include "rvqkv/core/config.hpp"
#include "rvqkv/core/error.hpp"
#include "rvqkv/core/nothrow_array.hpp"
#include "rvqkv/core/parallel_for.hpp"
#include "rvqkv/core/tensor_view.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <utility>

RVQKV_NAMESPACE_BEGIN
namespace detail {
struct sequence_access;  // what files see of a sequence
}

/// The tokens of one sequence, for every layer of a cache's model.
///
/// A layer's tokens lie in pages. The first `sink_tokens` tokens stay exact (16 bits a number); each later page becomes
/// codes, as a whole, when it is full and `recent_tokens` tokens are younger than all of its own. Pages of codes never
/// change and may be shared; an exact page that is shared is copied before it is written to. What a sequence holds
/// follows from its tokens and from what was rolled back, never from how appends were split.
///
/// Every token has an index, `0` to `tokens(layer) - 1`, and a position, as rotary embedding counts. They are the same
/// until `evict` takes tokens out of the middle.
///
/// Threads: any number of readers (`const` functions) at once, each with a workspace of its own, while nobody writes;
///          one writer at a time, which debug builds check. Sequences are independent of each other, forks too: any
///          number may be written to at the same time.
/// Errors:  an operation that fails leaves the sequence as it was, and gives back all pages that it took. A sequence
///          that was moved from refuses every operation.
class kv_sequence {
public:
    /// Every depth that a page has.
    static constexpr std::size_t all_depths = detail::layer_tokens::all_depths;

    kv_sequence(kv_sequence&& other) noexcept = default;
    kv_sequence& operator=(kv_sequence&& other) noexcept {
        if (this != &other) {
            const kv_sequence old(std::move(*this));
            core_ = std::move(other.core_);
            layers_ = std::move(other.layers_);
            stock_ = std::move(other.stock_);
        }
        return *this;
    }

    /// Layers of the model; none after a move.
    [[nodiscard]] std::size_t layers() const noexcept { return layers_.size(); }
    /// Tokens that a layer holds, or the layer whose cache it shares. Precondition: `layer < layers()`.
    [[nodiscard]] std::size_t tokens(std::size_t layer) const noexcept { return held(layer).tokens; }
    /// Index of the first token that a layer's sliding window has not let go of. Precondition: `layer < layers()`.
    [[nodiscard]] std::size_t first_token(std::size_t layer) const noexcept { return held(layer).dropped; }
    /// Position that a layer's next token will have. Precondition: `layer < layers()`.
    [[nodiscard]] std::int64_t next_position(std::size_t layer) const noexcept { return held(layer).next_position(); }
    /// A layer's tokens from `first_token` on, page by page, for code that reads them as they are stored; valid until
    /// the next write. What a page says of tokens outside its runs is unspecified, but for this: codes are below
    /// `codewords`, and numbers are finite. Precondition: `layer < layers()`.
    [[nodiscard]] std::span<const page_run> runs(std::size_t layer) const noexcept { return held(layer).runs.runs(); }
    /// Precondition: `layer < layers()`.
    [[nodiscard]] const kv_layer_config& layer_config(std::size_t layer) const noexcept {
        return core_->layer(layer).config();
    }

    /// Takes a layer's next tokens.
    /// Shapes:     `keys` `[token, head, head_dim]` and `values` `[token, head, head_dim]`, each with the heads and
    ///             head_dim of its side, both with the same number of tokens; any element type and strides. No tokens:
    ///             shapes are checked, nothing else is done.
    /// Errors:     `invalid_argument` for a layer or shape that does not fit, and for a layer that has no cache or
    ///             shares another's; `out_of_memory`. The sequence, and `report`, are as they were then. NaNs and
    ///             infinities are stored as 0, and counted in `report` if one is given; numbers beyond the range of the
    ///             cache's exact type become its largest.
    /// Threads:    none of its own; with `workers`, pages that become codes are split over them.
    /// Complexity: a copy of the tokens, and `codec::encode` of those that become codes; the tokens held do not count.
    ///             After `reserve`, and with a workspace from `kv_cache::make_workspace` for these workers, nothing is
    ///             allocated, given codecs that ask no more of a `quantizer_workspace` than `vector_quantizer` does.
    /// Numerics:   what becomes codes was rounded to the exact type before, so codes are the same however appends are
    ///             split, with any workers and at every SIMD level.
    [[nodiscard]] status append(std::size_t layer, const tensor_view& keys, const tensor_view& values,
                                kv_workspace& workspace, kv_encode_report* report = nullptr,
                                const executor& workers = serial_executor()) {
        const detail::writer_guard guard(writing_);
        if (status bad = check_writable(layer); !bad) {
            return bad;
        }
        const detail::cache_layer& shared = core_->layer(layer);
        if (status bad = shared.keys().check(keys.shape()); !bad) {
            return bad;
        }
        if (status bad = shared.values().check(values.shape()); !bad) {
            return bad;
        }
        if (keys.tokens() != values.tokens()) {
            return shared.values().wrong("tokens is " + std::to_string(values.tokens()) + ", must be the keys' " +
                                         std::to_string(keys.tokens()));
        }
        detail::layer_tokens& held = layers_[layer];
        if (keys.tokens() == 0) {
            return {};
        }
        if (keys.tokens() > std::numeric_limits<std::size_t>::max() - held.tokens) {
            return out_of_memory();
        }
        detail::append_job job(shared, held, keys, values);
        if (status planned = job.plan(); !planned) {
            return planned;
        }
        if (status done = job.take_pages(stock_); !done) {
            return done;
        }
        if (status done = job.work(workspace, workers); !done) {
            job.cancel(stock_);
            return done;
        }
        // What the window had let go of before: the first of the new tokens still sees the rest.
        const std::size_t unseen = std::min(job.kept(), held.runs_behind_window(shared));
        job.commit(stock_);
        held.drop_runs(unseen, stock_);
        if (report != nullptr) {
            report->keys.add(job.found().keys);
            report->values.add(job.found().values);
        }
        return {};
    }

    /// Reconstructs keys `[first_token, first_token + out.tokens())` of a layer, as they would be given at their
    /// present positions: turned if the layer's input is turned.
    /// Shapes:     `out` `[token, head, head_dim]`, any element type and strides; no tokens is a range, too.
    /// Errors:     `invalid_argument` for a layer, range, shape or number of depths that the cache does not have, and
    ///             for tokens that have left the sliding window; `out_of_memory` when the workspace cannot grow.
    /// Complexity: as `codec::decode`, and a copy of the codes; bytes of depths not asked for are not read.
    /// Numerics:   as `codec::decode`, whatever the range; exact tokens are what was given, rounded to the exact type,
    ///             whatever `depths` is. A page of fewer depths gives what it has.
    [[nodiscard]] status reconstruct_keys(std::size_t layer, std::size_t first_token, const mutable_tensor_view& out,
                                          kv_workspace& workspace, std::size_t depths = all_depths) const {
        return reconstruct(layer, true, first_token, out, depths, workspace);
    }
    /// Reconstructs values; the rest as `reconstruct_keys`.
    [[nodiscard]] status reconstruct_values(std::size_t layer, std::size_t first_token, const mutable_tensor_view& out,
                                            kv_workspace& workspace, std::size_t depths = all_depths) const {
        return reconstruct(layer, false, first_token, out, depths, workspace);
    }

    /// Attention of a layer's newest tokens over all that it holds, codes read as they are.
    /// Shapes:     `queries` `[token, query head, head_dim]`, those of the layer's last tokens, which have been
    ///             appended; `out` `[token, query head, head_dim of the values]`; any types and strides. Queries are
    ///             turned like the keys: after rotary embedding if the layer's `turned_input` says so.
    /// Errors:     `invalid_argument` for a layer without attention, other shapes, more queries than tokens, or options
    ///             that do not fit; `out_of_memory` when the workspace cannot grow (one from
    ///             `kv_cache::make_attention_workspace` need not). Nothing is written then.
    /// Threads:    a reader; none of its own. KV heads are shared out over `workers`.
    /// Numerics:   as `layer_attention::attend`.
    [[nodiscard]] status attend(std::size_t layer, const tensor_view& queries, const mutable_tensor_view& out,
                                attention_workspace& workspace, const attention_options& options = {},
                                const executor& workers = serial_executor()) const {
        if (status bad = check_queries(layer, queries.tokens()); !bad) {
            return bad;
        }
        return in_layer(layer, core_->layer(layer).attention()->attend(
                                   runs(layer), queries, next_position(layer) - signed_count(queries.tokens()), out,
                                   workspace, options, workers));
    }
    /// The same for an engine that merges it with attention over other tokens (`merge_partial`): also gives each
    /// query's logarithm of the sum of exp(score). Shapes: `log_sum_exp` `[token, query head]`.
    [[nodiscard]] status attend_partial(std::size_t layer, const tensor_view& queries, const mutable_tensor_view& out,
                                        std::span<float> log_sum_exp, attention_workspace& workspace,
                                        const attention_options& options = {},
                                        const executor& workers = serial_executor()) const {
        if (status bad = check_queries(layer, queries.tokens()); !bad) {
            return bad;
        }
        return in_layer(layer, core_->layer(layer).attention()->attend_partial(
                                   runs(layer), queries, next_position(layer) - signed_count(queries.tokens()), out,
                                   log_sum_exp, workspace, options, workers));
    }

    /// Another sequence with the same tokens, which shares all pages with this one.
    /// Errors: `out_of_memory`. Complexity: O(pages). Threads: a reader.
    [[nodiscard]] result<kv_sequence> fork() const {
        if (!core_) {
            return moved_from();
        }
        auto made = create(core_);
        for (std::size_t i = 0; made.ok() && i < layers_.size(); ++i) {
            auto runs = layers_[i].runs.share(detail::append_job::more_runs);
            if (!runs) {
                return runs.error();
            }
            detail::layer_tokens& copy = made.value().layers_[i];
            copy.runs = std::move(runs).value();
            copy.tokens = layers_[i].tokens;
            copy.dropped = layers_[i].dropped;
        }
        return made;
    }

    /// Drops a layer's tokens from index `tokens` on.
    /// Errors:     `invalid_argument` when the layer does not hold as many, and when its sliding window has let go of
    ///             tokens that the next one must see.
    /// Complexity: O(pages dropped).
    [[nodiscard]] status truncate(std::size_t layer, std::size_t tokens) {
        const detail::writer_guard guard(writing_);
        if (status bad = check_writable(layer); !bad) {
            return bad;
        }
        if (status bad = layers_[layer].check_truncate(core_->layer(layer), tokens); !bad) {
            return bad;
        }
        layers_[layer].truncate(tokens, stock_);
        return {};
    }
    /// The same for all layers, which may hold more tokens in some than in others (as in the middle of a model's pass).
    /// Errors: as above when it fails for one layer; none is truncated then.
    [[nodiscard]] status truncate(std::size_t tokens) {
        const detail::writer_guard guard(writing_);
        if (!core_) {
            return moved_from();
        }
        for (std::size_t i = 0; i < layers(); ++i) {
            if (owns(i)) {
                if (status bad = layers_[i].check_truncate(core_->layer(i), tokens); !bad) {
                    return bad;
                }
            }
        }
        for (std::size_t i = 0; i < layers(); ++i) {
            if (owns(i)) {
                layers_[i].truncate(tokens, stock_);
            }
        }
        return {};
    }
    /// Drops all tokens; pages go back to the cache, but for those that `reserve` keeps.
    void clear() noexcept {
        const detail::writer_guard guard(writing_);
        for (detail::layer_tokens& held : layers_) {
            held.truncate(0, stock_);
        }
    }

    /// Drops tokens `[first, last)` of all layers. With `shift`, all later tokens' positions move down by as many; else
    /// they stay, and a gap is left. Dropping the last tokens is truncating: no gap is left then.
    /// Errors:     `invalid_argument` for a range that a layer does not hold, and when a sliding window has let go of
    ///             tokens that the next one must see then; `out_of_memory`.
    /// Complexity: O(pages). Numerics: positions shift without loss, whatever the layer's coding.
    [[nodiscard]] status evict(std::size_t first, std::size_t last, bool shift = true) {
        const detail::writer_guard guard(writing_);
        if (!core_) {
            return moved_from();
        }
        for (std::size_t i = 0; i < layers(); ++i) {
            if (!owns(i)) {
                continue;
            }
            if (status bad = layers_[i].check_evict(core_->layer(i), first, last, shift); !bad) {
                return bad;
            }
            detail::run_list& runs = layers_[i].runs;
            if (status grown = runs.reserve(runs.size() + 2); !grown) {
                return grown;
            }
        }
        for (std::size_t i = 0; i < layers(); ++i) {
            if (owns(i) && first != last) {
                layers_[i].evict(core_->layer(i), first, last, shift, stock_);
            }
        }
        return {};
    }

    /// Makes pages of codes whose tokens all have an index below `tokens_before` hold no more than so many depths: what
    /// they hold of the others is dropped, nothing is encoded again.
    /// Errors:     `invalid_argument` for no depths; `out_of_memory`: new pages are taken before old ones are given
    ///             back, so where memory is short, let `tokens_before` grow little by little.
    /// Complexity: a copy of what stays. A page that others share stays theirs as it is.
    [[nodiscard]] status demote(std::size_t tokens_before, std::size_t key_depths, std::size_t value_depths) {
        const detail::writer_guard guard(writing_);
        if (status bad = check_depths(key_depths, value_depths); !bad) {
            return bad;
        }
        auto lists = detail::nothrow_array<detail::run_list>::allocate(layers());
        if (!lists) {
            return lists.error();
        }
        for (std::size_t i = 0; i < layers(); ++i) {
            const detail::run_list& runs = layers_[i].runs;
            auto copy = runs.share(runs.capacity() - runs.size());
            if (!copy) {
                return copy.error();
            }
            lists.value()[i] = std::move(copy).value();
            if (status done =
                    layers_[i].demote(core_->layer(i), lists.value()[i], tokens_before, key_depths, value_depths);
                !done) {
                return done;
            }
        }
        for (std::size_t i = 0; i < layers(); ++i) {
            std::swap(layers_[i].runs, lists.value()[i]);
        }
        return {};
    }
    /// Demotes as few of the oldest pages as bring `bytes().total()` down to `most_bytes`, all layers alike, and says
    /// which tokens they are before; 0 if none had to be.
    /// Errors: as above; `invalid_argument` when even demoting all pages would not do, and none is demoted then.
    [[nodiscard]] result<std::size_t> demote_to(std::size_t most_bytes, std::size_t key_depths,
                                                std::size_t value_depths) {
        if (status bad = check_depths(key_depths, value_depths); !bad) {
            return bad.error();
        }
        const std::size_t total = bytes().total();
        if (total <= most_bytes) {
            return std::size_t{0};
        }
        std::size_t end = 0;
        for (const detail::layer_tokens& held : layers_) {
            end = std::max(end, held.tokens);
        }
        if (const std::size_t least = total - saved_bytes(end, key_depths, value_depths); least > most_bytes) {
            return error{error_code::invalid_argument, "most_bytes is " + std::to_string(most_bytes) + ", with " +
                                                           std::to_string(key_depths) + " and " +
                                                           std::to_string(value_depths) +
                                                           " depths the sequence takes " + std::to_string(least)};
        }
        // The least number that does: what is saved grows with it.
        std::size_t begin = 0;
        while (begin + 1 < end) {
            const std::size_t middle = begin + (end - begin) / 2;
            (total - saved_bytes(middle, key_depths, value_depths) <= most_bytes ? end : begin) = middle;
        }
        if (status done = demote(end, key_depths, value_depths); !done) {
            return done.error();
        }
        return end;
    }

    /// Makes room for `tokens` tokens in all, in every layer, and keeps it: pages that the sequence lets go of stay its
    /// own from now on, until `release_spare_pages`. Appends (to layers with a sliding window: of up to `page_tokens`
    /// tokens) allocate nothing until then; each rollback into a page of codes may need one page more.
    /// Errors: `out_of_memory`. Complexity: O(pages held and new).
    [[nodiscard]] status reserve(std::size_t tokens) {
        const detail::writer_guard guard(writing_);
        if (!core_) {
            return moved_from();
        }
        for (std::size_t i = 0; i < layers(); ++i) {
            detail::run_list& runs = layers_[i].runs;
            const std::size_t more =
                layers_[i].needs(core_->layer(i), tokens).total() + 2 * detail::append_job::more_runs;
            if (status grown = owns(i) ? runs.reserve(runs.size() + more) : status{}; !grown) {
                return grown;
            }
        }
        for (std::size_t i = 0; i < layers(); ++i) {
            const detail::cache_layer& layer = core_->layer(i);
            const detail::page_needs needs = layers_[i].needs(layer, tokens);
            stock_.want(layer.sinks(), needs.sinks);
            stock_.want(layer.exact(), needs.exact);
            stock_.want(layer.coded(), needs.coded);
            // An append fills new exact pages before it lets go of the old ones; layers take turns at that.
            if (layer.has_tokens()) {
                stock_.want_at_once(layer.exact(), layer.most_exact());
            }
        }
        return stock_.fill();
    }
    /// Gives the pages that `reserve` has taken and that hold no token back to the cache, and keeps none from now on.
    void release_spare_pages() noexcept {
        const detail::writer_guard guard(writing_);
        stock_.clear();
    }

    /// Memory that the sequence refers to, by what it is for. Complexity: O(pages).
    [[nodiscard]] kv_sequence_bytes bytes() const noexcept {
        kv_sequence_bytes bytes;
        bytes.page_tables = layers_.bytes() + stock_.table_bytes();
        bytes.spare = stock_.page_bytes();
        for (const detail::layer_tokens& held : layers_) {
            held.add_to(bytes);
        }
        return bytes;
    }

private:
    friend class kv_cache;
    friend struct detail::sequence_access;

    explicit kv_sequence(detail::core_handle core) noexcept : core_(std::move(core)) {}
    [[nodiscard]] static result<kv_sequence> create(detail::core_handle core) {
        kv_sequence made(std::move(core));
        auto layers = detail::nothrow_array<detail::layer_tokens>::allocate(made.core_->layers());
        auto stock = detail::page_stock::create(made.core_->sizes());
        if (!layers || !stock) {
            return out_of_memory();
        }
        made.layers_ = std::move(layers).value();
        made.stock_ = std::move(stock).value();
        return made;
    }

    [[nodiscard]] static error out_of_memory() { return {error_code::out_of_memory, "out of memory"}; }
    [[nodiscard]] static error moved_from() {
        return {error_code::invalid_argument, "the sequence was moved from: it has no cache any more"};
    }
    [[nodiscard]] const detail::layer_tokens& held(std::size_t layer) const noexcept {
        return layers_[core_->layer(layer).owner()];
    }
    [[nodiscard]] bool owns(std::size_t layer) const noexcept { return core_->layer(layer).has_tokens(); }

    [[nodiscard]] status check_layer(std::size_t layer) const {
        if (!core_) {
            return moved_from();
        }
        if (layer >= layers()) {
            return error{error_code::invalid_argument,
                         "layer is " + std::to_string(layer) + ", the cache has " + std::to_string(layers())};
        }
        if (!owns(core_->layer(layer).owner())) {
            return core_->layer(layer).wrong(" has no cache: it was configured without heads");
        }
        return {};
    }
    [[nodiscard]] static std::int64_t signed_count(std::size_t tokens) noexcept {
        return static_cast<std::int64_t>(tokens);
    }
    [[nodiscard]] status check_queries(std::size_t layer, std::size_t queries) const {
        if (status bad = check_layer(layer); !bad) {
            return bad;
        }
        if (core_->layer(layer).attention() == nullptr) {
            return core_->layer(layer).wrong(": attention needs as many heads of values as of keys");
        }
        if (queries > tokens(layer)) {
            return core_->layer(layer).wrong(": " + std::to_string(queries) + " queries are more than the " +
                                             std::to_string(tokens(layer)) + " tokens: append theirs first");
        }
        return {};
    }
    /// Says in which layer something went wrong.
    [[nodiscard]] status in_layer(std::size_t layer, status outcome) const {
        if (outcome.ok() || outcome.error().code == error_code::out_of_memory) {
            return outcome;
        }
        return core_->layer(layer).wrong(": " + outcome.error().message);
    }
    [[nodiscard]] status check_writable(std::size_t layer) const {
        if (status bad = check_layer(layer); !bad) {
            return bad;
        }
        if (const std::size_t owner = core_->layer(layer).owner(); owner != layer) {
            return core_->layer(layer).wrong(" shares the cache of layer " + std::to_string(owner) +
                                             ": write to that one");
        }
        return {};
    }
    [[nodiscard]] status check_depths(std::size_t key_depths, std::size_t value_depths) const {
        if (!core_) {
            return moved_from();
        }
        if (key_depths == 0 || value_depths == 0) {
            return error{error_code::invalid_argument,
                         std::string(key_depths == 0 ? "key_depths" : "value_depths") + " is 0, must be at least 1"};
        }
        return {};
    }

    [[nodiscard]] status reconstruct(std::size_t layer, bool is_keys, std::size_t first, const mutable_tensor_view& out,
                                     std::size_t depths, kv_workspace& workspace) const {
        if (status bad = check_layer(layer); !bad) {
            return bad;
        }
        return held(layer).read(core_->layer(core_->layer(layer).owner()), is_keys, first, out, depths, workspace);
    }

    [[nodiscard]] std::size_t saved_bytes(std::size_t before, std::size_t key_depths,
                                          std::size_t value_depths) const noexcept {
        std::size_t saved = 0;
        for (std::size_t i = 0; i < layers(); ++i) {
            saved += layers_[i].saved_bytes(core_->layer(i), before, key_depths, value_depths);
        }
        return saved;
    }

    detail::core_handle core_;  // outlives the pages
    detail::nothrow_array<detail::layer_tokens> layers_;
    detail::page_stock stock_;
    detail::writer_flag writing_;
};

RVQKV_NAMESPACE_END
