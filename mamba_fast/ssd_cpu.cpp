// The scan of Mamba-2 on a CPU: in_chunks of mamba2.py, forward and backward, by small matrix
// products. W floats form a vector (16 with AVX-512, 8 with AVX2, 4 with NEON); P and N, the
// channels of a head and the numbers of a channel's state, are multiples of W.
//
// A chunk has T steps. With the sums of a = log of the decay over runs of its steps,
//
//     since_t = exp(a_0 + ... + a_t)               from the chunk's start through step t
//     between_ts = exp(a_{s+1} + ... + a_t)        from s to t, for s < t
//     until_s = exp(a_{s+1} + ... + a_{T-1})       from s to the chunk's end
//     S_ts = (C_t . B_s) between_ts delta_s for s < t, and own_t for s = t
//
// the chunk computes y_t = since_t (h C_t) + sum over s of S_ts u_s, and the next state
// since_{T-1} h + sum over s of until_s delta_s u_s (outer) B_s. All sums are of numbers that lie
// side by side: no difference of two large sums is taken, which would be inexact.
//
// Matrices are dense and have the shapes that the comments give: (P, N) is P rows of N numbers.
// A name that ends in _t is a transposed matrix: u is (T, P), u_t is (P, T).
#include <algorithm>
#include <new>
#include <utility>
#include "conv.h"

constexpr int T = 16;                   // steps of a chunk
constexpr int KEPT = 4;                 // chunks from one kept state to the next
constexpr int V = T / W;                // vectors of a number for each step
constexpr int HEADS = 4;                // of a task, at most: sums must not depend on threads
constexpr int SUMS = W == 8 ? 8 : 16;   // vectors of a tile, of 16 registers with AVX2, else of 32

// ---- Vectors ------------------------------------------------------------------------------------

// The numbers first, first + 1, ... of a vector.
template <int... I>
static inline whole_numbers numbers(int first, std::integer_sequence<int, I...>)
{
    return whole_numbers{(first + I)...};
}
static const auto LANES = std::make_integer_sequence<int, W>();

// Where `before` is true, x, else 0.
static inline vec only(whole_numbers before, vec x)
{
    return (vec)(before & (whole_numbers)x);
}

// The lanes with these numbers of two vectors, those of the second from W on.
#if defined(__clang__)
#define CHOSEN(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define CHOSEN(a, b, ...) __builtin_shuffle(a, b, whole_numbers{__VA_ARGS__})
#endif

// Of each two lanes with numbers i and i + D, where i & D is 0, exchanges lane i + D of a with lane
// i of b. All D = 1, 2, 4, ... below W, of rows i and i + D, transpose a matrix.
template <int D, int... I>
static inline void exchange(vec &a, vec &b, std::integer_sequence<int, I...>)
{
    vec x = CHOSEN(a, b, (I & D ? W + I - D : I)...);
    b = CHOSEN(a, b, (I & D ? W + I : I + D)...);
    a = x;
}

template <int D>
static inline void transpose_from(vec *rows)
{
    if constexpr (D < W) {
        EACH
        for (int i = 0; i < W; i++)
            if (!(i & D)) exchange<D>(rows[i], rows[i + D], LANES);
        transpose_from<2 * D>(rows);
    }
}

// Lane i of the result is the sum of the lanes of rows[i]; overwrites the rows.
template <int D = 1>
static inline vec sums_of(vec *rows)
{
    if constexpr (D < W) {
        EACH
        for (int i = 0; i < W; i += 2 * D) {
            exchange<D>(rows[i], rows[i + D], LANES);
            rows[i] += rows[i + D];
        }
        return sums_of<2 * D>(rows);
    } else
        return rows[0];
}

// ---- Matrices -----------------------------------------------------------------------------------

