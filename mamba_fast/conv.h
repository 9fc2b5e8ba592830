// Some steps of the causal convolution with silu: of conv_cpu.cpp, which says what is computed, and
// of ssd_cpu.cpp.
#pragma once
#include "vectors.h"

constexpr long AHEAD = 16;      // rows: CPUs do not guess that memory so far apart comes next

// W channels of a sequence: x (L, W), its rows x_row numbers apart; taps (K, W), state (K - 1, W),
// which is zeros if null, their rows D apart; bias (W,).
struct Channels {
    long x_row, D;
    const float *x, *taps, *bias, *state;
    Channels from(long d) const
    {
        return {x_row, D, x + d, taps + d, bias + d, state ? state + d : nullptr};
    }
};

// The K - 1 inputs before step t.
template <int K>
static inline void see(vec *seen, long t, const Channels &of)
{
    EACH for (int k = 0; k < K - 1; k++) {
        long at = t - (K - 1) + k;
        if (at >= 0) seen[k] = load(of.x + at * of.x_row);
        else seen[k] = of.state ? load(of.state + (at + K - 1) * of.D) : vec{};
    }
}

template <int K>
static inline vec convolved(const vec *seen, const vec *taps, vec bias)
{
    EACH for (int k = 0; k < K; k++) bias += taps[k] * seen[k];
    return bias;
}

static inline vec slope_of_silu(vec y, vec s) { return s * (1.f + y * (1.f - s)); }

// The next step is in place of this one.
template <int K>
static inline void go_on(vec *of_steps)
{
    EACH for (int k = 0; k < K - 1; k++) of_steps[k] = of_steps[k + 1];
}

// out, and slope, that of silu, or null, point to step t.
template <int K>
static void forward_steps(long t, long end, const Channels &of, float *out, float *slope, long row)
{
    vec seen[K], taps[K], bias = load(of.bias);
    EACH for (int k = 0; k < K; k++) taps[k] = load(of.taps + k * of.D);
    see<K>(seen, t, of);
    for (; t < end; t++, out += row) {
        seen[K - 1] = load(of.x + t * of.x_row);
        __builtin_prefetch(of.x + (t + AHEAD) * of.x_row);
        vec y = convolved<K>(seen, taps, bias), s = sigmoid(y);
        store(out, y * s);
        if (slope) store(slope, slope_of_silu(y, s)), slope += row;
        go_on<K>(seen);
    }
}

// What is added up over the steps: the gradients of taps and bias, and of seen_t, seen_{t+1}, ...
struct Sums {
    vec gtaps[4], gbias, gseen[4];
};

// gout and slope point to step t, gx to step 0. slope: null where it is to be computed again.
// gstate: that of the state, or null.
template <int K>
static void backward_steps(long t, long end, const Channels &of, const float *gout,
                           const float *slope, long row, float *gx, long gx_row, float *gstate,
                           Sums &all)
{
    Sums sums = all;
    vec seen[K], taps[K], bias = load(of.bias);
    EACH for (int k = 0; k < K; k++) taps[k] = load(of.taps + k * of.D);
    see<K>(seen, t, of);
    for (; t < end; t++, gout += row) {
        seen[K - 1] = load(of.x + t * of.x_row);
        __builtin_prefetch(of.x + (t + AHEAD) * of.x_row);
        __builtin_prefetch(gx + (t + AHEAD) * gx_row, 1);       // 1: to be written
        vec gy = load(gout);
        if (slope) gy *= load(slope), slope += row;
        else {
            vec y = convolved<K>(seen, taps, bias);
            gy *= slope_of_silu(y, sigmoid(y));
        }
        EACH for (int k = 0; k < K; k++) {
            sums.gtaps[k] += gy * seen[k];
            sums.gseen[k] += gy * taps[k];
        }
        sums.gbias += gy;
        if (t >= K - 1) store(gx + (t - (K - 1)) * gx_row, sums.gseen[0]);
        else if (gstate) store(gstate + t * of.D, sums.gseen[0]);
        go_on<K>(seen);
        go_on<K>(sums.gseen);
        sums.gseen[K - 1] = vec{};
    }
    all = sums;
}
