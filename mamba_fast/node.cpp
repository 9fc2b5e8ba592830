// A plan of launch.py as an operation of PyTorch's autograd, ByPlan there, without Python: in the
// time that PyTorch takes to come to a backward pass in Python, this one has asked for all of it.
#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "repeat.cpp"

namespace py = pybind11;
using at::Tensor;
using Numbers = std::vector<int64_t>;
using Tensors = torch::autograd::variable_list;     // an undefined one is Python's None
using StreamOf = int(int device, void** stream);

static Launch* launch;
static Product* product;
static StreamOf* stream_of;
static PyObject* blas_handle;       // torch.cuda.current_blas_handle

struct Memory {
    Numbers shape;
    at::ScalarType dtype;
};

struct Result {
    int64_t from;       // the number of its memory, -1 for None
    bool is_all;        // of this memory; or else it lies there so
    Numbers shape, stride;
    int64_t start;
};

// What a Plan of launch.py has after its requests are written down.
struct Plan : torch::CustomClassHolder {
    std::string numbers;
    int64_t count;
    bool multiplies;
    std::vector<std::optional<Memory>> to_allocate;     // the last but one for what is kept
    std::vector<Result> results;
    Numbers kept_inputs;
    // By which gradients are asked for and given. They are added by the thread that reads them,
    // the one of PyTorch's autograd for this GPU.
    std::map<std::pair<uint64_t, uint64_t>, c10::intrusive_ptr<Plan>> plans_back;
    py::object back;    // the backward pass in Python; it keeps the kernels, too

    ~Plan() override {
        if (!Py_IsInitialized()) {
            back.release();
            return;
        }
        py::gil_scoped_acquire gil;
        back = py::object();
    }
};

static int64_t address_of(const Tensor& t) {
    return t.defined() ? reinterpret_cast<int64_t>(t.data_ptr()) : 0;
}

// cuBLAS for this thread, with PyTorch's stream and precision.
static void* blas() {
    py::gil_scoped_acquire gil;
    return reinterpret_cast<void*>(py::handle(blas_handle)().cast<int64_t>());
}

// Plan.repeat of launch.py: the results, and the memory of what is kept.
static std::pair<Tensors, Tensor> repeated(const Plan& plan, const Tensors& inputs) {
    const at::Device device = inputs[0].device();
    const at::TensorOptions there(device);
    const c10::DeviceGuard guard(device);
    const at::AutoDispatchBelowADInplaceOrView without_autograd;
    thread_local std::set<int> known;       // GPUs of which CUDA knows that this thread uses them
    if (known.insert(device.index()).second) at::zeros({1}, there);
    Tensors allocated, results;
    Numbers addresses;
    for (const Tensor& t : inputs) addresses.push_back(address_of(t));
    for (const auto& memory : plan.to_allocate) {
        allocated.emplace_back();
        if (memory) allocated.back() = at::empty(memory->shape, there.dtype(memory->dtype));
        addresses.push_back(address_of(allocated.back()));
    }
    void* stream = nullptr;
    stream_of(device.index(), &stream);
    const int error = repeat(reinterpret_cast<const int64_t*>(plan.numbers.data()), plan.count,
                             addresses.data(), stream, plan.multiplies ? blas() : nullptr,
                             launch, product);
    TORCH_CHECK(!error, "the GPU has refused a call: error ", error, " of CUDA or cuBLAS");
    for (const Result& r : plan.results)
        results.push_back(r.from < 0 ? Tensor() : r.is_all ? allocated[r.from]
                          : allocated[r.from].as_strided(r.shape, r.stride, r.start));
    return {results, allocated[allocated.size() - 2]};
}

static uint64_t bits(const std::vector<bool>& flags) {
    uint64_t all = 0;
    for (size_t i = 0; i < flags.size(); i++) all |= uint64_t(flags[i]) << i;
    return all;
}

static std::vector<bool> are_there(const Tensors& tensors) {
    std::vector<bool> there;
    for (const Tensor& t : tensors) there.push_back(t.defined());
    return there;
}

static py::tuple to_python(const Tensors& tensors) {
    py::tuple all(tensors.size());
    for (size_t i = 0; i < tensors.size(); i++) all[i] = py::cast(tensors[i]);
    return all;
}

static Tensors from_python(const py::sequence& all) {
    Tensors tensors;
    for (const auto t : all)
        tensors.push_back(t.is_none() ? Tensor() : THPVariable_Unpack(t.ptr()));
    return tensors;
}

struct ByPlan : torch::autograd::Function<ByPlan> {
    // there: the inputs but None, of which PyTorch is to know
    static Tensors forward(torch::autograd::AutogradContext* ctx,
                           const c10::intrusive_ptr<Plan>& plan, const Tensors* inputs,
                           at::TensorList there) {
        auto [results, memory] = repeated(*plan, *inputs);
        Tensors saved{memory};
        for (const int64_t i : plan->kept_inputs) saved.push_back((*inputs)[i]);
        ctx->save_for_backward(saved);
        ctx->saved_data["plan"] = c10::IValue::make_capsule(plan);
        ctx->saved_data["there"] = are_there(*inputs);
        ctx->set_materialize_grads(false);
        return results;
    }

