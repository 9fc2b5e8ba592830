// silu of the causal convolution, forward and backward. With seen, the K - 1 inputs before the
// sequence and then x, and s = silu:
//
//     out_t = s(y_t)    y_t = bias + sum_k taps_k seen_{t+k}
//     gy_t = s'(y_t) gout_t    gtaps_k = sum_t gy_t seen_{t+k}    gseen_{t+k} += taps_k gy_t
//
// Each number is read once: what K steps have in common stays in registers. Shapes: x (batch, L,
// D), its rows x_row numbers apart; out, gout, gx (batch, L, D); taps (K, D); bias (D,); state and
// its gradient (batch, K - 1, D). D is a multiple of W.
#include "vectors.h"

// The first K - 1 inputs that the steps of W channels see.
template <int K>
static inline void begin(vec *seen, const float *state, long D)
{
    EACH for (int k = 0; k < K - 1; k++) seen[k] = load(state + k * D);
}

template <int K>
static inline vec convolved(const vec *seen, const vec *taps, vec bias)
{
    EACH for (int k = 0; k < K; k++) bias += taps[k] * seen[k];
    return bias;
}

template <int K>
static void forward_channels(long L, long D, long x_row, const float *x, const float *taps,
                             const float *bias, const float *state, float *out)
{
    vec seen[K], taps_k[K], bias_d = load(bias);
    EACH for (int k = 0; k < K; k++) taps_k[k] = load(taps + k * D);
    begin<K>(seen, state, D);
    for (long t = 0; t < L; t++) {
        seen[K - 1] = load(x + t * x_row);
        vec y = convolved<K>(seen, taps_k, bias_d);
        store(out + t * D, y * sigmoid(y));
        EACH for (int k = 0; k < K - 1; k++) seen[k] = seen[k + 1];
    }
}

template <int K>
static void backward_channels(long L, long D, long x_row, const float *x, const float *taps,
                              const float *bias, const float *state, const float *gout, float *gx,
                              float *gtaps, float *gbias, float *gstate)
{
    vec seen[K], taps_k[K], bias_d = load(bias), gbias_d = {};
    vec gseen[K] = {}, gtaps_k[K] = {};     // of seen_t, ..., as far as steps up to t go
    EACH for (int k = 0; k < K; k++) taps_k[k] = load(taps + k * D);
    begin<K>(seen, state, D);
    for (long t = 0; t < L + K - 1; t++) {
        if (t < L) {
            seen[K - 1] = load(x + t * x_row);
            vec y = convolved<K>(seen, taps_k, bias_d), s = sigmoid(y);
            vec gy = load(gout + t * D) * (s * (1.f + y * (1.f - s)));
            EACH for (int k = 0; k < K; k++) {
                gtaps_k[k] += gy * seen[k];
                gseen[k] += gy * taps_k[k];
            }
            gbias_d += gy;
        }
        store(t < K - 1 ? gstate + t * D : gx + (t - (K - 1)) * D, gseen[0]);
        EACH for (int k = 0; k < K - 1; k++) {
            seen[k] = seen[k + 1];
            gseen[k] = gseen[k + 1];
        }
        gseen[K - 1] = vec{};
    }
    EACH for (int k = 0; k < K; k++) store(gtaps + k * D, gtaps_k[k]);
    store(gbias, gbias_d);
}

extern "C" {

void forward(int threads, long batch, long L, long D, long K, long x_row, const float *x,
             const float *taps, const float *bias, const float *state, float *out)
{
    auto channels =
        K == 4 ? forward_channels<4> : K == 3 ? forward_channels<3> : forward_channels<2>;
    #pragma omp parallel for num_threads(threads)
    for (long i = 0; i < batch * (D / W); i++) {
        long b = i / (D / W), d = i % (D / W) * W;
        channels(L, D, x_row, x + b * L * x_row + d, taps + d, bias + d,
                 state + b * (K - 1) * D + d, out + b * L * D + d);
    }
}

// gtaps (batch, K, D) and gbias (batch, D) are still to be summed over the batch.
void backward(int threads, long batch, long L, long D, long K, long x_row, const float *x,
              const float *taps, const float *bias, const float *state, const float *gout,
              float *gx, float *gtaps, float *gbias, float *gstate)
{
    auto channels =
        K == 4 ? backward_channels<4> : K == 3 ? backward_channels<3> : backward_channels<2>;
    #pragma omp parallel for num_threads(threads)
    for (long i = 0; i < batch * (D / W); i++) {
        long b = i / (D / W), d = i % (D / W) * W;
        NoTinyNumbers here;
        channels(L, D, x_row, x + b * L * x_row + d, taps + d, bias + d,
                 state + b * (K - 1) * D + d, gout + b * L * D + d,
                 gx + b * L * D + d, gtaps + b * K * D + d, gbias + b * D + d,
                 gstate + b * (K - 1) * D + d);
    }
}

}
