// silu of the causal convolution, forward and backward. With seen, the K - 1 inputs before the
// sequence and then x, and s = silu:
//
//     out_t = s(y_t)    y_t = bias + sum_k taps_k seen_{t+k}
//     gy_t = s'(y_t) gout_t    gtaps_k = sum_t gy_t seen_{t+k}    gseen_{t+k} += taps_k gy_t
//
// What K steps have in common stays in registers. Shapes: x, gx (batch, L, D), their rows x_row and
// gx_row numbers apart; out, gout (batch, L, D); taps (K, D); bias (D,); state and its gradient
// (batch, K - 1, D). D is a multiple of W.
#include "vectors.h"

constexpr long STEPS = 32, GROUP = 128;     // steps and channels that are in the cache together

// The K - 1 inputs before step t, of W channels.
template <int K>
static inline void see(vec *seen, long t, const float *x, long x_row, const float *state, long D)
{
    EACH for (int k = 0; k < K - 1; k++) {
        long at = t - (K - 1) + k;
        seen[k] = at < 0 ? load(state + (at + K - 1) * D) : load(x + at * x_row);
    }
}

template <int K>
static inline vec convolved(const vec *seen, const vec *taps, vec bias)
{
    EACH for (int k = 0; k < K; k++) bias += taps[k] * seen[k];
    return bias;
}

// The next step is in place of this one.
template <int K>
static inline void go_on(vec *of_steps)
{
    EACH for (int k = 0; k < K - 1; k++) of_steps[k] = of_steps[k + 1];
}

template <int K>
static void forward_steps(long t, long end, long D, long x_row, const float *x, const float *taps,
                          const float *bias, const float *state, float *out)
{
    vec seen[K], taps_k[K], bias_d = load(bias);
    EACH for (int k = 0; k < K; k++) taps_k[k] = load(taps + k * D);
    see<K>(seen, t, x, x_row, state, D);
    for (; t < end; t++) {
        seen[K - 1] = load(x + t * x_row);
        vec y = convolved<K>(seen, taps_k, bias_d);
        store(out + t * D, y * sigmoid(y));
        go_on<K>(seen);
    }
}

// What is added up over the steps: the gradients of taps and bias, and of seen_t, seen_{t+1}, ...
struct Sums {
    vec gtaps[4], gbias, gseen[4];
};

template <int K>
static void backward_steps(long t, long end, long D, long x_row, long gx_row, const float *x,
                           const float *taps, const float *bias, const float *state,
                           const float *gout, float *gx, float *gstate, Sums &all)
{
    Sums sums = all;
    vec seen[K], taps_k[K], bias_d = load(bias);
    EACH for (int k = 0; k < K; k++) taps_k[k] = load(taps + k * D);
    see<K>(seen, t, x, x_row, state, D);
    for (; t < end; t++) {
        seen[K - 1] = load(x + t * x_row);
        vec y = convolved<K>(seen, taps_k, bias_d), s = sigmoid(y);
        vec gy = load(gout + t * D) * (s * (1.f + y * (1.f - s)));
        EACH for (int k = 0; k < K; k++) {
            sums.gtaps[k] += gy * seen[k];
            sums.gseen[k] += gy * taps_k[k];
        }
        sums.gbias += gy;
        store(t < K - 1 ? gstate + t * D : gx + (t - (K - 1)) * gx_row, sums.gseen[0]);
        go_on<K>(seen);
        go_on<K>(sums.gseen);
        sums.gseen[K - 1] = vec{};
    }
    all = sums;
}

extern "C" {

void forward(int threads, long batch, long L, long D, long K, long x_row, const float *x,
             const float *taps, const float *bias, const float *state, float *out)
{
    auto steps = K == 4 ? forward_steps<4> : K == 3 ? forward_steps<3> : forward_steps<2>;
    long groups = (D + GROUP - 1) / GROUP;
    #pragma omp parallel for num_threads(threads)
    for (long task = 0; task < batch * groups; task++) {
        NoTinyNumbers here;
        long b = task / groups, begin = task % groups * GROUP;
        for (long t = 0; t < L; t += STEPS)
            for (long d = begin; d < D && d < begin + GROUP; d += W)
                steps(t, t + STEPS < L ? t + STEPS : L, D, x_row, x + b * L * x_row + d, taps + d,
                      bias + d, state + b * (K - 1) * D + d, out + b * L * D + d);
    }
}

// gtaps (batch, K, D) and gbias (batch, D) are still to be summed over the batch.
void backward(int threads, long batch, long L, long D, long K, long x_row, long gx_row,
              const float *x, const float *taps, const float *bias, const float *state,
              const float *gout, float *gx, float *gtaps, float *gbias, float *gstate)
{
    auto steps = K == 4 ? backward_steps<4> : K == 3 ? backward_steps<3> : backward_steps<2>;
    long groups = (D + GROUP - 1) / GROUP;
    #pragma omp parallel for num_threads(threads)
    for (long task = 0; task < batch * groups; task++) {
        NoTinyNumbers here;
        Sums sums[GROUP / W] = {};
        long b = task / groups, begin = task % groups * GROUP;
        float *gx_b = gx + b * L * gx_row, *gstate_b = gstate + b * (K - 1) * D;
        for (long t = 0; t < L; t += STEPS)
            for (long d = begin; d < D && d < begin + GROUP; d += W)
                steps(t, t + STEPS < L ? t + STEPS : L, D, x_row, gx_row, x + b * L * x_row + d,
                      taps + d, bias + d, state + b * (K - 1) * D + d, gout + b * L * D + d,
                      gx_b + d, gstate_b + d, sums[(d - begin) / W]);
        for (long d = begin; d < D && d < begin + GROUP; d += W) {
            const Sums &of_d = sums[(d - begin) / W];
            for (long t = L, k = 0; k < K - 1; t++, k++) {  // what no later step adds to
                float *gseen = t < K - 1 ? gstate_b + t * D : gx_b + (t - (K - 1)) * gx_row;
                store(gseen + d, of_d.gseen[k]);
            }
            for (long k = 0; k < K; k++) store(gtaps + (b * K + k) * D + d, of_d.gtaps[k]);
            store(gbias + b * D + d, of_d.gbias);
        }
    }
}

}
