// The selective scan, forward and backward. W channels lie side by side in a vector, and go through
// the T steps of a tile with 8 of their states in registers:
//
//     forward     h_t = a_t h_{t-1} + x_t B_t    y_t = C_t . h_t      a = exp(delta A), x = delta u
//     backward    g_t = C_t gy_t + a_{t+1} g_{t+1}                    g_t is dLoss/dh_t
//                 gC_t = h_t . gy_t   gB_t = g_t . x_t   gx_t = B_t . g_t
//                 dLoss/d(delta_t A) = g_t a_t h_{t-1}: for the gradients of delta and A
//
// and around it delta = softplus(delta + bias), out = (y + D u) silu(z), as far as they are asked
// for. Kept is the state that enters each tile; backward makes those of its steps again. Shapes: u,
// delta, z, out and their gradients (batch, L, D); the rows of z and of its gradient are z_row and
// gz_row numbers apart; A (N, D), divided by ln 2; B, C (batch, L, N); states (batch, N, D); D and
// bias (D,). D is a multiple of W.
#include "vectors.h"

constexpr int T = 16;           // steps of a tile
constexpr int MOST = 8;         // states in registers
// Channels of a task. A fixed number, so that sums are the same with any number of threads.
constexpr int GROUP = 128;

typedef float Tile[T][GROUP];   // what a task has of a tensor (batch, L, D)

// A tile of W channels with NB of their states, of which h enters and leaves. To y is added.
template <int NB>
static inline void tile_forward(int steps, long D, long N, const float *u, const float *delta,
                                const float *A, const float *B, const float *C, float *h, float *y)
{
    vec A_n[NB], h_n[NB];
    EACH for (int n = 0; n < NB; n++) {
        A_n[n] = load(A + n * D);
        h_n[n] = load(h + n * D);
    }
    for (int t = 0; t < steps; t++) {
        vec delta_t = load(delta + t * GROUP), x = delta_t * load(u + t * GROUP);
        vec y_t = load(y + t * GROUP);
        EACH for (int n = 0; n < NB; n++) {
            h_n[n] = exp2_of(delta_t * A_n[n]) * h_n[n] + x * B[t * N + n];
            y_t += h_n[n] * C[t * N + n];
        }
        store(y + t * GROUP, y_t);
    }
    EACH for (int n = 0; n < NB; n++) store(h + n * D, h_n[n]);
}

// The gradients of such a tile, before which the state was h, and y again. carry, a_{t+1} g_{t+1},
// comes from the tile after and goes to the one before. To all others is added. gdelta_A is delta's
// through A, divided by ln 2; gB and gC (T, NB) are still to be summed over the channels.
template <int NB>
static inline void tile_backward(int steps, long D, long N, const float *u, const float *delta,
                                 const float *A, const float *B, const float *C, const float *gy,
                                 const float *h, float *carry, float *gA, float *gdelta_A,
                                 float *gx, float *y, vec *gB, vec *gC)
{
    vec A_n[NB], h_n[NB], carry_n[NB], gA_n[NB], decays[T][NB], before[T][NB];
    EACH for (int n = 0; n < NB; n++) {
        A_n[n] = load(A + n * D);
        h_n[n] = load(h + n * D);
        carry_n[n] = load(carry + n * D);
        gA_n[n] = load(gA + n * D);
    }
    for (int t = 0; t < steps; t++) {
        vec delta_t = load(delta + t * GROUP), x = delta_t * load(u + t * GROUP);
        vec y_t = load(y + t * GROUP);
        EACH for (int n = 0; n < NB; n++) {
            before[t][n] = h_n[n];
            decays[t][n] = exp2_of(delta_t * A_n[n]);
            h_n[n] = decays[t][n] * h_n[n] + x * B[t * N + n];
            y_t += h_n[n] * C[t * N + n];
        }
        store(y + t * GROUP, y_t);
    }
    for (int t = steps - 1; t >= 0; t--) {
        vec delta_t = load(delta + t * GROUP), x = delta_t * load(u + t * GROUP);
        vec gy_t = load(gy + t * GROUP), gx_t = load(gx + t * GROUP);
        vec gdelta_A_t = load(gdelta_A + t * GROUP);
        EACH for (int n = 0; n < NB; n++) {
            vec g = carry_n[n] + gy_t * C[t * N + n];
            gx_t += g * B[t * N + n];
            gB[t * NB + n] += g * x;
            gC[t * NB + n] += gy_t * h_n[n];
            h_n[n] = before[t][n];
            carry_n[n] = g * decays[t][n];
            vec through_A = carry_n[n] * h_n[n];
            gdelta_A_t += through_A * A_n[n];
            gA_n[n] += through_A * delta_t;
        }
        store(gx + t * GROUP, gx_t);
        store(gdelta_A + t * GROUP, gdelta_A_t);
    }
    EACH for (int n = 0; n < NB; n++) {
        store(carry + n * D, carry_n[n]);
        store(gA + n * D, gA_n[n]);
    }
}

