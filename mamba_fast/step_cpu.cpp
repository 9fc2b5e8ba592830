// The step of a token on a CPU: products of a few rows with a matrix, y = (x w^T) scale + bias, and
// with them whole layers of Mamba-1, 2 or 3. Such a product takes as long as reading w does, so
// w is read once for up to four rows, by all threads, and in its own type: floats, bfloat16 (the
// upper half of a float), or 8 bits. All else is in float32.
#include "vectors.h"
#include <cmath>

typedef uint16_t bfloat;
typedef bfloat bfloats __attribute__((vector_size(2 * W), aligned(2)));
typedef int8_t bytes __attribute__((vector_size(W), aligned(1)));
typedef int16_t shorts __attribute__((vector_size(2 * W)));

static inline vec wide(const float *from) { return load(from); }
static inline vec wide(const bfloat *from)
{
    return (vec)(__builtin_convertvector(*(const bfloats *)from, whole_numbers) << 16);
}
static inline vec wide(const int8_t *from)
{
    // by way of 16 bits, or GCC takes them one by one
    shorts half_wide = __builtin_convertvector(*(const bytes *)from, shorts);
    return __builtin_convertvector(__builtin_convertvector(half_wide, whole_numbers), vec);
}

// The same for one number, and back.
static inline float wide_one(float from) { return from; }
static inline float wide_one(int8_t from) { return from; }
static inline float wide_one(bfloat from)
{
    uint32_t bits = uint32_t(from) << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}
static inline void put(float x, float *to) { *to = x; }
static inline void put(float x, bfloat *to)     // the nearest one, or the even one of two
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    *to = x == x ? (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 : 0x7FC0;
}

extern "C" {

enum Type : long { FLOATS, BFLOATS, BYTES };

struct Matrix {
    const void *w;                  // (N, K), of this type
    const float *scale, *bias;      // (N,), or null
    long N, K;
    Type type;
};

// RMSNorm, of each of so many groups of numbers by itself.
struct Norm {
    const float *weight;            // or null: no norm
    double eps;
    long groups;
};

// What Mamba-3 has besides, with H heads of P channels, and the names of mamba3.py.
struct Turning {
    long angles;                    // of a head, at most N / 2; 0 if it is not a Mamba-3
    double A_floor;
    Norm B_norm, C_norm;
    const float *B_bias, *C_bias;   // (H, N)
    float *theta, *k, *x;           // (rows, H, angles), (rows, H, N), (rows, H, P)
};

// A layer with its state, and memory for what it computes. D is d_inner, N d_state. D is a multiple
// of W, and so are channels, those that the convolution goes over, and headdim, 0 in Mamba-1; in
// Mamba-3, which has no convolution, N.
//                  Mamba-1                     Mamba-2, of H heads
//     hidden       (rows, d_model), what enters and leaves; normed is like it
//     projected    (rows, in.N): u, z          z, u, B, C, delta
//     u            (rows, channels): u         u, B, C, of which B and C are (groups, N)
//     dtBC, delta  (rows, rank + 2 N), (rows, D)
//     y            (rows, D)
//     taps         (width, channels)
//     A2           (D, N), and W more numbers  (H,)                 A divided by ln 2; the last
//                  vector may reach beyond it
//     D_u          (D,)                        (H,)                 what is called D
//     dt_bias                                  (H,)                 in Mamba-1 that of dt
//     conv         (rows, width - 1, channels), of conv_type
//     h            (rows, D, N)                (rows, H, headdim, N)
// Mamba-3 has projected (rows, in.N): z, x, B, C, dt, A, lam, angles; as dtBC k and q (rows, H, 2,
// N); as u the cosines and sines of a head's angles (rows, H, N); and all else that is not of the
// convolution as Mamba-2.
struct Layer {
    long rows, d_model, D, N, width, channels, rank, headdim, groups;
    Norm norm, gated_norm;
    long norm_before_gate;
    double dt_least, dt_most;
    const float *taps, *conv_bias, *A2, *D_u, *dt_bias;
    Matrix in, x, dt, out;
    Turning turning;
    Type conv_type;
    void *conv;
    float *h, *hidden, *normed, *projected, *u, *dtBC, *delta, *y;
};

}

