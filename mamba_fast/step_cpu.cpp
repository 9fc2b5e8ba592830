// The step of a token on a CPU: products of a few rows with a matrix, y = (x w^T) scale + bias, and
// with them a whole layer of Mamba-1. Such a product takes as long as reading w does, so w is read
// once for up to four rows, by all threads, and in its own type: floats, bfloat16 (the upper half
// of a float), or 8 bits. All else is in float32.
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

// A layer with its state, and memory for what it computes: hidden (rows, d_model) is what enters
// and leaves; normed is like it; xz (rows, 2 D); u, delta, y (rows, D); dtBC (rows, rank + 2 N).
// taps (width, D); A2 (D, N), divided by ln 2; conv (rows, width - 1, D), of this type; h (rows, D,
// N). D is a multiple of W.
struct Layer {
    long rows, d_model, D, N, rank, width;
    double eps;
    Type conv_type;
    const float *norm, *taps, *conv_bias, *A2, *D_u;
    Matrix in, x, dt, out;
    void *conv;
    float *h, *hidden, *normed, *xz, *u, *dtBC, *delta, *y;
};

}

// R rows of x with row n of w, U vectors at a time: as many for any R, so that a row gets the same
// bits in any company. To go through more rows of w side by side is slower: memory likes to be read
// in order.
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

// What is inside of a parallel region: x (rows, x_row), of which the first K count -> y (rows, N).
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

static void normalize(const Layer &l)
{
    #pragma omp for
    for (long r = 0; r < l.rows; r++) {
        const float *x = l.hidden + r * l.d_model;
        vec all = {};
        long whole = l.d_model - l.d_model % W;
        for (long i = 0; i < whole; i += W) all += load(x + i) * load(x + i);
        float squares = sum(all), *out = l.normed + r * l.d_model;
        for (long i = whole; i < l.d_model; i++) squares += x[i] * x[i];
        float size = 1 / std::sqrt(squares / l.d_model + l.eps);
        for (long i = 0; i < l.d_model; i++) out[i] = x[i] * size * l.norm[i];
    }
}

// u, and the inputs of the convolution move up by one.
template <class S>
static void convolve(const Layer &l)
{
    #pragma omp for schedule(static)
    for (long at = 0; at < l.rows * l.D; at += W)
        for (long i = at; i < at + W; i++) {
            long r = i / l.D, d = i % l.D;
            S *before = (S *)l.conv + r * (l.width - 1) * l.D + d;
            float now = l.xz[r * 2 * l.D + d], sum = l.conv_bias ? l.conv_bias[d] : 0;
            sum += now * l.taps[(l.width - 1) * l.D + d];
            for (long k = 0; k + 1 < l.width; k++) {
                sum += wide_one(before[k * l.D]) * l.taps[k * l.D + d];
                if (k + 2 < l.width) before[k * l.D] = before[(k + 1) * l.D];
                else put(now, before + k * l.D);
            }
            l.u[i] = sum;
        }
}

// The state of a channel and its y = C . h
static inline float advance(const Layer &l, float delta, float x, const float *A2, const float *B,
                            const float *C, float *h)
{
    vec total = {};
    long n = 0;
    for (; n + W <= l.N; n += W) {
        vec h_n = exp2_of(load(A2 + n) * delta) * load(h + n) + load(B + n) * x;
        store(h + n, h_n);
        total += h_n * load(C + n);
    }
    float y = sum(total);
    for (; n < l.N; n++) {
        h[n] = std::exp2(A2[n] * delta) * h[n] + B[n] * x;
        y += h[n] * C[n];
    }
    return y;
}

static void scan(const Layer &l)
{
    #pragma omp for schedule(static)
    for (long at = 0; at < l.rows * l.D; at += W) {
        long r = at / l.D, d = at % l.D;
        const float *BC = l.dtBC + r * (l.rank + 2 * l.N) + l.rank;
        float delta[W], x[W], y[W];
        store(delta, softplus(load(l.delta + at)));
        store(x, load(delta) * load(l.u + at));
        for (int i = 0; i < W; i++)
            y[i] = advance(l, delta[i], x[i], l.A2 + (d + i) * l.N, BC, BC + l.N,
                           l.h + (at + i) * l.N);
        vec z = load(l.xz + r * 2 * l.D + l.D + d);
        store(l.y + at, (load(y) + load(l.D_u + d) * load(l.u + at)) * z * sigmoid(z));
    }
}

static void silu(long size, float *x)
{
    #pragma omp for schedule(static)
    for (long at = 0; at < size; at += W) store(x + at, load(x + at) * sigmoid(load(x + at)));
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
        normalize(*l);
        product(l->in, l->rows, l->normed, l->d_model, l->xz, false);
        (l->conv_type == FLOATS ? convolve<float> : convolve<bfloat>)(*l);
        silu(l->rows * l->D, l->u);
        product(l->x, l->rows, l->u, l->D, l->dtBC, false);
        product(l->dt, l->rows, l->dtBC, l->rank + 2 * l->N, l->delta, false);
        scan(*l);
        product(l->out, l->rows, l->y, l->D, l->hidden, true);
    }
}

}