    static Tensors backward(torch::autograd::AutogradContext* ctx, Tensors gradients) {
        const auto capsule = ctx->saved_data["plan"].toCapsule();
        const Plan& plan = *static_cast<Plan*>(capsule.get());
        const auto there = ctx->saved_data["there"].toBoolList();
        std::vector<bool> needs;
        size_t seen = 0;
        for (const bool is_there : there)
            needs.push_back(is_there && ctx->needs_input_grad(seen++));
        const Tensors saved = ctx->get_saved_variables();
        const auto found = plan.plans_back.find({bits(needs), bits(are_there(gradients))});
        const bool is_usual = found != plan.plans_back.end() && !at::GradMode::is_enabled()
                              && !at::globalContext().deterministicAlgorithms()
                              && c10::impl::TorchDispatchModeTLS::stack_len() == 0;
        const Tensors all = is_usual ? repeat_back(*found->second, saved, gradients)
                                     : in_python(capsule, needs, saved, gradients);
        Tensors made(2);        // of plan and inputs, which are no tensors
        for (size_t i = 0; i < all.size(); i++)
            if (there[i]) made.push_back(all[i]);
        return made;
    }

    static Tensors repeat_back(const Plan& plan, Tensors inputs, const Tensors& gradients) {
        for (const Tensor& gradient : gradients) {
            Tensor g = gradient.defined() ? gradient.contiguous() : gradient;
            if (address_of(g) % 16) g = g.clone();      // the kernels read 16 bytes at once
            inputs.push_back(g);
        }
        return repeated(plan, inputs).first;
    }

    static Tensors in_python(const c10::intrusive_ptr<torch::CustomClassHolder>& capsule,
                             const std::vector<bool>& needs, const Tensors& saved,
                             const Tensors& gradients) {
        py::gil_scoped_acquire gil;
        const auto plan = c10::static_intrusive_pointer_cast<Plan>(capsule);
        try {
            return from_python(plan->back(plan, needs, to_python(gradients), to_python(saved)));
        } catch (py::error_already_set& error) {    // with its type and its traceback
            error.restore();
            python_error raised;
            raised.persist();
            throw raised;
        }
    }
};

static py::tuple run(const c10::intrusive_ptr<Plan>& plan, const py::tuple& inputs) {
    const Tensors all = from_python(inputs);
    Tensors there, results;
    std::copy_if(all.begin(), all.end(), std::back_inserter(there),
                 [](const Tensor& t) { return t.defined(); });
    try {
        const py::gil_scoped_release no_gil;
        results = ByPlan::apply(plan, &all, at::TensorList(there));
    } catch (python_error& error) {     // from what saves tensors in the user's way
        error.restore();
        throw py::error_already_set();
    }
    return to_python(results);
}

// form_of_all of launch.py, as bytes
static py::bytes form(const py::tuple& inputs) {
    Numbers numbers, addresses;
    for (const Tensor& t : from_python(inputs)) {
        const int64_t address = address_of(t);
        const auto same = std::find(addresses.begin(), addresses.end(), address);
        numbers.push_back(address ? same - addresses.begin() : -1);
        addresses.push_back(address);
        if (!t.defined()) continue;
        numbers.insert(numbers.end(), {t.dim(), static_cast<int64_t>(t.scalar_type()),
                                       t.device().index(), address % 16});
        numbers.insert(numbers.end(), t.sizes().begin(), t.sizes().end());
        numbers.insert(numbers.end(), t.strides().begin(), t.strides().end());
    }
    return {reinterpret_cast<const char*>(numbers.data()), numbers.size() * sizeof(int64_t)};
}

static c10::intrusive_ptr<Plan> plan_of(std::string numbers, int64_t count, bool multiplies,
                                        const py::list& to_allocate, const py::list& results,
                                        Numbers kept_inputs, py::object back) {
    auto plan = c10::make_intrusive<Plan>();
    plan->numbers = std::move(numbers);
    plan->count = count;
    plan->multiplies = multiplies;
    plan->kept_inputs = std::move(kept_inputs);
    plan->back = std::move(back);
    for (const Tensor& t : from_python(to_allocate)) {
        plan->to_allocate.emplace_back();
        if (t.defined()) plan->to_allocate.back() = Memory{t.sizes().vec(), t.scalar_type()};
    }
    for (const auto r : results) {
        Result result{-1};
        if (!r.is_none()) {
            const auto [from, lies] = r.cast<std::pair<int64_t, py::object>>();
            result.from = from, result.is_all = lies.is_none();
            if (!result.is_all)
                std::tie(result.shape, result.stride, result.start)
                    = lies.cast<std::tuple<Numbers, Numbers, int64_t>>();
        }
        plan->results.push_back(result);
    }
    return plan;
}

static void add_back(Plan& plan, const std::vector<bool>& needs, const py::tuple& gradients,
                     const c10::intrusive_ptr<Plan>& back) {
    plan.plans_back[{bits(needs), bits(are_there(from_python(gradients)))}] = back;
}

// The addresses of cuLaunchKernel, cublasGemmEx and aoti_torch_get_current_cuda_stream.
static void use(int64_t launches, int64_t multiplies, int64_t gets_stream, py::object gets_blas) {
    launch = reinterpret_cast<Launch*>(launches);
    product = reinterpret_cast<Product*>(multiplies);
    stream_of = reinterpret_cast<StreamOf*>(gets_stream);
    blas_handle = gets_blas.release().ptr();
}

PYBIND11_MODULE(node, module) {
    py::class_<Plan, c10::intrusive_ptr<Plan>>(module, "Plan").def("add_back", &add_back);
    module.def("plan", &plan_of);
    module.def("run", &run);
    module.def("form", &form);
    module.def("use", &use);
}
