// SPDX-License-Identifier: MIT
/// @file
/// What the commands of the program share: exit codes, Ctrl-C, ranges of tokens, numbers as text, tables.
#pragma once

#include <rvqkv/files/owned_tensor.hpp>
#include <rvqkv/learn.hpp>

#include <cstddef>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace cli {

/// Exit codes, the same for every command.
enum exit_code : int { done = 0, failed = 1, misused = 2, interrupted = 130 };

/// A command line that makes no sense: exit code 2.
class usage_error : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

/// Ctrl-C was pressed, and what was done so far is saved: exit code 130.
class interruption : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

/// While it lives, Ctrl-C (SIGINT) and SIGTERM set a flag instead of ending the program; a second one ends it.
class interrupt_guard {
public:
    interrupt_guard();
    interrupt_guard(const interrupt_guard&) = delete;
    interrupt_guard& operator=(const interrupt_guard&) = delete;
    ~interrupt_guard();
    [[nodiscard]] static bool requested() noexcept;
};

/// Tokens [first, last).
struct token_span {
    std::size_t first = 0;
    std::size_t last = 0;
    [[nodiscard]] std::size_t size() const noexcept { return last - first; }
    [[nodiscard]] std::string text() const { return std::to_string(first) + ":" + std::to_string(last); }
};

/// Reads "A:B", "A:" or ":B"; an empty text gives `otherwise`.
/// Throws `usage_error` for other texts, `std::runtime_error` for tokens that are not there.
[[nodiscard]] token_span parse_tokens(const std::string& text, std::size_t tokens, token_span otherwise);

/// "first 80 %": what is trained on unless the user says otherwise, and what is evaluated: the rest.
[[nodiscard]] inline token_span first_part(std::size_t tokens) {
    return {0, tokens * 4 / 5};
}
[[nodiscard]] inline token_span last_part(std::size_t tokens) {
    return {tokens * 4 / 5, tokens};
}

/// Calls `body(first, count)` for pieces of a span that hold half a million numbers each, so that memory does not grow
/// with the file.
template <class Body>
void for_each_piece(token_span tokens, std::size_t values_per_token, const Body& body) {
    constexpr std::size_t values = std::size_t{1} << 19U;
    const std::size_t most = values_per_token == 0 || values_per_token > values ? 1 : values / values_per_token;
    for (std::size_t first = tokens.first; first < tokens.last; first += most) {
        body(first, tokens.last - first < most ? tokens.last - first : most);
    }
}

/// Fails now, not after an hour of training, when a file cannot be written or would replace one that is read.
void check_output(const std::string& output, const std::vector<std::string>& inputs);

/// The value whose `name_of` is `name`. Precondition: it is one of them (the parser has checked).
template <class Kind, std::size_t Count>
[[nodiscard]] Kind named(const Kind (&kinds)[Count], std::string_view name) {
    for (const Kind kind : kinds) {
        if (name_of(kind) == name) {
            return kind;
        }
    }
    throw usage_error("'" + std::string(name) + "' is not known");
}
/// All names, for the parser.
template <class Kind, std::size_t Count>
[[nodiscard]] std::vector<std::string> names(const Kind (&kinds)[Count]) {
    std::vector<std::string> all;
    for (const Kind kind : kinds) {
        all.emplace_back(name_of(kind));
    }
    return all;
}

inline constexpr rvqkv::dtype all_types[] = {rvqkv::dtype::float32, rvqkv::dtype::float16, rvqkv::dtype::bfloat16};
inline constexpr rvqkv::distance all_distances[] = {rvqkv::distance::euclidean, rvqkv::distance::cosine};
inline constexpr rvqkv::kmeans_start all_starts[] = {rvqkv::kmeans_start::sampled, rvqkv::kmeans_start::plus_plus};
/// Without `permuted`, which a command line cannot spell.
inline constexpr rvqkv::grouping_kind all_groupings[] = {rvqkv::grouping_kind::strided,
                                                         rvqkv::grouping_kind::contiguous};

/// "12.50"
[[nodiscard]] std::string fixed(double number, int digits);
/// Three significant digits: "0.0123", "4.56"
[[nodiscard]] std::string brief(double number);
/// "1.50 MiB"
[[nodiscard]] std::string bytes_text(std::size_t bytes);

/// Prints rows of cells as a Markdown table, columns aligned; the first row is the header, the first column text.
void print_table(const std::vector<std::vector<std::string>>& rows);

/// A line on stderr that begins with "rvqkv: ".
void warn(const std::string& text);

/// Warns about NaNs and infinities, if any.
void warn_about(const rvqkv::encode_report& report, const std::string& what, std::size_t first_token);

/// A progress bar on stderr, if that is a terminal; nothing otherwise. Gone when destroyed.
class progress_bar {
public:
    progress_bar();
    progress_bar(const progress_bar&) = delete;
    progress_bar& operator=(const progress_bar&) = delete;
    ~progress_bar();
    /// Drawn at most some ten times a second. `fraction` is in [0, 1].
    void show(const std::string& what, double fraction);
    /// Takes the bar away, so that a line can be printed.
    void clear();

private:
    bool is_terminal_;
    bool is_drawn_ = false;
    double last_drawn_ = -1.0;  // seconds on the steady clock
};

}  // namespace cli