// ROWS rows and VECS vectors of c = keep * old + a b, where b and c have `lanes` columns. All sums
// are in registers: for 16 multiplications of vectors 2 vectors and 8 numbers are loaded.
template <int ROWS, int VECS, bool turned>
static inline void tile(long K, const float *a, long stride, const float *b, long lanes, float *c,
                        float keep, const float *old)
{
    vec sums[ROWS][VECS];
    EACH
    for (int r = 0; r < ROWS; r++)
        EACH
        for (int v = 0; v < VECS; v++)
            sums[r][v] = old ? keep * load(old + r * lanes + v * W) : vec{};
    for (long k = 0; k < K; k++) {
        vec b_k[VECS];
        EACH
        for (int v = 0; v < VECS; v++) b_k[v] = load(b + k * lanes + v * W);
        EACH
        for (int r = 0; r < ROWS; r++) {
            float a_rk = turned ? a[k * stride + r] : a[r * stride + k];
            EACH
            for (int v = 0; v < VECS; v++) sums[r][v] += a_rk * b_k[v];
        }
    }
    EACH
    for (int r = 0; r < ROWS; r++)
        EACH
        for (int v = 0; v < VECS; v++) store(c + r * lanes + v * W, sums[r][v]);
}

template <int VECS, bool turned>
static void columns(long rows, long K, const float *a, const float *b, long lanes, float *c,
                    float keep, const float *old)
{
    constexpr int MOST = turned ? 16 : 8;       // if not turned, each row of a takes a pointer
    constexpr int ROWS = std::min({SUMS / VECS, W, MOST});
    for (long r = 0; r < rows; r += ROWS)
        tile<ROWS, VECS, turned>(K, turned ? a + r : a + r * K, turned ? rows : K, b, lanes,
                                 c + r * lanes, keep, old ? old + r * lanes : old);
}

// c = keep * old + a b, or a b without old. a is (rows, K), or turned (K, rows); b is (K, lanes); c
// and old are (rows, lanes). Multiples of W: rows and lanes.
template <bool turned>
static void multiply(long rows, long K, long lanes, const float *a, const float *b, float *c,
                     float keep = 0, const float *old = nullptr)
{
    long l = 0;
    for (; l + 2 * W <= lanes; l += 2 * W)
        columns<2, turned>(rows, K, a, b + l, lanes, c + l, keep, old ? old + l : old);
    if (l < lanes)
        columns<1, turned>(rows, K, a, b + l, lanes, c + l, keep, old ? old + l : old);
}
constexpr bool TURNED = true, PLAIN = false;

// to (lanes, rows) = from (rows, lanes)
static void transpose(long rows, long lanes, const float *from, float *to)
{
    for (long r = 0; r < rows; r += W)
        for (long l = 0; l < lanes; l += W) {
            vec block[W];
            EACH
            for (int i = 0; i < W; i++) block[i] = load(from + (r + i) * lanes + l);
            transpose_from<1>(block);
            EACH
            for (int i = 0; i < W; i++) store(to + (l + i) * rows + r, block[i]);
        }
}

// to = from, both (rows, T), with each row times scale, (T).
static void scale_lanes(long rows, const float *from, const float *scale, float *to)
{
    for (int v = 0; v < T; v += W) {
        vec scale_v = load(scale + v);
        for (long i = v; i < rows * T; i += T) store(to + i, load(from + i) * scale_v);
    }
}

// to = from, both (T, lanes), with row t times scale[t].
static void scale_rows(long lanes, const float *from, const float *scale, float *to)
{
    for (int t = 0; t < T; t++)
        for (long l = 0; l < lanes; l += W)
            store(to + t * lanes + l, load(from + t * lanes + l) * scale[t]);
}

// to (T, n): `steps` rows that lie `stride` apart, and behind them zeros.
static void copy_in(int steps, long n, const float *from, long stride, float *to)
{
    for (int t = 0; t < steps; t++)
        for (long i = 0; i < n; i += W) store(to + t * n + i, load(from + t * stride + i));
    memset(to + steps * n, 0, 4 * n * (T - steps));
}

// The same for one number of each step, and back.
static void copy_in(int steps, const float *from, long stride, float *to)
{
    for (int t = 0; t < T; t++) to[t] = t < steps ? from[t * stride] : 0;
}

static void copy_out(int steps, const float *from, float *to, long stride)
{
    for (int t = 0; t < steps; t++) to[t * stride] = from[t];
}

