// SPDX-License-Identifier: MIT
/// @file
/// The module: how failures become exceptions, how many threads work, and the parts.
#include "common.hpp"

#include <rvqkv/core/thread_pool.hpp>

#include <nanobind/stl/string.h>

#include <exception>
#include <mutex>
#ifdef __linux__
#include <sched.h>
#endif

namespace py {
namespace {

std::mutex pool_mutex;
std::shared_ptr<const rvqkv::thread_pool> pool;

/// Cores that this process may run on, which may be fewer than the machine has; 0: ask the library.
std::size_t usable_cores() {
#ifdef __linux__
    cpu_set_t cores;
    if (sched_getaffinity(0, sizeof(cores), &cores) == 0) {
        return static_cast<std::size_t>(CPU_COUNT(&cores));
    }
#endif
    return 0;
}

void set_threads(std::size_t threads) {
    auto made = std::make_shared<const rvqkv::thread_pool>(threads == 0 ? usable_cores() : threads);
    const std::lock_guard lock(pool_mutex);
    pool.swap(made);  // the old one ends with its last user
}

PyObject* exception_type(rvqkv::error_code code) {
    switch (code) {
        case rvqkv::error_code::unsupported: return PyExc_NotImplementedError;
        case rvqkv::error_code::out_of_memory: return PyExc_MemoryError;
        case rvqkv::error_code::io: return PyExc_OSError;
        case rvqkv::error_code::invalid_argument:
        case rvqkv::error_code::damaged_file: break;
    }
    return PyExc_ValueError;
}

}  // namespace

std::shared_ptr<const rvqkv::executor> workers() {
    const std::lock_guard lock(pool_mutex);
    if (pool == nullptr) {
        pool = std::make_shared<const rvqkv::thread_pool>(usable_cores());
    }
    return pool;
}

}  // namespace py

NB_MODULE(_rvqkv, module) {
    namespace nb = nanobind;
    module.doc() = "Residual vector quantization of key/value caches: the C++ library, as Python sees it.";
    module.attr("version") = RVQKV_VERSION_STRING;
    nb::set_leak_warnings(false);  // what a program still holds when it ends is no leak
    nb::register_exception_translator([](const std::exception_ptr& thrown, void*) {
        try {
            std::rethrow_exception(thrown);
        } catch (const rvqkv::exception& failure) {
            PyErr_SetString(py::exception_type(failure.code()), failure.what());
        }
    });
    module.def(
        "set_threads", [](std::size_t threads) { py::without_lock([&] { py::set_threads(threads); }); },
        nb::arg("threads"), "Threads that the library's calls use from now on; 0: as many as the machine has.");
    module.def(
        "threads", [] { return py::workers()->concurrency(); }, "Threads that the library's calls use.");
    module.def(
        "simd_level", [] { return std::string(rvqkv::name_of(rvqkv::choose_simd_level().value())); },
        "The instruction set in use, which the environment variable RVQKV_SIMD can lower.");
    py::bind_codec(module);
    py::bind_learn(module);
    py::bind_files(module);
    py::bind_cache(module);
}
