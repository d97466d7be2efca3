// SPDX-License-Identifier: MIT
/// @file
/// Runs a fuzz target without libFuzzer.
///   fuzz_X_replay                      its seeds, every truncation and flipped bit of them, and random damage
///   fuzz_X_replay FILE_OR_FOLDER...    these inputs
///   fuzz_X_replay --seeds FOLDER       writes the seeds there, for libFuzzer to start from
/// `RVQKV_TEST_SEED` changes the random damage, `RVQKV_TEST_SIZE` its amount (in percent).
#include "fuzz_target.hpp"
#include "support/random.hpp"
#include "support/temp_dir.hpp"

#include <algorithm>
#include <cstring>
#include <exception>
#include <filesystem>
#include <memory>
#include <string_view>

namespace {

std::size_t runs = 0;

void run(std::string_view input) {
    // A block of exactly this size, so that a sanitizer sees a byte read beyond it.
    const std::unique_ptr<std::uint8_t[]> block(new std::uint8_t[input.size()]);
    std::copy(input.begin(), input.end(), block.get());
    static_cast<void>(LLVMFuzzerTestOneInput(block.get(), input.size()));
    ++runs;
}

void run_path(const std::filesystem::path& path) {
    if (!std::filesystem::is_directory(path)) {
        run(test::read_file(path.string()));
        return;
    }
    for (const auto& entry : std::filesystem::directory_iterator(path)) {
        run_path(entry.path());
    }
}

/// A few bytes changed, removed, repeated or taken from another seed.
std::string damaged(std::string input, const std::string& other, test::random_source& random) {
    for (std::size_t change = random.integer(1, 4); change > 0 && !input.empty(); --change) {
        const std::size_t at = random.integer(0, input.size() - 1);
        const std::size_t length = random.integer(1, std::min<std::size_t>(input.size() - at, 16));
        switch (random.integer(0, 4)) {
            case 0: input[at] = static_cast<char>(random.integer(0, 255)); break;
            case 1: input[at] = "0123456789-.,:[]{}'\"\\<>"[random.integer(0, 22)]; break;
            case 2: input.erase(at, length); break;
            case 3: input.insert(at, std::string(input, at, length)); break;
            default: input.replace(at, length, other, std::min(at, other.size()), length); break;
        }
    }
    return input;
}

void run_seeds() {
    const std::vector<std::string> seeds = fuzz_seeds();
    for (const std::string& seed : seeds) {
        for (std::size_t length = 0; length <= seed.size(); ++length) {
            run(std::string_view(seed).substr(0, length));
        }
        std::string flipped = seed;
        for (std::size_t bit = 0; bit < seed.size() * 8; ++bit) {
            flipped[bit / 8] = static_cast<char>(flipped[bit / 8] ^ (1 << (bit % 8)));
            run(flipped);
            flipped[bit / 8] = seed[bit / 8];
        }
    }
    test::random_source random;
    for (std::size_t round = test::rounds(200000, 2000); round > 0; --round) {
        const std::string& seed = seeds[random.integer(0, seeds.size() - 1)];
        run(damaged(seed, seeds[random.integer(0, seeds.size() - 1)], random));
    }
}

}  // namespace

int main(int argc, char** argv) try {
    if (argc == 3 && std::strcmp(argv[1], "--seeds") == 0) {
        std::filesystem::create_directories(argv[2]);
        std::size_t number = 0;
        for (const std::string& seed : fuzz_seeds()) {
            test::write_file((std::filesystem::path(argv[2]) / ("seed" + std::to_string(number++))).string(), seed);
        }
        return 0;
    }
    for (int i = 1; i < argc; ++i) {
        run_path(argv[i]);
    }
    if (argc == 1) {
        run_seeds();
    }
    std::printf("%zu inputs\n", runs);
    return 0;
} catch (const std::exception& failure) {
    std::fprintf(stderr, "%s\n", failure.what());
    return 1;
}