// to[t] = plain[t] + scale[t] * column t of turned, for `steps` rows of to, which lie `stride`
// apart. plain: (T, n).  turned: (n, T).
static void add_out(int steps, long n, const float *plain, const float *turned, const float *scale,
                    float *to, long stride)
{
    for (int t = 0; t < T; t += W) {
        vec scale_t = load(scale + t);
        for (long l = 0; l < n; l += W) {
            vec block[W];
            EACH
            for (int i = 0; i < W; i++) block[i] = load(turned + (l + i) * T + t) * scale_t;
            transpose_from<1>(block);
            EACH
            for (int i = 0; i < W; i++)
                if (t + i < steps)
                    store(to + (t + i) * stride + l, block[i] + load(plain + (t + i) * n + l));
        }
    }
}

// n: a multiple of 4 W
static float dot(long n, const float *a, const float *b)
{
    vec sums[4] = {};       // the additions of one sum would wait for each other
    for (long i = 0; i < n; i += 4 * W)
        EACH
        for (int j = 0; j < 4; j++) sums[j] += load(a + i + j * W) * load(b + i + j * W);
    vec lanes = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    float sum = 0;
    for (int i = 0; i < W; i++) sum += lanes[i];
    return sum;
}

// ---- What forward and backward share ------------------------------------------------------------

struct Sizes {
    long batch, length, heads, P, groups, N;
    long u_row, BC_row, delta_row;      // from one step to the next in u, in B and C, in delta
    long per_group() const { return heads / groups; }
    long runs() const { return (per_group() + HEADS - 1) / HEADS; }     // tasks of a group
    long tasks() const { return batch * groups * runs(); }
    long chunks() const { return (length + T - 1) / T; }
    long stretches() const { return (chunks() + KEPT - 1) / KEPT; }     // between kept states
    long in_stretch(long k) const { return std::min<long>(KEPT, chunks() - k * KEPT); }
    long size() const { return P * N; }                                 // of a state
    long state_at(long k, long b, long head) const
    {
        return ((k * batch + b) * heads + head) * size();
    }
};

// Of a block of Mamba-2, what is done before the scan, where that is to be done here, too. Then u
// is what the convolution reads, delta has no bias yet and is before softplus, and a = delta A and
// own = D + delta (C . B) are made here. grads: for each sequence the gradients of all five, one
// after the other, which have to be zeros.
struct BeforeScan {
    const float *A, *D, *dt_bias;       // (heads,)
    const float *taps, *bias;           // of the convolution, (K, heads P), (heads P,)
    float *grads;
    long K;
    float least, most;                  // delta lies between
    float *grads_of(const Sizes &n, long b) const
    {
        return grads + b * (3 * n.heads + (K + 1) * n.heads * n.P);
    }
};

struct Inputs {
    const float *u, *delta, *a, *B, *C, *own;
    const BeforeScan *before;                         // or null
    Channels channels(const Sizes &n, long b, long head) const
    {
        const Channels all = {n.u_row, n.heads * n.P, u + b * n.length * n.u_row, before->taps,
                              before->bias, nullptr};
        return all.from(head * n.P);
    }
};

// An array that starts with a cache line, so that no vector of it lies across two of them.
struct Floats {
    float *all;
    explicit Floats(long size) : all(new (std::align_val_t(64)) float[size]) {}
    ~Floats() { operator delete[](all, std::align_val_t(64)); }
    Floats(const Floats &) = delete;
    operator float *() const { return all; }
};

// The part of the work that a thread does by itself: a sequence, and some heads of a group.
struct Task {
    long b, group, run, first, last;        // heads first ... last - 1
    Task(const Sizes &n, long task)
    {
        run = task % n.runs(), group = task / n.runs() % n.groups, b = task / n.runs() / n.groups;
        first = group * n.per_group() + run * n.per_group() / n.runs();
        last = group * n.per_group() + (run + 1) * n.per_group() / n.runs();
    }
};

// A chunk of a task: what its heads share.
struct Chunk {
    const Sizes &n;
    long b, first, row;                     // of its first step, and that in (batch, length)
    int steps;                              // fewer than T at the end
    Floats B, C, B_t, C_t, scores;          // scores (T, T): C_t . B_s

