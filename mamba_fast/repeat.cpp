// A list of calls to the GPU, made one after the other: what launch.py has written down of a
// function, for other memory. In Python each of them takes several times as long to make.
#include <cstdint>

using std::int64_t;

// cuLaunchKernel and cublasGemmEx, as CUDA's headers declare them; nonzero is an error
using Launch = int(void* function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                   unsigned shared, void* stream, void** arguments, void** options);
using Product = int(void* handle, int a_turned, int b_turned, int m, int n, int k,
                    const void* alpha, const void* a, int a_type, int a_step, const void* b,
                    int b_type, int b_step, const void* beta, void* c, int c_type, int c_step,
                    int compute_type, int algorithm);

constexpr int MOST = 64;            // arguments of a kernel
constexpr int IN_FLOAT32 = 68, BEST = -1;

// An address or a number, written down as two: of an address the memory, by its place in bases,
// and the distance from there; of a number -1 and itself.
static int64_t value(const int64_t* two, const int64_t* bases) {
    return two[0] < 0 ? two[1] : bases[two[0]] + two[1];
}

static int start(const int64_t* call, int64_t count, const int64_t* bases, void* stream,
                 Launch* launch) {
    int64_t values[MOST];
    void* arguments[MOST];
    for (int64_t i = 0; i < count; i++) {
        values[i] = value(call + 6 + 2 * i, bases);
        arguments[i] = values + i;
    }
    return launch(reinterpret_cast<void*>(call[0]), call[1], call[2], call[3], call[4], 1, 1,
                  call[5], stream, arguments, nullptr);
}

static int multiply(const int64_t* call, const int64_t* bases, void* blas, Product* product) {
    const float one = 1, beta = call[17];       // 0, or 1 to add to what is there
    auto at = [&](const int64_t* two) { return reinterpret_cast<void*>(value(two, bases)); };
    return product(blas, call[0], call[1], call[2], call[3], call[4], &one, at(call + 5), call[7],
                   call[8], at(call + 9), call[11], call[12], &beta, at(call + 13), call[15],
                   call[16], IN_FLOAT32, BEST);
}

// list: of each call how many numbers it has, whether it is a product, and these.
// Returns the first error, or 0.
extern "C" int repeat(const int64_t* list, int64_t calls, const int64_t* bases, void* stream,
                      void* blas, Launch* launch, Product* product) {
    for (int64_t i = 0; i < calls; i++) {
        const int64_t size = list[0], *call = list + 2;
        const int error = list[1] ? multiply(call, bases, blas, product)
                                  : start(call, (size - 6) / 2, bases, stream, launch);
        if (error) return error;
        list += 2 + size;
    }
    return 0;
}