// delta as the recurrence takes it
static inline vec step_size(const float *delta, const float *bias, long is_softplus)
{
    vec sum = load(delta);
    if (bias) sum += load(bias);
    return is_softplus ? softplus(sum) : sum;
}

extern "C" {

// D, z, bias, and kept, (tiles, batch, N, D), may be null. h is the state before the first step,
// and afterwards that after the last one.
void forward(int threads, long batch, long L, long D, long N, const float *u, const float *delta,
             const float *A, const float *B, const float *C, const float *D_u, const float *z,
             const float *bias, long is_softplus, long z_row, float *h, float *out, float *kept)
{
    long groups = (D + GROUP - 1) / GROUP;
    #pragma omp parallel for num_threads(threads)
    for (long task = 0; task < batch * groups; task++) {
        NoTinyNumbers here;
        Tile u_s, delta_s, y_s;
        long b = task / groups, begin = task % groups * GROUP;
        int channels = begin + GROUP < D ? GROUP : D - begin;
        for (long t = 0; t < L; t += T) {
            int steps = L - t < T ? L - t : T;
            long row = b * L + t;
            for (long n = 0; kept && n < N; n++)
                memcpy(kept + ((t / T * batch + b) * N + n) * D + begin,
                       h + (b * N + n) * D + begin, sizeof(float) * channels);
            for (int i = 0; i < steps; i++)
                for (int d = 0; d < channels; d += W) {
                    long at = (row + i) * D + begin + d;
                    vec u_t = load(u + at), y_t = {};
                    store(u_s[i] + d, u_t);
                    store(delta_s[i] + d,
                          step_size(delta + at, bias ? bias + begin + d : nullptr, is_softplus));
                    if (D_u) y_t = load(D_u + begin + d) * u_t;
                    store(y_s[i] + d, y_t);
                }
            for (int d = 0; d < channels; d += W)
                for (long n = 0, some; n < N; n += some) {
                    some = n + MOST <= N ? MOST : 1;
                    (some == MOST ? tile_forward<MOST> : tile_forward<1>)(
                        steps, D, N, u_s[0] + d, delta_s[0] + d, A + n * D + begin + d,
                        B + row * N + n, C + row * N + n, h + (b * N + n) * D + begin + d,
                        y_s[0] + d);
                }
            for (int i = 0; i < steps; i++)
                for (int d = 0; d < channels; d += W) {
                    vec y_t = load(y_s[i] + d);
                    if (z) {
                        vec z_t = load(z + (row + i) * z_row + begin + d);
                        y_t *= z_t * sigmoid(z_t);
                    }
                    store(out + (row + i) * D + begin + d, y_t);
                }
        }
    }
}

// carry is the gradient of the last state, and afterwards that of the first one. gA (batch, N, D),
// gD and gbias (batch, D) are added to; gB, gC (groups, batch, L, N) are still to be summed over
// the groups of channels.
void backward(int threads, long batch, long L, long D, long N, const float *u, const float *delta,
              const float *A, const float *B, const float *C, const float *D_u, const float *z,
              const float *bias, long is_softplus, long z_row, long gz_row, const float *kept,
              const float *gout, float *carry, float *gu, float *gdelta, float *gA, float *gB,
              float *gC, float *gD, float *gz, float *gbias)
{
    long groups = (D + GROUP - 1) / GROUP;
    #pragma omp parallel for num_threads(threads)
    for (long task = 0; task < batch * groups; task++) {
        NoTinyNumbers here;
        Tile u_s, delta_s, y_s, gy_s, gx_s, gdelta_A_s;
        vec gB_s[T * MOST], gC_s[T * MOST];
        long b = task / groups, group = task % groups, begin = group * GROUP;
        int channels = begin + GROUP < D ? GROUP : D - begin;
        for (long tile = (L - 1) / T; tile >= 0; tile--) {
            long t = tile * T, row = b * L + t, out = (group * batch * L + row) * N;
            int steps = L - t < T ? L - t : T;
            for (int i = 0; i < steps; i++)
                for (int d = 0; d < channels; d += W) {
                    long at = (row + i) * D + begin + d;
                    vec u_t = load(u + at), gy_t = load(gout + at), y_t = {};
                    if (z) {
                        vec z_t = load(z + (row + i) * z_row + begin + d);
                        gy_t *= z_t * sigmoid(z_t);
                    }
                    if (D_u) y_t = load(D_u + begin + d) * u_t;
                    store(u_s[i] + d, u_t);
                    store(gy_s[i] + d, gy_t);
                    store(y_s[i] + d, y_t);
                    store(delta_s[i] + d,
                          step_size(delta + at, bias ? bias + begin + d : nullptr, is_softplus));
                }
            memset(gx_s, 0, sizeof gx_s);
            memset(gdelta_A_s, 0, sizeof gdelta_A_s);
            for (long n = 0, some; n < N; n += some) {
                some = n + MOST <= N ? MOST : 1;
                memset(gB_s, 0, sizeof gB_s);
                memset(gC_s, 0, sizeof gC_s);
                for (int d = 0; d < channels; d += W) {
                    long state = (b * N + n) * D + begin + d;
                    (some == MOST ? tile_backward<MOST> : tile_backward<1>)(
                        steps, D, N, u_s[0] + d, delta_s[0] + d, A + n * D + begin + d,
                        B + row * N + n, C + row * N + n, gy_s[0] + d,
                        kept + tile * batch * N * D + state, carry + state, gA + state,
                        gdelta_A_s[0] + d, gx_s[0] + d, y_s[0] + d, gB_s, gC_s);
                }
                for (int i = 0; i < steps * some; i++) {
                    gB[out + i / some * N + n + i % some] = sum(gB_s[i]);
                    gC[out + i / some * N + n + i % some] = sum(gC_s[i]);
                }
            }
            for (int d = 0; d < channels; d += W) {
                vec gD_d = {}, gbias_d = {};
                for (int i = 0; i < steps; i++) {
                    long at = (row + i) * D + begin + d;
                    vec u_t = load(u_s[i] + d), gx_t = load(gx_s[i] + d), gy_t = load(gy_s[i] + d);
                    vec gdelta_t = gx_t * u_t + load(gdelta_A_s[i] + d) * 0.69314718f;
                    vec gu_t = gx_t * load(delta_s[i] + d);
                    if (is_softplus) {
                        vec sum = load(delta + at);
                        if (bias) sum += load(bias + begin + d);
                        gdelta_t *= sigmoid(sum);
                    }
                    if (D_u) gu_t += gy_t * load(D_u + begin + d);
                    if (z) {
                        vec z_t = load(z + (row + i) * z_row + begin + d), s = sigmoid(z_t);
                        vec slope = s * (1.f + z_t * (1.f - s));    // of silu
                        store(gz + (row + i) * gz_row + begin + d,
                              load(gout + at) * load(y_s[i] + d) * slope);
                    }
                    gD_d += gy_t * u_t;
                    gbias_d += gdelta_t;
                    store(gu + at, gu_t);
                    store(gdelta + at, gdelta_t);
                }
                store(gD + b * D + begin + d, load(gD + b * D + begin + d) + gD_d);
                store(gbias + b * D + begin + d, load(gbias + b * D + begin + d) + gbias_d);
            }
        }
    }
}

}