    Chunk(const Sizes &n)
        : n(n), B(T * n.N), C(T * n.N), B_t(T * n.N), C_t(T * n.N), scores(T * T) {}

    void read(const Inputs &in, const Task &task, long number)
    {
        b = task.b, first = number * T, row = b * n.length + first;
        steps = std::min<long>(T, n.length - first);
        long at = row * n.BC_row + task.group * n.N;
        copy_in(steps, n.N, in.B + at, n.BC_row, B);
        copy_in(steps, n.N, in.C + at, n.BC_row, C);
        transpose(T, n.N, B, B_t);
        transpose(T, n.N, C, C_t);
        multiply<PLAIN>(T, n.N, T, C, B_t, scores);
    }
};

// A head of a chunk. In steps behind the end everything is 0, and they change nothing.
struct Head {
    const Sizes &n;
    Floats u, delta, slope, own, since, until, between, S, B_until;

    Head(const Sizes &n)
        : n(n), u(T * n.P), delta(T), slope(T), own(T), since(T), until(T), between(T * T),
          S(T * T), B_until(T * n.N) {}

    // slope_u: null, or where to write the slope of silu, (T, P)
    void read(const Inputs &in, const Chunk &chunk, long head, float *slope_u)
    {
        long at = chunk.row * n.heads + head;
        alignas(64) float a[T];
        copy_in(chunk.steps, in.delta + chunk.row * n.delta_row + head, n.delta_row, delta);
        if (in.before) {
            convolve(in, chunk, head, slope_u);
            open(*in.before, chunk, head, a);
        } else {
            copy_in(chunk.steps, n.P, in.u + chunk.row * n.u_row + head * n.P, n.u_row, u);
            copy_in(chunk.steps, in.own + at, n.heads, own);
            copy_in(chunk.steps, in.a + at, n.heads, a);
        }
        decays(a);
        for (int i = 0; i < T * T; i += W)
            store(S + i, load(chunk.scores + i) * load(between + i) * load(delta + i % T));
        for (int t = 0; t < T; t++) S[t * T + t] = own[t];
    }

    void convolve(const Inputs &in, const Chunk &chunk, long head, float *slope_u)
    {
        long K = in.before->K;
        auto steps = K == 4 ? forward_steps<4> : K == 3 ? forward_steps<3> : forward_steps<2>;
        const Channels of = in.channels(n, chunk.b, head);
        for (long p = 0; p < n.P; p += W)
            steps(chunk.first, chunk.first + chunk.steps, of.from(p), u + p,
                  slope_u ? slope_u + p : nullptr, n.P);
        memset(u + chunk.steps * n.P, 0, 4 * n.P * (T - chunk.steps));
    }

    // delta, a and own, and the slope of delta: how far each step opens
    void open(const BeforeScan &before, const Chunk &chunk, long head, float *a)
    {
        for (int v = 0; v < T; v += W) {
            vec x = load(delta + v) + before.dt_bias[head], wide = softplus(x);
            vec least = vec{} + before.least, most = vec{} + before.most;
            auto there = numbers(v, LANES) < chunk.steps;
            store(slope + v, only(there & (wide >= least) & (wide <= most), sigmoid(x)));
            wide = wide < least ? least : wide;
            wide = only(there, wide > most ? most : wide);
            store(delta + v, wide);
            store(a + v, wide * before.A[head]);
        }
        for (int t = 0; t < T; t++)
            own[t] = before.D[head] + delta[t] * chunk.scores[t * T + t];
    }

    // since, until and between
    void decays(const float *a)
    {
        const float per_log2 = 1.44269504f;     // exp(x) is exp2(x / log(2))
        float sum = 0;
        for (int t = 0; t < T; t++) since[t] = sum += a[t] * per_log2;
        for (int v = 0; v < T; v += W) {
            store(since + v, exp2_of(load(since + v)));
            whole_numbers s = numbers(v, LANES);
            vec sums = {}, decay;
            for (int t = 0; t < T; t++) {
                sums += only(s < t, vec{} + a[t] * per_log2);
                decay = exp2_of(sums);
                store(between + t * T + v, only(s < t, decay));
            }
            store(until + v, decay);
        }
    }

