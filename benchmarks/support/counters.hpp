// SPDX-License-Identifier: MIT
/// @file
/// The rates that benchmarks report. report.py knows them by these names.
#pragma once

#include <benchmark/benchmark.h>
#include <cstddef>

namespace bench {

inline void set_rate(benchmark::State& state, const char* name, double amount_per_iteration) {
    state.counters[name] =
        benchmark::Counter(amount_per_iteration * static_cast<double>(state.iterations()), benchmark::Counter::kIsRate);
}
/// Floating-point operations, two for each multiply-add.
inline void set_flops(benchmark::State& state, double per_iteration) {
    set_rate(state, "flops", per_iteration);
}
inline void set_vectors(benchmark::State& state, std::size_t per_iteration) {
    set_rate(state, "vectors", static_cast<double>(per_iteration));
}
inline void set_bytes(benchmark::State& state, std::size_t per_iteration) {
    set_rate(state, "bytes", static_cast<double>(per_iteration));
}
inline void set_tokens(benchmark::State& state, std::size_t per_iteration) {
    set_rate(state, "tokens", static_cast<double>(per_iteration));
}

}  // namespace bench
