// Makes the calls to the GPU that launch.py has written down, with the addresses of other tensors.
// In Python each of them would take several times as long.
#include <cstdint>

using std::int64_t;

// cuLaunchKernel and cublasGemmEx, as CUDA's headers declare them; nonzero is an error
using Launch = int(void* function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                   unsigned shared, void* stream, void** arguments, void** options);
using Product = int(void* handle, int a_turned, int b_turned, int m, int n, int k,
                    const void* alpha, const void* a, int a_type, int a_stride, const void* b,
                    int b_type, int b_stride, const void* beta, void* c, int c_type, int c_stride,
                    int compute_type, int algorithm);

constexpr int MOST_ARGUMENTS = 64;      // of a kernel, as in launch.py
constexpr int COMPUTE_32F = 68, DEFAULT = -1;

// A pair (which, distance) is the address addresses[which] + distance; (-1, n) is the number n.
static int64_t resolved(const int64_t* pair, const int64_t* addresses) {
    return pair[0] < 0 ? pair[1] : addresses[pair[0]] + pair[1];
}

// call: function, grid (3), threads, shared memory, then a pair for each argument
static int start(const int64_t* call, int64_t count, const int64_t* addresses, void* stream,
                 Launch* launch) {
    int64_t values[MOST_ARGUMENTS];     // of which a parameter of 32 bits has the low half
    void* arguments[MOST_ARGUMENTS];
    for (int64_t i = 0; i < count; i++) {
        values[i] = resolved(call + 6 + 2 * i, addresses);
        arguments[i] = values + i;
    }
    return launch(reinterpret_cast<void*>(call[0]), call[1], call[2], call[3], call[4], 1, 1,
                  call[5], stream, arguments, nullptr);
}

// call: whether a and b are turned, m, n, k, then a pair, type and stride for each of a, b and c,
// then 1 to add to what is in c
static int multiply(const int64_t* call, const int64_t* addresses, void* blas, Product* product) {
    const float one = 1, beta = call[17];
    auto at = [&](const int64_t* pair) {
        return reinterpret_cast<void*>(resolved(pair, addresses));
    };
    return product(blas, call[0], call[1], call[2], call[3], call[4], &one, at(call + 5), call[7],
                   call[8], at(call + 9), call[11], call[12], &beta, at(call + 13), call[15],
                   call[16], COMPUTE_32F, DEFAULT);
}

// list: for each call how many numbers it has, 1 for a product or 0 for a kernel, and the numbers.
// Returns the first error, or 0.
extern "C" int repeat(const int64_t* list, int64_t calls, const int64_t* addresses, void* stream,
                      void* blas, Launch* launch, Product* product) {
    for (int64_t i = 0; i < calls; i++) {
        const int64_t size = list[0], *call = list + 2;
        const int error = list[1] ? multiply(call, addresses, blas, product)
                                  : start(call, (size - 6) / 2, addresses, stream, launch);
        if (error) return error;
        list += 2 + size;
    }
    return 0;
}