    // The state at the end of the chunk from h, that at its start; they may be the same
    void advance(const Chunk &chunk, const float *h, float *next)
    {
        alignas(64) float scale[T];
        for (int t = 0; t < T; t++) scale[t] = until[t] * delta[t];
        scale_rows(n.N, chunk.B, scale, B_until);
        multiply<TURNED>(n.P, T, n.N, u, B_until, next, since[T - 1], h);
    }
};

// The states of a task's heads, or their gradients: where they are given, or here, from zeros.
struct States {
    const Sizes &n;
    Floats here;                            // (HEADS, P, N)

    explicit States(const Sizes &n) : n(n), here(HEADS * n.size()) {}

    float *of(float *given, const Task &task, long head, bool begins)
    {
        if (given) return given + n.state_at(0, task.b, head);
        float *h = here + (head - task.first) * n.size();
        if (begins) memset(h, 0, 4 * n.size());
        return h;
    }
};

// ---- Forward ------------------------------------------------------------------------------------

struct Forward {
    const Sizes &n;
    Chunk chunks[KEPT] = {n, n, n, n};
    Head head;
    States states;
    Floats read_t, y;

    explicit Forward(const Sizes &n)
        : n(n), head(n), states(n), read_t(T * n.P), y(T * n.P) {}

    // y of a chunk of a head, whose state h becomes that at the chunk's end
    void step(const Chunk &chunk, float *h, float *y_out)
    {
        multiply<PLAIN>(n.P, n.N, T, h, chunk.C_t, read_t);
        multiply<PLAIN>(T, T, n.P, head.S, head.u, y);
        add_out(chunk.steps, n.P, y, read_t, head.since, y_out, n.heads * n.P);
        head.advance(chunk, h, h);
    }

    void run(const Inputs &in, const Task &task, float *state, float *y_out, float *kept)
    {
        for (long k = 0; k < n.stretches(); k++) {
            int count = n.in_stretch(k);
            for (int c = 0; c < count; c++) chunks[c].read(in, task, k * KEPT + c);
            for (long i = task.first; i < task.last; i++) {
                float *h = states.of(state, task, i, k == 0);
                if (kept) memcpy(kept + n.state_at(k, task.b, i), h, 4 * n.size());
                for (int c = 0; c < count; c++) {
                    head.read(in, chunks[c], i, nullptr);
                    step(chunks[c], h, y_out + (chunks[c].row * n.heads + i) * n.P);
                }
            }
        }
    }
};

// ---- Backward -----------------------------------------------------------------------------------

struct Outputs {
    float *u, *delta, *a, *B, *C, *own;     // gradients of the inputs
    long u_row, delta_row;
};

// A chunk, and what the heads add up for it: gradients of B, C and scores.
struct ChunkBackward : Chunk {
    Floats gB, gC, gscores;

    ChunkBackward(const Sizes &n) : Chunk(n), gB(T * n.N), gC(T * n.N), gscores(T * T) {}

    void read(const Inputs &in, const Task &task, long number)
    {
        Chunk::read(in, task, number);
        memset(gB, 0, 4 * T * n.N), memset(gC, 0, 4 * T * n.N), memset(gscores, 0, 4 * T * T);
    }

    void write(const Task &task, const Outputs &out)
    {
        multiply<PLAIN>(T, T, n.N, gscores, B, gC, 1, gC);
        multiply<TURNED>(T, T, n.N, gscores, C, gB, 1, gB);
        long stride = n.groups * n.N;
        long to = (task.run * n.batch * n.length + row) * stride + task.group * n.N;
        for (int t = 0; t < steps; t++) {
            memcpy(out.B + to + t * stride, gB + t * n.N, 4 * n.N);
            memcpy(out.C + to + t * stride, gC + t * n.N, 4 * n.N);
        }
    }
};

