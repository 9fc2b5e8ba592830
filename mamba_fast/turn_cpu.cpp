// What turns the states of Mamba-3, forward and backward. First the sums of what each step turns
// them by, as parts of a whole turn, in [0, 1]:
//
//     since_t = first + turns_0 + ... + turns_t    modulo 1
//
// Then, if there is one step for each token, the keys and queries. Of b and c of a head's group and
// a bias each pair of numbers 2 i and 2 i + 1 is rotated by the angle theta_i, in radians:
//
//     k = rotated(b + b_bias)    q = rotated(c + c_bias)    dots = k . q
//
// Shapes: turns, since (batch, L, X), where X is all angles of all heads; first (batch, X); b, c
// (tokens, G, N); biases (H, N); theta (tokens, H, S); k, q (tokens, H, N); dots (tokens, H). A
// gradient has the shape of what it belongs to, but those of the biases have one more dimension.
// Pairs from S on are not rotated. X and S are multiples of W, N is one of 2 W.
#include "vectors.h"

constexpr long ROWS = 64;       // tokens of a task: fixed, as sums must not depend on threads

// x rounded to a whole number, for |x| < 2^22: around 1.5 * 2^23 floats are the whole numbers.
static inline vec whole(vec x) { return (x + 12582912.f) - 12582912.f; }

// Of an angle in [0, 2 pi], or not far from it. It is a number of quarter turns and a rest of at
// most 1/8 turn. Of the rest series give cos and sin; each quarter makes -sin and cos of them.
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

// Each pair (a, b) becomes (-b, a).
static inline vec quarter_turned(vec v)
{
    vec other = v;
    EACH for (int i = 0; i < W; i++) other[i] = i % 2 ? v[i - 1] : -v[i + 1];
    return other;
}

// Rotates W pairs, which fill two vectors; both numbers of a pair get its cos and sin.
struct Rotation {
    vec cos[2], sin[2];
    Rotation(const float *theta)
    {
        vec c, s;
        cos_and_sin(load(theta), c, s);
        EACH for (int half = 0; half < 2; half++)
            EACH for (int i = 0; i < W; i++) {
                cos[half][i] = c[half * (W / 2) + i / 2];
                sin[half][i] = s[half * (W / 2) + i / 2];
            }
    }
    vec of(vec v, int half) const { return v * cos[half] + quarter_turned(v) * sin[half]; }
    vec back(vec v, int half) const { return v * cos[half] - quarter_turned(v) * sin[half]; }
};

extern "C" {

void angles(int threads, long batch, long L, long X, const float *turns, const float *first,
          float *since)
{
    #pragma omp parallel for num_threads(threads)
    for (long task = 0; task < batch * X / W; task++) {
        NoTinyNumbers here;
        long start = task / (X / W) * L * X + task % (X / W) * W;
        // coarse is exact, as in mamba3.py. excess is the rounding error of the last addition to
        // rest; the next one subtracts it.
        vec coarse = {}, rest = load(first + task * W), excess = {};
        for (long at = start; at < start + L * X; at += X) {
            vec turn = load(turns + at), coarse_part = whole(turn * 1024.f) / 1024.f;
            coarse += coarse_part;
            coarse -= whole(coarse);
            vec rest_part = turn - coarse_part - excess, next = rest + rest_part;
            excess = next - rest - rest_part;
            rest = next;
            vec angle = coarse + rest;
            angle -= whole(angle);                          // in [-1/2, 1/2]
            store(since + at, angle < 0 ? angle + 1.f : angle);
        }
    }
}

void angles_backward(int threads, long batch, long L, long X, const float *gsince, float *gturns,
                   float *gfirst)
{
    #pragma omp parallel for num_threads(threads)
    for (long task = 0; task < batch * X / W; task++) {
        NoTinyNumbers here;
        long start = task / (X / W) * L * X + task % (X / W) * W;
        vec total = {};
        for (long at = start + (L - 1) * X; at >= start; at -= X)
            store(gturns + at, total += load(gsince + at));
        store(gfirst + task * W, total);
    }
}

void forward(int threads, long tokens, long H, long G, long N, long S, const float *b,
             const float *c, const float *b_bias, const float *c_bias, const float *theta,
             float *k, float *q, float *dots)
{
    #pragma omp parallel for num_threads(threads)
    for (long token = 0; token < tokens; token++) {
        NoTinyNumbers here;
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
                    const Rotation rotation(theta + head * S + n / 2);
                    EACH for (int i = 0; i < 2; i++) {
                        k_n[i] = rotation.of(k_n[i], i);
                        q_n[i] = rotation.of(q_n[i], i);
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
                    vec gk_n[2], gq_n[2];
                    vec gangle[2];      // the two numbers of a pair add up to that of its angle
                    EACH for (int i = 0; i < 2; i++) {
                        long at = head * N + n + i * W;
                        vec k_n = load(k + at), q_n = load(q + at);
                        gk_n[i] = load(gk + at) + gdots[head] * q_n;
                        gq_n[i] = load(gq + at) + gdots[head] * k_n;
                        gangle[i] = gk_n[i] * quarter_turned(k_n) + gq_n[i] * quarter_turned(q_n);
                    }
                    if (n / 2 < S) {
                        const Rotation rotation(theta + head * S + n / 2);
                        vec of_pairs;
                        EACH for (int i = 0; i < W; i++) {
                            const vec &half = gangle[i / (W / 2)];
                            of_pairs[i] = half[2 * i % W] + half[2 * i % W + 1];
                        }
                        store(gtheta + head * S + n / 2, of_pairs);
                        EACH for (int i = 0; i < 2; i++) {
                            gk_n[i] = rotation.back(gk_n[i], i);
                            gq_n[i] = rotation.back(gq_n[i], i);
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
