// The keys and queries of Mamba-3 with one step for each token, forward and backward. Of each token
// and head, with b of the head's group and its bias, the pair of numbers 2 i and 2 i + 1 turned by
// the angle theta_i:
//
//     k = turned(b + bias)    q = turned(c + other bias)    dots = k . q
//
// And before that the angles, as parts of a turn in [0, 1): since_t = first + turns_0 + ... + turns_t.
//
// Shapes: turns, since (batch, L, X); first (batch, X); b, c and their gradients (tokens, G, N); biases (H, N); theta (tokens, H, S); k, q
// (tokens, H, N); dots (tokens, H). Pairs from S on are not turned. X and S are multiples of W, N of
// 2 W.
#include "vectors.h"

constexpr long ROWS = 64;       // tokens of a task: a fixed number, as sums must not depend on threads

// The nearest whole number: from 1.5 * 2^23 on floats are the whole numbers.
static inline vec whole(vec x) { return (x + 12582912.f) - 12582912.f; }

// cos and sin of angles around [0, 2 pi]: those of what is left of a quarter turn, by their series
// up to 1/8 turn, which change places and signs with the number of the quarter.
static inline void cos_and_sin(vec angle, vec &cos, vec &sin)
{
    vec quarters = whole(angle * 0.636619772f);
    whole_numbers quarter = (whole_numbers)(quarters + 12582912.f);     // whose last bits count
    vec rest = angle - quarters * 1.57079601f - quarters * 3.13916473e-7f;
    vec square = rest * rest;
    vec s = -1.9515296e-4f * square + 8.3321609e-3f;
    s = s * square - 1.6666654e-1f;
    s = s * square * rest + rest;
    vec c = 2.4433157e-5f * square - 1.3887316e-3f;
    c = c * square + 4.1666645e-2f;
    c = c * square * square - 0.5f * square + 1.f;
    whole_numbers odd = -(quarter & 1);                 // all bits of a lane, or none
    whole_numbers sin_bits = ((whole_numbers)c & odd) | ((whole_numbers)s & ~odd);
    whole_numbers cos_bits = ((whole_numbers)s & odd) | ((whole_numbers)c & ~odd);
    sin = (vec)(sin_bits ^ ((quarter & 2) << 30));
    cos = (vec)(cos_bits ^ (((quarter + 1) & 2) << 30));
}

// (-b, a) of each pair (a, b): turned by a quarter
static inline vec quarter_turned(vec v)
{
    vec other = v;
    EACH for (int i = 0; i < W; i++) other[i] = i % 2 ? v[i - 1] : -v[i + 1];
    return other;
}

// W angles as factors of 2 W numbers, each for both numbers of its pair: half by half
struct Turn {
    vec cos[2], sin[2];
    Turn(const float *theta)
    {
        vec c, s;
        cos_and_sin(load(theta), c, s);
        EACH for (int half = 0; half < 2; half++)
            EACH for (int i = 0; i < W; i++) {
                cos[half][i] = c[half * (W / 2) + i / 2];
                sin[half][i] = s[half * (W / 2) + i / 2];
            }
    }
    vec turned(vec v, int half) const { return v * cos[half] + quarter_turned(v) * sin[half]; }
    vec back(vec v, int half) const { return v * cos[half] - quarter_turned(v) * sin[half]; }
};