// The gradient of a product of decays goes to the logs of all of them. So the gradient of a_r is
// the sum of the gradients of the logs of since_t for r <= t, of until_s for s < r, and of
// between_ts for s < r <= t.
struct Backward {
    const Sizes &n;
    ChunkBackward chunks[KEPT] = {n, n, n, n};
    Head heads[KEPT] = {n, n, n, n};        // of one head, in each of the chunks
    Floats states;                          // (KEPT - 1, P, N), before all of them but the first
    States gstates;
    Floats gC, gy, u_t, read_t, gu, gS, gbetween;
    Floats gsilu, slope_u;                  // (KEPT T, P), for what the convolution gave

    explicit Backward(const Sizes &n)
        : n(n), states((KEPT - 1) * n.size()), gstates(n), gC(T * n.N), gy(T * n.P),
          u_t(T * n.P), read_t(T * n.P), gu(T * n.P), gS(T * T), gbetween(T * T),
          gsilu(KEPT * T * n.P), slope_u(KEPT * T * n.P) {}

    // What goes through S: gdelta, gscores += and gbetween; and gu, but for what is added in step.
    // gS_ts is gy_t . u_s.
    void through_S(ChunkBackward &chunk, const Head &head, float *gdelta)
    {
        multiply<PLAIN>(T, n.P, T, gy, u_t, gS);
        multiply<TURNED>(T, T, n.P, head.S, gy, gu);
        for (int v = 0; v < T; v += W) {
            vec delta = load(head.delta + v), sum = {};
            for (int i = v; i < T * T; i += T) {
                vec g = load(gS + i) * load(head.between + i), scores = load(chunk.scores + i);
                sum += g * scores;
                store(chunk.gscores + i, load(chunk.gscores + i) + g * delta);
                store(gbetween + i, g * delta * scores);
            }
            store(gdelta + v, sum);
        }
    }

    // What goes through the chunk's part of the next state, of which g is the gradient: gB +=,
    // gdelta += and guntil. Column s of read_t times scale[s] is its part of gu_s.
    void through_until(ChunkBackward &chunk, const Head &head, const float *g, float *gdelta,
                       float *guntil, float *scale)
    {
        multiply<PLAIN>(n.P, n.N, T, g, chunk.B_t, read_t);
        for (int v = 0; v < T; v += W) {
            vec delta = load(head.delta + v), until = load(head.until + v), sums[4] = {};
            for (long at = v; at < n.P * T; at += 4 * T)
                EACH
                for (int j = 0; j < 4; j++)
                    sums[j] += load(read_t + at + j * T) * load(u_t + at + j * T);
            vec sum = ((sums[0] + sums[1]) + (sums[2] + sums[3])) * until;
            store(gdelta + v, load(gdelta + v) + sum);
            store(guntil + v, sum * delta);
            store(scale + v, until * delta);
        }
        scale_lanes(n.P, u_t, scale, u_t);      // from here on, what is written into the state
        multiply<TURNED>(T, n.P, n.N, u_t, g, chunk.gB, 1, chunk.gB);
    }

    // What goes through the state h: gC += and gsince; and g becomes the gradient of h.
    void through_since(ChunkBackward &chunk, const Head &head, const float *h, float *g,
                       float *gsince)
    {
        scale_rows(n.P, gy, head.since, gy);    // from here on, that of what is read of h
        multiply<PLAIN>(T, n.P, n.N, gy, h, gC);
        for (int t = 0; t < T; t += W) {
            vec sums[W] = {};
            for (int i = 0; i < W; i++)
                for (long at = (t + i) * n.N; at < (t + i + 1) * n.N; at += W) {
                    vec gC_t = load(gC + at);
                    sums[i] += gC_t * load(chunk.C + at);
                    store(chunk.gC + at, load(chunk.gC + at) + gC_t);
                }
            store(gsince + t, sums_of(sums));
        }
        gsince[T - 1] += head.since[T - 1] * dot(n.size(), g, h);
        multiply<TURNED>(n.P, T, n.N, gy, chunk.C, g, head.since[T - 1], g);
    }

