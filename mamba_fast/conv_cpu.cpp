// silu of the causal convolution, forward and backward. With seen, the K - 1 inputs before the
// sequence and then x, and s = silu:
//
//     out_t = s(y_t)    y_t = bias + sum_k taps_k seen_{t+k}
//     gy_t = s'(y_t) gout_t    gtaps_k = sum_t gy_t seen_{t+k}    gseen_{t+k} += taps_k gy_t
//
// What K steps have in common stays in registers. Shapes: x, gx (batch, L, D), their rows x_row and
// gx_row numbers apart; out, gout (batch, L, D); taps (K, D); bias (D,); state and its gradient
// (batch, K - 1, D). D is a multiple of W.
#include "conv.h"

constexpr long STEPS = 32, GROUP = 128;     // steps and channels that are in the cache together

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
        const Channels all = {x_row, D, x + b * L * x_row, taps, bias, state + b * (K - 1) * D};
        for (long t = 0; t < L; t += STEPS)
            for (long d = begin; d < D && d < begin + GROUP; d += W)
                steps(t, t + STEPS < L ? t + STEPS : L, all.from(d), out + (b * L + t) * D + d,
                      nullptr, D);
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
        const Channels all = {x_row, D, x + b * L * x_row, taps, bias, state + b * (K - 1) * D};
        for (long t = 0; t < L; t += STEPS)
            for (long d = begin; d < D && d < begin + GROUP; d += W)
                steps(t, t + STEPS < L ? t + STEPS : L, all.from(d), gout + (b * L + t) * D + d,
                      nullptr, D, gx_b + d, gx_row, gstate_b + d, sums[(d - begin) / W]);
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