extern "C" {

void sums(int threads, long batch, long L, long X, const float *turns, const float *first,
          float *since)
{
    #pragma omp parallel for num_threads(threads)
    for (long task = 0; task < batch * X / W; task++) {
        NoTinyNumbers here;
        long start = task / (X / W) * L * X + task % (X / W) * W;
        // as in mamba3.py coarse is exact; lost: what rounding has added to rest so far
        vec coarse = {}, rest = load(first + task * W), lost = {};
        for (long at = start; at < start + L * X; at += X) {
            vec turn = load(turns + at), steps = whole(turn * 1024.f) / 1024.f;
            coarse += steps;
            coarse -= whole(coarse);
            vec more = turn - steps - lost, next = rest + more;
            lost = next - rest - more;
            rest = next;
            vec sum = coarse + rest;
            sum -= whole(sum);                              // in [-1/2, 1/2]
            store(since + at, sum < 0 ? sum + 1.f : sum);
        }
    }
}

void sums_backward(int threads, long batch, long L, long X, const float *gsince, float *gturns,
                   float *gfirst)
{
    #pragma omp parallel for num_threads(threads)
    for (long task = 0; task < batch * X / W; task++) {
        NoTinyNumbers here;
        long start = task / (X / W) * L * X + task % (X / W) * W;
        vec sum = {};
        for (long at = start + (L - 1) * X; at >= start; at -= X)
            store(gturns + at, sum += load(gsince + at));
        store(gfirst + task * W, sum);
    }
}

void forward(int threads, long tokens, long H, long G, long N, long S, const float *b,
             const float *c, const float *b_bias, const float *c_bias, const float *theta,
             float *k, float *q, float *dots)
{
    #pragma omp parallel for num_threads(threads)
    for (long token = 0; token < tokens; token++)
        for (long h = 0; h < H; h++) {
            long group = (token * G + h / (H / G)) * N, head = token * H + h;
            vec products = {};
            for (long n = 0; n < N; n += 2 * W) {
                vec k_n[2], q_n[2];
                EACH for (int i = 0; i < 2; i++) {
                    k_n[i] = load(b + group + n + i * W) + load(b_bias + h * N + n + i * W);
                    q_n[i] = load(c + group + n + i * W) + load(c_bias + h * N + n + i * W);
                }
                if (n / 2 < S) {
                    const Turn turn(theta + head * S + n / 2);
                    EACH for (int i = 0; i < 2; i++) {
                        k_n[i] = turn.turned(k_n[i], i);
                        q_n[i] = turn.turned(q_n[i], i);
                    }
                }
                EACH for (int i = 0; i < 2; i++) {
                    products += k_n[i] * q_n[i];
                    store(k + head * N + n + i * W, k_n[i]);
                    store(q + head * N + n + i * W, q_n[i]);
                }
            }
            dots[head] = sum(products);
        }
}

// gb, gc and the gradients of the biases, (tasks, H, N), are added to; the latter are still to be
// summed over the tasks.
void backward(int threads, long tokens, long H, long G, long N, long S, const float *theta,
              const float *k, const float *q, const float *gk, const float *gq,
              const float *gdots, float *gb, float *gc, float *gb_bias, float *gc_bias,
              float *gtheta)
{
    #pragma omp parallel for num_threads(threads)
    for (long task = 0; task < (tokens + ROWS - 1) / ROWS; task++) {
        NoTinyNumbers here;
        for (long token = task * ROWS; token < tokens && token < (task + 1) * ROWS; token++)
            for (long h = 0; h < H; h++) {
                long group = (token * G + h / (H / G)) * N, head = token * H + h;
                long bias = (task * H + h) * N;
                for (long n = 0; n < N; n += 2 * W) {
                    vec gk_n[2], gq_n[2], along[2];     // along: of each number, for its angle
                    EACH for (int i = 0; i < 2; i++) {
                        long at = head * N + n + i * W;
                        vec k_n = load(k + at), q_n = load(q + at);
                        gk_n[i] = load(gk + at) + gdots[head] * q_n;
                        gq_n[i] = load(gq + at) + gdots[head] * k_n;
                        along[i] = gk_n[i] * quarter_turned(k_n) + gq_n[i] * quarter_turned(q_n);
                    }
                    if (n / 2 < S) {
                        const Turn turn(theta + head * S + n / 2);
                        vec of_pairs;
                        EACH for (int i = 0; i < W; i++) {
                            const vec &half = along[i / (W / 2)];
                            of_pairs[i] = half[2 * i % W] + half[2 * i % W + 1];
                        }
                        store(gtheta + head * S + n / 2, of_pairs);
                        EACH for (int i = 0; i < 2; i++) {
                            gk_n[i] = turn.back(gk_n[i], i);
                            gq_n[i] = turn.back(gq_n[i], i);
                        }
                    }
                    EACH for (int i = 0; i < 2; i++) {
                        long at = n + i * W;
                        store(gb + group + at, load(gb + group + at) + gk_n[i]);
                        store(gc + group + at, load(gc + group + at) + gq_n[i]);
                        store(gb_bias + bias + at, load(gb_bias + bias + at) + gk_n[i]);
                        store(gc_bias + bias + at, load(gc_bias + bias + at) + gq_n[i]);
                    }
                }
            }
    }
}

}