    // ga[r], from the last to the first
    void decays(const float *gsince, const float *guntil, float *ga)
    {
        vec later[V];       // of s: the sum of gbetween_ts for r <= t, and guntil_s
        for (int v = 0; v < V; v++) later[v] = load(guntil + v * W);
        for (int r = T - W; r >= 0; r -= W) {
            vec rows[W];
            for (int i = W - 1; i >= 0; i--) {
                rows[i] = vec{};
                for (int v = 0; v < V; v++) {
                    later[v] += load(gbetween + (r + i) * T + v * W);
                    rows[i] += only(numbers(v * W, LANES) < r + i, later[v]);
                }
            }
            store(ga + r, sums_of(rows));
        }
        float sum = 0;
        for (int r = T - 1; r >= 0; r--) ga[r] += sum += gsince[r];
    }

    // What goes through the block's delta, a and own: gdelta, that of what is before softplus, and
    // gscores.
    void through_open(const BeforeScan &before, ChunkBackward &chunk, const Head &head,
                      const float *ga, const float *gown, float *gdelta, long i)
    {
        float gA = 0, gD = 0, gbias = 0;
        for (int t = 0; t < T; t++) {
            gdelta[t] += ga[t] * before.A[i] + gown[t] * chunk.scores[t * T + t];
            gdelta[t] *= head.slope[t];
            chunk.gscores[t * T + t] += gown[t] * head.delta[t];
            gA += ga[t] * head.delta[t], gD += gown[t], gbias += gdelta[t];
        }
        float *sums = before.grads_of(n, chunk.b) + i;
        sums[0] += gA, sums[n.heads] += gD, sums[2 * n.heads] += gbias;
    }

    // What goes through the convolution of stretch k. The last steps of a stretch are read by the
    // next one, too, which has written what they get from it.
    void through_conv(const Inputs &in, const Task &task, long k, long i, const Outputs &out)
    {
        const BeforeScan &before = *in.before;
        long first = k * KEPT * T, end = std::min(first + KEPT * T, n.length), K = before.K;
        auto steps = K == 4 ? backward_steps<4> : K == 3 ? backward_steps<3> : backward_steps<2>;
        const Channels of = in.channels(n, task.b, i);
        for (long p = 0; p < n.P; p += W) {
            Sums sums = {};
            float *gx = out.u + task.b * n.length * out.u_row + i * n.P + p;
            steps(first, end, of.from(p), gsilu + p, slope_u + p, n.P, gx, out.u_row, nullptr,
                  sums);
            for (long j = std::max(0L, K - 1 - end); j < K - 1; j++) {
                float *at = gx + (end - (K - 1) + j) * out.u_row;
                store(at, end == n.length ? sums.gseen[j] : load(at) + sums.gseen[j]);
            }
            float *grads = before.grads_of(n, task.b) + 3 * n.heads + i * n.P + p;
            for (long j = 0; j < K + 1; j++, grads += of.D)
                store(grads, load(grads) + (j < K ? sums.gtaps[j] : sums.gbias));
        }
    }

    // A chunk of head i. g: the gradient of the state after it, and then of h, that before it.
    void step(ChunkBackward &chunk, const Head &head, const float *h, float *g, const Outputs &out,
              const BeforeScan *before, long i)
    {
        long at = chunk.row * n.heads + i;
        alignas(64) float gdelta[T], ga[T], gown[T], guntil[T], gsince[T], scale[T];
        transpose(T, n.P, head.u, u_t);
        through_S(chunk, head, gdelta);
        for (int t = 0; t < T; t++) gown[t] = gS[t * T + t];
        through_until(chunk, head, g, gdelta, guntil, scale);
        through_since(chunk, head, h, g, gsince);
        decays(gsince, guntil, ga);
        if (before) {
            through_open(*before, chunk, head, ga, gown, gdelta, i);
            add_out(chunk.steps, n.P, gu, read_t, scale, gsilu + chunk.first % (KEPT * T) * n.P,
                    n.P);
        } else {
            add_out(chunk.steps, n.P, gu, read_t, scale, out.u + chunk.row * out.u_row + i * n.P,
                    out.u_row);
            copy_out(chunk.steps, ga, out.a + at, n.heads);
            copy_out(chunk.steps, gown, out.own + at, n.heads);
        }
        copy_out(chunk.steps, gdelta, out.delta + chunk.row * out.delta_row + i, out.delta_row);
    }

