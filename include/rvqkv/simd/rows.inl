// SPDX-License-Identifier: MIT
// The loops of row_kernels.hpp, part of kernels.inl. Besides its registers they know
//   wide: `wide_lanes` doubles, part of a register's; widen(reg, wide[]), add, fma, store(double*, wide)
//   divide_turned: divide_strided by registers of the level's own, or false

template <class Half>
inline bool round_finite(const float* in, Half* out, std::size_t count) {
    const float nothing = 0.0F;
    const reg zero = broadcast(&nothing);
    reg found = zero;  // infinity * 0 is NaN
    std::size_t i = 0;
    for (; i + lanes <= count; i += lanes) {
        store(out + i, load(in + i));
        found = fma(load(out + i), zero, found);
    }
    bool finite = sum(found) == 0.0F;
    for (; i < count; ++i) {
        out[i] = float_to<Half>(in[i]);
        finite = finite && to_float(out[i]) * 0.0F == 0.0F;
    }
    return finite;
}

template <class T>
inline bool all_finite(const T* row, std::size_t count) {
    const float nothing = 0.0F;
    const reg zero = broadcast(&nothing);
    reg found = zero;
    std::size_t i = 0;
    for (; i + lanes <= count; i += lanes) {
        found = fma(load(row + i), zero, found);
    }
    bool finite = sum(found) == 0.0F;
    for (; i < count; ++i) {
        finite = finite && to_float(row[i]) * 0.0F == 0.0F;
    }
    return finite;
}

template <int Count>
inline double sum_in_halves(const double* sums) {
    if constexpr (Count == 1) {
        return sums[0];
    } else {
        double halves[Count / 2];
        RVQKV_UNROLL
        for (int i = 0; i < Count / 2; ++i) {
            halves[i] = sums[i] + sums[i + Count / 2];
        }
        return sum_in_halves<Count / 2>(halves);
    }
}
template <int Registers>
inline double sum_in_halves(wide* sums) {
    if constexpr (Registers > 1) {
        RVQKV_UNROLL
        for (int i = 0; i < Registers / 2; ++i) {
            sums[i] = add(sums[i], sums[i + Registers / 2]);
        }
        return sum_in_halves<Registers / 2>(sums);
    } else {
        double each[wide_lanes];
        store(each, sums[0]);
        return sum_in_halves<wide_lanes>(each);
    }
}

inline row_moments moments(const float* row, std::size_t count, float shrink) {
    constexpr int registers = static_cast<int>(moment_sums) / lanes;
    constexpr int parts = lanes / wide_lanes;
    const float first = row[0] * shrink;
    const reg factor = broadcast(&shrink);
    const reg origin = broadcast(&first);
    wide sums[registers * parts] = {};
    wide squares[registers * parts] = {};
    const auto take = [&](const float* from) {
        RVQKV_UNROLL
        for (int r = 0; r < registers; ++r) {
            wide differences[parts];
            widen(subtract(multiply(load(from + r * lanes), factor), origin), differences);
            RVQKV_UNROLL
            for (int p = 0; p < parts; ++p) {
                sums[r * parts + p] = add(sums[r * parts + p], differences[p]);
                squares[r * parts + p] = fma(differences[p], differences[p], squares[r * parts + p]);
            }
        }
    };
    std::size_t i = 0;
    for (; i + moment_sums <= count; i += moment_sums) {
        take(row + i);
    }
    if (i < count) {
        float rest[moment_sums];  // and channels that do not differ from the first
        for (std::size_t j = 0; j < moment_sums; ++j) {
            rest[j] = i + j < count ? row[i + j] : row[0];
        }
        take(rest);
    }
    return {sum_in_halves<registers * parts>(sums), sum_in_halves<registers * parts>(squares)};
}

inline void divide_row(const float* in, float by, std::size_t count, float* out) {
    const reg divisor = broadcast(&by);
    std::size_t i = 0;
    for (; i + lanes <= count; i += lanes) {
        store(out + i, divide(load(in + i), divisor));
    }
    for (; i < count; ++i) {
        out[i] = in[i] / by;
    }
}

inline void divide_strided(const float* in, float by, std::size_t groups, std::size_t dim, float* out) {
    if (divide_turned(in, by, groups, dim, out)) {
        return;
    }
    if (groups % 4 == 0 && dim % lanes == 0) {
        for (std::size_t i = 0; i < dim; i += lanes) {
            for (std::size_t group = 0; group < groups; group += 4) {
                transpose(in + i * groups + group, groups, out + group * dim + i, dim);
            }
        }
    } else {
        for (std::size_t group = 0; group < groups; ++group) {
            for (std::size_t i = 0; i < dim; ++i) {
                out[group * dim + i] = in[i * groups + group];
            }
        }
    }
    divide_row(out, by, groups * dim, out);
}