// R rows of x with row n of w, U vectors at a time: U is the same for any R, so the sum of a row
// does not depend on the other rows. To go through more rows of w side by side is slower: memory
// likes to be read in order.
constexpr int U = 2;

template <int R, class T>
static inline void output(const Matrix &m, long n, const float *x, long x_row, float *y, bool add)
{
    vec sums[R][U] = {};
    const T *w = (const T *)m.w + n * m.K;
    long k = 0;
    for (; k + U * W <= m.K; k += U * W)
        EACH for (int i = 0; i < U; i++) {
            vec w_k = wide(w + k + i * W);
            __builtin_prefetch(w + m.K + k + i * W);
            EACH for (int r = 0; r < R; r++) sums[r][i] += load(x + r * x_row + k + i * W) * w_k;
        }
    for (int r = 0; r < R; r++) {
        vec all = sums[r][0];
        EACH for (int i = 1; i < U; i++) all += sums[r][i];
        float total = sum(all);
        for (long i = k; i < m.K; i++) total += x[r * x_row + i] * wide_one(w[i]);
        if (m.scale) total *= m.scale[n];
        if (m.bias) total += m.bias[n];
        y[r * m.N + n] = add ? y[r * m.N + n] + total : total;
    }
}

// x (rows, x_row), of which the first K count -> y (rows, N). All threads of a parallel region call
// this, and share the n.
template <class T>
static void product_of(const Matrix &m, long rows, const float *x, long x_row, float *y, bool add)
{
    for (; rows > 0; rows -= 4, x += 4 * x_row, y += 4 * m.N) {
        auto *of_rows = rows == 1 ? output<1, T> : rows == 2 ? output<2, T>
                      : rows == 3 ? output<3, T> : output<4, T>;
        #pragma omp for schedule(static)
        for (long n = 0; n < m.N; n++) of_rows(m, n, x, x_row, y, add);
    }
}

static void product(const Matrix &m, long rows, const float *x, long x_row, float *y, bool add)
{
    (m.type == FLOATS ? product_of<float> : m.type == BFLOATS ? product_of<bfloat>
                      : product_of<int8_t>)(m, rows, x, x_row, y, add);
}

static inline float sum_of_squares(const float *x, long size)
{
    vec all = {};
    long whole = size - size % W;
    for (long i = 0; i < whole; i += W) all += load(x + i) * load(x + i);
    float squares = sum(all);
    for (long i = whole; i < size; i++) squares += x[i] * x[i];
    return squares;
}

// x (rows, size) -> out, which may be x
static void normalize(const Norm &norm, long rows, long size, const float *x, float *out)
{
    size /= norm.groups;
    #pragma omp for schedule(static)
    for (long at = 0; at < rows * norm.groups; at++) {
        const float *from = x + at * size, *weight = norm.weight + at % norm.groups * size;
        float *to = out + at * size;
        float scale = 1 / std::sqrt(sum_of_squares(from, size) / size + norm.eps);
        for (long i = 0; i < size; i++) to[i] = from[i] * scale * weight[i];
    }
}

// u = silu of the convolution; of the inputs that it remembers the oldest one goes.
template <class S>
static void convolve(const Layer &l)
{
    long last = l.width - 1, first = l.headdim ? l.D : 0;
    #pragma omp for schedule(static)
    for (long at = 0; at < l.rows * l.channels; at += W) {
        long r = at / l.channels, d = at % l.channels;
        S *before = (S *)l.conv + r * last * l.channels + d;
        vec now = load(l.projected + r * l.in.N + first + d);
        vec u = now * load(l.taps + last * l.channels + d);
        if (l.conv_bias) u += load(l.conv_bias + d);
        for (long k = 0; k < last; k++, before += l.channels) {
            u += wide(before) * load(l.taps + k * l.channels + d);
            if (k + 1 < last)
                memcpy(before, before + l.channels, W * sizeof(S));
            else
                for (int i = 0; i < W; i++) put(now[i], before + i);
        }
        store(l.u + at, u * sigmoid(u));
    }
}

