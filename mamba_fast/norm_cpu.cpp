// RMSNorm, and the gated norm of Mamba-2, forward and backward: of each row, and each of its groups
// of D numbers
//
//     gated = y silu(z)    out = gated size weight    size = 1 / sqrt(mean of gated^2 + eps)
//
// so that each number comes from memory once. Without z, gated is y. Shapes: y, out and the
// gradients (rows, groups * D); the rows of z and of its gradient are z_row and gz_row numbers
// apart; weight (groups * D,). D is a multiple of W.
#include "vectors.h"
#include <cmath>

constexpr long ROWS = 64;       // of a task: a fixed number, as sums must not depend on threads

struct Gate {
    vec open, slope;    // silu(z), and its derivative
};

static inline Gate gate(const float *z, long d)
{
    if (!z) return {vec{} + 1.f, vec{}};
    vec z_v = load(z + d), s = sigmoid(z_v);
    return {z_v * s, s * (1.f + z_v * (1.f - s))};
}

extern "C" {

void forward(int threads, long rows, long groups, long D, long z_row, const float *y,
             const float *z, const float *weight, float eps, float *out)
{
    #pragma omp parallel num_threads(threads)
    {
        NoTinyNumbers here;
        #pragma omp for
        for (long row = 0; row < rows; row++)
            for (long first = 0; first < groups * D; first += D) {
                const float *y_d = y + row * groups * D + first;
                const float *z_d = z ? z + row * z_row + first : nullptr;
                float *out_d = out + row * groups * D + first;
                vec squares = {};
                for (long d = 0; d < D; d += W) {
                    vec gated = load(y_d + d) * gate(z_d, d).open;
                    store(out_d + d, gated);
                    squares += gated * gated;
                }
                float size = 1 / std::sqrt(sum(squares) / D + eps);
                for (long d = 0; d < D; d += W)
                    store(out_d + d, load(out_d + d) * size * load(weight + first + d));
            }
    }
}

// gweight (tasks, groups * D), which has to be zeros, is still to be summed over the tasks. out:
// null, or where to write what forward gave.
void backward(int threads, long rows, long groups, long D, long z_row, const float *y,
              const float *z, const float *weight, float eps, const float *gout, float *gy,
              long gz_row, float *gz, float *gweight, float *out)
{
    #pragma omp parallel for num_threads(threads)
    for (long task = 0; task < (rows + ROWS - 1) / ROWS; task++) {
        NoTinyNumbers here;
        for (long row = task * ROWS; row < rows && row < (task + 1) * ROWS; row++)
            for (long first = 0; first < groups * D; first += D) {
                long at = row * groups * D + first;
                const float *z_d = z ? z + row * z_row + first : nullptr;
                const float *weight_d = weight + first;
                float *gweight_d = gweight + task * groups * D + first;
                float *gy_d = gy + at, *gz_d = z ? gz + row * gz_row + first : nullptr;
                vec squares = {}, along = {};       // along: gout weight . gated
                for (long d = 0; d < D; d += W) {
                    Gate g = gate(z_d, d);
                    if (z) store(gy_d + d, g.open), store(gz_d + d, g.slope);   // until below
                    vec gated = load(y + at + d) * g.open;
                    squares += gated * gated;
                    along += load(gout + at + d) * load(weight_d + d) * gated;
                }
                float size = 1 / std::sqrt(sum(squares) / D + eps);
                float less = sum(along) * size * size / D;
                for (long d = 0; d < D; d += W) {
                    vec open = z ? load(gy_d + d) : vec{} + 1.f;
                    vec y_v = load(y + at + d), gated = y_v * open, gout_v = load(gout + at + d);
                    vec ggated = size * (gout_v * load(weight_d + d) - less * gated);
                    store(gweight_d + d, load(gweight_d + d) + gout_v * gated * size);
                    if (out) store(out + at + d, gated * size * load(weight_d + d));
                    store(gy_d + d, ggated * open);
                    if (z) store(gz_d + d, ggated * y_v * load(gz_d + d));
                }
            }
    }
}

}