    // h: the state of head i before each of the chunks, from that before the first, and heads
    void recompute(const Inputs &in, int count, long i, const float **h)
    {
        for (int c = 0; c < count; c++) {
            heads[c].read(in, chunks[c], i, slope_u + c * T * n.P);
            if (c + 1 == count) break;
            float *next = states + c * n.size();
            heads[c].advance(chunks[c], h[c], next);
            h[c + 1] = next;
        }
    }

    void run(const Inputs &in, const Task &task, const float *kept, const float *gy_in,
             float *gstate, const Outputs &out)
    {
        for (long k = n.stretches() - 1; k >= 0; k--) {
            int count = n.in_stretch(k);
            for (int c = 0; c < count; c++) chunks[c].read(in, task, k * KEPT + c);
            for (long i = task.first; i < task.last; i++) {
                const float *h[KEPT] = {kept + n.state_at(k, task.b, i)};
                float *g = gstates.of(gstate, task, i, k + 1 == n.stretches());
                recompute(in, count, i, h);
                for (int c = count - 1; c >= 0; c--) {
                    long at = chunks[c].row * n.heads + i;
                    copy_in(chunks[c].steps, n.P, gy_in + at * n.P, n.heads * n.P, gy);
                    step(chunks[c], heads[c], h[c], g, out, in.before, i);
                }
                if (in.before) through_conv(in, task, k, i, out);
            }
            for (int c = 0; c < count; c++) chunks[c].write(task, out);
        }
    }
};

// ---- What Python calls --------------------------------------------------------------------------

extern "C" {

// u, y (batch, length, heads, P); delta, a, own (batch, length, heads); B, C (batch, length,
// groups, N); the steps of u are u_row numbers apart, those of B and C BC_row, those of delta
// delta_row; state (batch, heads, P, N), which becomes the last one, or null for zeros; kept
// (stretches, batch, heads, P, N), the states before every KEPT chunks, or null. With before, a and
// own are null.
void forward(int threads, const BeforeScan *before, long batch, long length, long heads, long P,
             long groups, long N, long u_row, long BC_row, long delta_row, const float *u,
             const float *delta, const float *a, const float *B, const float *C, const float *own,
             float *state, float *y, float *kept)
{
    const Sizes n = {batch, length, heads, P, groups, N, u_row, BC_row, delta_row};
    const Inputs in = {u, delta, a, B, C, own, before};
    #pragma omp parallel num_threads(threads)
    {
        NoTinyNumbers here;
        Forward work(n);
        #pragma omp for schedule(dynamic)
        for (long task = 0; task < n.tasks(); task++)
            work.run(in, Task(n, task), state, y, kept);
    }
}

// gstate: that of the last state, becomes that of the first, or null for zeros. gB, gC: (runs,
// batch, length, groups, N), to be summed, where runs is the number of tasks of a group, per_group
// / HEADS rounded up. With before, ga and gown are null.
void backward(int threads, const BeforeScan *before, long batch, long length, long heads, long P,
              long groups, long N, long u_row, long BC_row, long delta_row, const float *u,
              const float *delta, const float *a, const float *B, const float *C, const float *own,
              const float *kept, const float *gy, float *gstate, long gu_row, long gdelta_row,
              float *gu, float *gdelta, float *ga, float *gB, float *gC, float *gown)
{
    const Sizes n = {batch, length, heads, P, groups, N, u_row, BC_row, delta_row};
    const Inputs in = {u, delta, a, B, C, own, before};
    const Outputs out = {gu, gdelta, ga, gB, gC, gown, gu_row, gdelta_row};
    #pragma omp parallel num_threads(threads)
    {
        NoTinyNumbers here;
        Backward work(n);
        #pragma omp for schedule(dynamic)
        for (long task = 0; task < n.tasks(); task++)
            work.run(in, Task(n, task), kept, gy, gstate, out);
    }
}

}
