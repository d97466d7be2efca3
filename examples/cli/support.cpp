// SPDX-License-Identifier: MIT
#include "support.hpp"

#include <rvqkv/files/atomic_file.hpp>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>

#include <unistd.h>

namespace cli {
namespace {

volatile std::sig_atomic_t interrupt_requested = 0;

extern "C" void note_interrupt(int number) {
    interrupt_requested = 1;
    std::signal(number, SIG_DFL);  // a second one is not to be argued with
}

bool read_number(std::string_view text, std::size_t& number) {
    const auto [end, failure] = std::from_chars(text.data(), text.data() + text.size(), number);
    return failure == std::errc() && end == text.data() + text.size();
}

}  // namespace

interrupt_guard::interrupt_guard() {
    interrupt_requested = 0;
    std::signal(SIGINT, note_interrupt);
    std::signal(SIGTERM, note_interrupt);
}
interrupt_guard::~interrupt_guard() {
    std::signal(SIGINT, SIG_DFL);
    std::signal(SIGTERM, SIG_DFL);
}
bool interrupt_guard::requested() noexcept {
    return interrupt_requested != 0;
}

token_span parse_tokens(const std::string& text, std::size_t tokens, token_span otherwise) {
    if (text.empty()) {
        return otherwise;
    }
    token_span span{0, tokens};
    const std::size_t colon = text.find(':');
    if (colon == std::string::npos || (colon != 0 && !read_number(text.substr(0, colon), span.first)) ||
        (colon + 1 != text.size() && !read_number(text.substr(colon + 1), span.last))) {
        throw usage_error("--tokens is '" + text + "', want FIRST:LAST such as 0:3276, 3276: or :3276");
    }
    if (span.first >= span.last || span.last > tokens) {
        throw std::runtime_error("--tokens is '" + text + "', but the tensors have tokens 0:" + std::to_string(tokens));
    }
    return span;
}

void check_output(const std::string& output, const std::vector<std::string>& inputs) {
    for (const std::string& input : inputs) {
        std::error_code ignored;
        if (std::filesystem::equivalent(output, input, ignored)) {
            throw std::runtime_error(output + ": is read by this command, give another name for the output");
        }
    }
    static_cast<void>(rvqkv::atomic_file::create(output).value());  // and discarded again
}

std::string fixed(double number, int digits) {
    char text[64];
    std::snprintf(text, sizeof(text), "%.*f", digits, number);
    return text;
}

std::string brief(double number) {
    if (number == 0.0 || !std::isfinite(number)) {
        return fixed(number, 0);
    }
    const int magnitude = static_cast<int>(std::floor(std::log10(std::fabs(number))));
    return fixed(number, std::clamp(2 - magnitude, 0, 6));
}

std::string bytes_text(std::size_t bytes) {
    constexpr const char* units[] = {"bytes", "KiB", "MiB", "GiB"};
    double number = static_cast<double>(bytes);
    std::size_t unit = 0;
    for (; number >= 1024.0 && unit + 1 < std::size(units); ++unit) {
        number /= 1024.0;
    }
    return fixed(number, unit == 0 ? 0 : 2) + " " + units[unit];
}

void print_table(const std::vector<std::vector<std::string>>& rows) {
    std::vector<std::size_t> widths;
    for (const auto& row : rows) {
        widths.resize(std::max(widths.size(), row.size()), 3);
        for (std::size_t i = 0; i < row.size(); ++i) {
            widths[i] = std::max(widths[i], row[i].size());
        }
    }
    const auto print = [&](const std::vector<std::string>& row) {
        for (std::size_t i = 0; i < widths.size(); ++i) {
            const std::string cell = i < row.size() ? row[i] : "";
            const std::string space(widths[i] - cell.size(), ' ');
            std::printf("| %s%s%s ", i == 0 ? "" : space.c_str(), cell.c_str(), i == 0 ? space.c_str() : "");
        }
        std::puts("|");
    };
    for (std::size_t i = 0; i < rows.size(); ++i) {
        print(rows[i]);
        if (i == 0) {
            for (std::size_t column = 0; column < widths.size(); ++column) {
                const std::string line(widths[column] - (column == 0 ? 0 : 1), '-');
                std::printf("| %s%s ", line.c_str(), column == 0 ? "" : ":");
            }
            std::puts("|");
        }
    }
}

void warn(const std::string& text) {
    std::fprintf(stderr, "rvqkv: %s\n", text.c_str());
}

void warn_about(const rvqkv::encode_report& report, const std::string& what, std::size_t first_token) {
    if (report.nonfinite_values != 0) {
        warn("warning: " + what + ": " + std::to_string(report.nonfinite_values) +
             " values are NaN or infinite and count as 0, the first of them at token " +
             std::to_string(first_token + report.first_token) + ", head " + std::to_string(report.first_head));
    }
}

progress_bar::progress_bar() : is_terminal_(::isatty(STDERR_FILENO) == 1) {}
progress_bar::~progress_bar() {
    clear();
}

void progress_bar::show(const std::string& what, double fraction) {
    const double now = std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
    constexpr double pause = 0.1;
    if (!is_terminal_ || (is_drawn_ && now - last_drawn_ < pause)) {
        return;
    }
    constexpr std::size_t width = 30;
    const double part = std::clamp(fraction, 0.0, 1.0);
    const auto filled = static_cast<std::size_t>(part * static_cast<double>(width));
    std::fprintf(stderr, "\r\x1b[K[%s%s] %3.0f%%  %s", std::string(filled, '#').c_str(),
                 std::string(width - filled, '.').c_str(), 100.0 * part, what.c_str());
    std::fflush(stderr);
    is_drawn_ = true;
    last_drawn_ = now;
}

void progress_bar::clear() {
    if (is_drawn_) {
        std::fputs("\r\x1b[K", stderr);
        std::fflush(stderr);
        is_drawn_ = false;
    }
}

}  // namespace cli
