// SPDX-License-Identifier: MIT
// The inner loops of attention, part of kernels.inl. Beside what that file names:
//   split(pointer, even, odd): 2 * lanes floats, even and odd ones apart; join: the way back
//   multiply

/// Both numbers of `lanes` pairs. The sine is negated, not the product: exact either way, and one step less.
inline void turn_pair(reg& a, reg& b, reg cosine, reg sine) {
    const reg negative = subtract(subtract(sine, sine), sine);
    const reg turned = fma(a, cosine, multiply(b, negative));
    b = fma(a, sine, multiply(b, cosine));
    a = turned;
}
inline void turn_pair(float& a, float& b, float cosine, float sine) {
    const float product = b * -sine;
    const float turned = fma(a, cosine, product);
    const float other = b * cosine;
    b = fma(a, sine, other);
    a = turned;
}

inline void turn(float* x, std::size_t rows, std::size_t stride, const channel_pairs* pairs, std::size_t runs,
                 const float* cosines, const float* sines, std::size_t angle_stride) {
    constexpr std::size_t width = lanes;
    for (std::size_t row = 0; row < rows; ++row, x += stride, cosines += angle_stride, sines += angle_stride) {
        for (std::size_t run = 0; run < runs; ++run) {
            const channel_pairs& places = pairs[run];
            float* const first = x + places.first;
            float* const second = x + places.second;
            const float* const cosine = cosines + places.angle;
            const float* const sine = sines + places.angle;
            std::size_t i = 0;
            if (places.step == 1) {
                for (; i + width <= places.count; i += width) {
                    reg a = load(first + i);
                    reg b = load(second + i);
                    turn_pair(a, b, load(cosine + i), load(sine + i));
                    store(first + i, a);
                    store(second + i, b);
                }
            } else if (places.step == 2 && places.second == places.first + 1) {
                for (; i + width <= places.count; i += width) {
                    reg a;
                    reg b;
                    split(first + 2 * i, a, b);
                    turn_pair(a, b, load(cosine + i), load(sine + i));
                    join(first + 2 * i, a, b);
                }
            }
            for (; i < places.count; ++i) {
                turn_pair(first[i * places.step], second[i * places.step], cosine[i], sine[i]);
            }
        }
    }
}

inline constexpr attention_kernels attention = {
    turn,
};