// h = decay h + x B, the N numbers of a channel, of which decay(n) is that of W numbers from n on;
// returns C . h
template <class Decay>
static inline float advance(long N, Decay decay, float x, const float *B, const float *C, float *h)
{
    vec total = {};
    long n = 0;
    for (; n + W <= N; n += W) {
        vec h_n = decay(n) * load(h + n) + load(B + n) * x;
        store(h + n, h_n);
        total += h_n * load(C + n);
    }
    float y = sum(total);
    if (n < N) {
        vec rest = decay(n);
        for (int i = 0; n + i < N; i++) {
            h[n + i] = rest[i] * h[n + i] + B[n + i] * x;
            y += h[n + i] * C[n + i];
        }
    }
    return y;
}

// Mamba-1: each channel has its delta, and each of its numbers its decay.
static void scan_channels(const Layer &l)
{
    #pragma omp for schedule(static)
    for (long at = 0; at < l.rows * l.D; at += W) {
        long r = at / l.D, d = at % l.D;
        const float *B = l.dtBC + r * (l.rank + 2 * l.N) + l.rank, *C = B + l.N;
        float delta[W], x[W], y[W];
        store(delta, softplus(load(l.delta + at)));
        store(x, load(delta) * load(l.u + at));
        for (int i = 0; i < W; i++) {
            const float *A2 = l.A2 + (d + i) * l.N;
            auto decay = [&](long n) { return exp2_of(load(A2 + n) * delta[i]); };
            y[i] = advance(l.N, decay, x[i], B, C, l.h + (at + i) * l.N);
        }
        store(l.y + at, load(y) + load(l.D_u + d) * load(l.u + at));
    }
}

// Mamba-2: all channels of a head have one delta, and all of their numbers one decay.
static void scan_heads(const Layer &l)
{
    long heads = l.D / l.headdim;
    const vec least = vec{} + float(l.dt_least), most = vec{} + float(l.dt_most);
    #pragma omp for schedule(static)
    for (long at = 0; at < l.rows * l.D; at += W) {
        long r = at / l.D, d = at % l.D, head = d / l.headdim;
        const float *u = l.u + r * l.channels, *dt = l.projected + (r + 1) * l.in.N - heads;
        const float *B = u + l.D + head * l.groups / heads * l.N, *C = B + l.groups * l.N;
        vec delta = softplus(vec{} + (dt[head] + l.dt_bias[head]));
        delta = delta < least ? least : delta;
        delta = delta > most ? most : delta;
        vec of_head = exp2_of(delta * l.A2[head]);
        auto decay = [&](long) { return of_head; };
        float x[W], y[W];
        store(x, delta * load(u + d));
        for (int i = 0; i < W; i++)
            y[i] = advance(l.N, decay, x[i], B, C, l.h + (at + i) * l.N);
        store(l.y + at, load(y) + load(u + d) * l.D_u[head]);
    }
}

// The norm of N numbers, their bias, and the first pairs turned by angles with these cosines and
// sines.
static void turn(const Turning &t, const Norm &norm, const float *from, const float *bias, long N,
                 const float *cosines, const float *sines, float *to)
{
    float scale = 1 / std::sqrt(sum_of_squares(from, N) / N + norm.eps);
    for (long i = 0; i < N; i++) to[i] = from[i] * scale * norm.weight[i] + bias[i];
    for (long i = 0; i < t.angles; i++) {
        float one = to[2 * i], other = to[2 * i + 1];
        to[2 * i] = one * cosines[i] - other * sines[i];
        to[2 * i + 1] = one * sines[i] + other * cosines[i];
    }
}

