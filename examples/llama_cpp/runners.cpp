// SPDX-License-Identifier: MIT
#include "runners.hpp"

#include "plain_cache.hpp"
#include "plain_model.hpp"

namespace llama_example {
namespace {

/// llama.cpp's own cache, for one window.
void read_with(const cache_format& cache, const loaded_model& model, const std::vector<llama_token>& window,
               const rvqkv::executor& workers, const decoder::logits_callback& on_logits) {
    decoder own(model, cache, window.size(), static_cast<int>(workers.concurrency()), nullptr);
    own.read(window, on_logits);
}

class llama_runner : public runner {
public:
    llama_runner(const loaded_model& model, const model_attention& attention, std::size_t tokens,
                 const rvqkv::executor& workers)
        : model_(&model),
          workers_(&workers),
          tap_(attention, tokens, workers),
          exact_(model, {}, tokens, static_cast<int>(workers.concurrency()), &tap_) {}

    double read(const method* by, const std::vector<llama_token>& window,
                const decoder::logits_callback& on_logits) override {
        if (by != nullptr && by->cache) {
            read_with(*by->cache, *model_, window, *workers_, on_logits);
            return 0.0;
        }
        if (by == nullptr) {
            tap_.use(nullptr, {});
        } else {
            tap_.use(&by->codecs, by->exact);
        }
        const double before = tap_.seconds();
        exact_.read(window, on_logits);
        return tap_.seconds() - before;
    }

private:
    const loaded_model* model_;
    const rvqkv::executor* workers_;
    quantizing_tap tap_;
    decoder exact_;
};

class plain_runner : public runner {
public:
    plain_runner(const loaded_model& model, const rvqkv::executor& workers)
        : llama_(&model),
          workers_(&workers),
          share_out_([&workers](std::size_t tasks, const std::function<void(std::size_t)>& task) {
              rvqkv::parallel_for(workers, tasks, task);
          }),
          model_(model.path()) {}

    double read(const method* by, const std::vector<llama_token>& window,
                const decoder::logits_callback& on_logits) override {
        if (by == nullptr) {
            exact_attention attention(model_.shape(), share_out_);
            model_.read(window, attention, on_logits, share_out_);
            return 0.0;
        }
        if (by->cache) {
            read_with(*by->cache, *llama_, window, *workers_, on_logits);
            return 0.0;
        }
        cached_attention attention(model_.shape(), by->codecs, by->exact, *workers_);
        model_.read(window, attention, on_logits, share_out_);
        return attention.seconds();
    }

private:
    const loaded_model* llama_;
    const rvqkv::executor* workers_;
    plain_workers share_out_;
    plain_model model_;
};

}  // namespace

std::unique_ptr<runner> make_runner(engine_kind engine, const loaded_model& model, const model_attention& attention,
                                    std::size_t tokens, const rvqkv::executor& workers) {
    if (engine == engine_kind::plain) {
        return std::make_unique<plain_runner>(model, workers);
    }
    return std::make_unique<llama_runner>(model, attention, tokens, workers);
}

}  // namespace llama_example