// Mamba-3: each head has a key and a query of its own.
static void scan_turning_heads(const Layer &l)
{
    const Turning &t = l.turning;
    const float circle = 6.28318531f;
    long P = l.headdim, H = l.D / P, N = l.N, S = t.angles, G = l.groups;
    #pragma omp for schedule(static)
    for (long at = 0; at < l.rows * H; at++) {
        long r = at / H, head = at % H;
        const float *z = l.projected + r * l.in.N, *x = z + l.D + head * P;
        const float *B = z + 2 * l.D + head * G / H * N, *C = B + G * N;
        const float *of_heads = z + 2 * l.D + 2 * G * N, *angles = of_heads + 3 * H;
        float delta = softplus(vec{} + (of_heads[head] + l.dt_bias[head]))[0];
        delta = delta < l.dt_least ? l.dt_least : delta;
        delta = delta > l.dt_most ? l.dt_most : delta;
        float rate = of_heads[H + head], open = sigmoid(vec{} + of_heads[2 * H + head])[0];
        rate = rate >= 0 ? 1 + rate : 1 / (1 - rate);
        rate = rate < t.A_floor ? t.A_floor : rate;
        vec decay = exp2_of(vec{} - delta * rate * 1.44269504f);
        float *k = l.dtBC + at * 2 * N, *q = k + N, *theta = t.theta + at * S;
        float *cosines = l.u + at * N, *sines = cosines + S;
        for (long i = 0; i < S; i++) {
            float at_most_1 = 2 * sigmoid(vec{} + 2 * angles[i])[0] - 1;     // tanh
            float turns = theta[i] / circle + at_most_1 * delta / 2;
            theta[i] = (turns - std::floor(turns)) * circle;
            cosines[i] = std::cos(theta[i]);
            sines[i] = std::sin(theta[i]);
        }
        turn(t, t.B_norm, B, t.B_bias + head * N, N, cosines, sines, k);
        turn(t, t.C_norm, C, t.C_bias + head * N, N, cosines, sines, q);
        float *k_before = t.k + at * N, *x_before = t.x + at * P, *h = l.h + at * P * N;
        for (long p = 0; p < P; p++, h += N) {
            float late = (1 - open) * delta * decay[0] * x_before[p], now = open * delta * x[p];
            vec total = {};
            for (long n = 0; n < N; n += W) {
                vec h_n = decay * load(h + n) + load(k_before + n) * late + load(k + n) * now;
                store(h + n, h_n);
                total += h_n * load(q + n);
            }
            l.y[at * P + p] = sum(total) + x[p] * l.D_u[head];
        }
        memcpy(k_before, k, N * sizeof(float));
        memcpy(x_before, x, P * sizeof(float));
    }
}

// y silu(z)
static void gate(const Layer &l)
{
    long first = l.headdim ? 0 : l.D;
    #pragma omp for schedule(static)
    for (long at = 0; at < l.rows * l.D; at += W) {
        vec z = load(l.projected + at / l.D * l.in.N + first + at % l.D);
        store(l.y + at, load(l.y + at) * z * sigmoid(z));
    }
}

extern "C" {

// To start other threads for a small matrix would take longer.
static int useful(int threads, const Matrix &m) { return m.N * m.K < 1 << 15 ? 1 : threads; }

// x (rows, K) -> y (rows, N)
void few_rows(int threads, const Matrix *m, long rows, const float *x, float *y)
{
    #pragma omp parallel num_threads(useful(threads, *m))
    product(*m, rows, x, m->K, y, false);
}

void layers(int threads, long count, const Layer *all)
{
    #pragma omp parallel num_threads(useful(threads, all->in))
    for (const Layer *l = all; l < all + count; l++) {
        NoTinyNumbers here;
        normalize(l->norm, l->rows, l->d_model, l->hidden, l->normed);
        product(l->in, l->rows, l->normed, l->d_model, l->projected, false);
        if (!l->turning.angles)
            (l->conv_type == FLOATS ? convolve<float> : convolve<bfloat>)(*l);
        if (l->turning.angles) {
            scan_turning_heads(*l);
        } else if (l->headdim) {
            scan_heads(*l);
        } else {
            product(l->x, l->rows, l->u, l->D, l->dtBC, false);
            product(l->dt, l->rows, l->dtBC, l->rank + 2 * l->N, l->delta, false);
            scan_channels(*l);
        }
        if (!l->norm_before_gate) gate(*l);
        if (l->gated_norm.weight) normalize(l->gated_norm, l->rows, l->D, l->y, l->y);
        if (l->norm_before_gate) gate(*l);
        product(l->out, l->rows, l->y, l->D, l->hidden, true);
    }
}

}
