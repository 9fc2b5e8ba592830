// ByPlan of launch.py in C++, so that to repeat a plan PyTorch does not wait for Python. Python is
// asked for cuBLAS's handle, if the plan has products, and for a backward pass that no plan fits.
#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>

#include "repeat.cpp"

namespace py = pybind11;
using at::Tensor;
using Flags = std::vector<bool>;
using Numbers = std::vector<int64_t>;
using Tensors = torch::autograd::variable_list;     // an undefined one is Python's None
using StreamOf = int(int device, void** stream);
using torch::autograd::AutogradContext;

constexpr size_t MOST_PLANS = 1000;     // as in launch.py

struct Memory {
    Numbers shape;
    at::ScalarType dtype;
};

struct Result {
    int64_t from;       // the number of its memory, -1 for None
    bool is_all;        // it is all of its memory, or else it has this shape and stride from start
    Numbers shape, stride;
    int64_t start;
};

// What a Plan of launch.py has once its requests are written down.
struct Plan : torch::CustomClassHolder {
    std::string numbers;
    int64_t count;
    bool multiplies;
    std::vector<std::optional<Memory>> to_allocate;     // at the end for what is kept, and scratch
    std::vector<Result> results;
    Numbers kept_inputs;
    Launch* launch;
    Product* product;
    StreamOf* stream_of;
    py::object blas_handle;     // Python's function
    py::object in_python;       // of a forward pass: Python's function for the backward pass; of a
                                // backward pass: what keeps its kernels loaded
    // of backward passes, by the gradients that are asked for and the form of what is read
    std::map<std::pair<Flags, Numbers>, c10::intrusive_ptr<Plan>> plans_back;
    std::mutex of_plans_back;

    ~Plan() override {
        if (!Py_IsInitialized()) {
            blas_handle.release();
            in_python.release();
            return;
        }
        const py::gil_scoped_acquire gil;
        blas_handle = in_python = py::object();
    }
};

static int64_t address_of(const Tensor& t) {
    return t.defined() ? reinterpret_cast<int64_t>(t.data_ptr()) : 0;
}

// cuBLAS for this thread, with PyTorch's stream and precision; null if the plan has no products, or
// if plans cannot be used now.
static void* blas_for(const Plan& plan, at::Device device) {
    if (!plan.multiplies) return nullptr;
    const c10::DeviceGuard guard(device);
    const py::gil_scoped_acquire gil;
    return reinterpret_cast<void*>(plan.blas_handle().cast<int64_t>());
}

// Plan.repeat of launch.py: the results, and the memory of what is kept.
static std::pair<Tensors, Tensor> repeated(const Plan& plan, const Tensors& inputs, void* blas) {
    const at::Device device = inputs[0].device();       // the first is never None
    const at::TensorOptions options(device);
    const c10::DeviceGuard guard(device);
    const at::AutoDispatchBelowADInplaceOrView without_autograd;
    // cuLaunchKernel needs a context in this thread, which PyTorch's first kernel makes
    thread_local std::set<int> known;
    if (known.insert(device.index()).second) at::zeros({1}, options);
    Tensors allocated, results;
    Numbers addresses;
    for (const Tensor& t : inputs) addresses.push_back(address_of(t));
    for (const auto& memory : plan.to_allocate) {
        allocated.emplace_back();
        if (memory) allocated.back() = at::empty(memory->shape, options.dtype(memory->dtype));
        addresses.push_back(address_of(allocated.back()));
    }
    void* stream = nullptr;
    plan.stream_of(device.index(), &stream);
    const int error = repeat(reinterpret_cast<const int64_t*>(plan.numbers.data()), plan.count,
                             addresses.data(), stream, blas, plan.launch, plan.product);
    if (error)      // TORCH_CHECK in its place crashed with the compiler of one machine
        throw std::runtime_error("the GPU has refused a call: error " + std::to_string(error)
                                 + " of CUDA or cuBLAS");
    for (const Result& r : plan.results)
        results.push_back(r.from < 0 ? Tensor() : r.is_all ? allocated[r.from]
                          : allocated[r.from].as_strided(r.shape, r.stride, r.start));
    return {results, allocated[allocated.size() - 2]};
}

// form_of_all of launch.py: of each tensor if it is None, the first with its address, its type,
// GPU, alignment, shape and stride
static Numbers form_of(const Tensors& tensors) {
    Numbers numbers, addresses;
    for (const Tensor& t : tensors) {
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
    return numbers;
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

// A plan of a backward pass, or null if there is none for inputs like these.
static c10::intrusive_ptr<Plan> plan_back(Plan& plan, const Flags& needs, const Tensors& inputs) {
    const std::lock_guard<std::mutex> lock(plan.of_plans_back);
    const auto found = plan.plans_back.find({needs, form_of(inputs)});
    return found == plan.plans_back.end() ? c10::intrusive_ptr<Plan>() : found->second;
}

static void add_back(Plan& plan, const Flags& needs, const py::tuple& inputs,
                     const c10::intrusive_ptr<Plan>& back) {
    decltype(plan.plans_back) dropped;      // once the lock is open: their ends wait for Python
    const std::lock_guard<std::mutex> lock(plan.of_plans_back);
    if (plan.plans_back.size() >= MOST_PLANS) dropped.swap(plan.plans_back);
    plan.plans_back.emplace(std::make_pair(needs, form_of(from_python(inputs))), back);
}

struct ByPlan : torch::autograd::Function<ByPlan> {
    // given: the inputs that are not None; autograd sees these alone. plan is asked for only where
    // plans can be used.
    static Tensors forward(AutogradContext* ctx, const c10::intrusive_ptr<Plan>& plan,
                           const Tensors* inputs, at::TensorList given) {
        void* blas = blas_for(*plan, given[0].device());
        auto [results, memory] = repeated(*plan, *inputs, blas);
        Tensors saved{memory};
        Flags are_given;
        for (const int64_t i : plan->kept_inputs) saved.push_back((*inputs)[i]);
        for (const Tensor& t : *inputs) are_given.push_back(t.defined());
        ctx->save_for_backward(saved);
        ctx->saved_data["plan"] = c10::IValue::make_capsule(plan);
        ctx->saved_data["are_given"] = are_given;
        ctx->set_materialize_grads(false);
        return results;
    }

    static Tensors backward(AutogradContext* ctx, Tensors gradients) {
        const auto plan = c10::static_intrusive_pointer_cast<Plan>(
            ctx->saved_data["plan"].toCapsule());
        const auto are_given = ctx->saved_data["are_given"].toBoolList();
        Flags needs;
        size_t seen = 0;
        for (const bool is_given : are_given)
            needs.push_back(is_given && ctx->needs_input_grad(seen++));
        const Tensors saved = ctx->get_saved_variables();
        // with create_graph Python tells that there is no second derivative
        const bool is_unusual = at::GradMode::is_enabled()
                                || at::globalContext().deterministicAlgorithms()
                                || c10::impl::TorchDispatchModeTLS::stack_len() > 0;
        const Tensors all = is_unusual ? back_in_python(plan, needs, saved, gradients)
                                       : back(plan, needs, saved, gradients);
        Tensors made(2);        // of plan and inputs, which are no tensors
        for (size_t i = 0; i < all.size(); i++)
            if (are_given[i]) made.push_back(all[i]);
        return made;
    }

    // The gradients of all inputs, by a plan if there is one that fits.
    static Tensors back(const c10::intrusive_ptr<Plan>& plan, const Flags& needs,
                        const Tensors& saved, Tensors gradients) {
        Tensors inputs = saved;
        for (Tensor& g : gradients) {
            if (g.defined()) g = g.contiguous();
            if (address_of(g) % 16) g = g.clone();      // the kernels read 16 bytes at once
            inputs.push_back(g);
        }
        if (const auto found = plan_back(*plan, needs, inputs)) {
            void* blas = blas_for(*found, inputs[0].device());
            if (blas || !found->multiplies) return repeated(*found, inputs, blas).first;
        }
        return back_in_python(plan, needs, saved, gradients);
    }

    static Tensors back_in_python(const c10::intrusive_ptr<Plan>& plan, const Flags& needs,
                                  const Tensors& saved, const Tensors& gradients) {
        const py::gil_scoped_acquire gil;
        try {
            return from_python(
                plan->in_python(plan, needs, to_python(gradients), to_python(saved)));
        } catch (py::error_already_set& error) {    // autograd keeps the type of python_error alone
            error.restore();
            python_error raised;
            raised.persist();
            throw raised;
        }
    }
};

static py::tuple run(const c10::intrusive_ptr<Plan>& plan, const py::tuple& inputs) {
    const Tensors all = from_python(inputs);
    Tensors given, results;
    std::copy_if(all.begin(), all.end(), std::back_inserter(given),
                 [](const Tensor& t) { return t.defined(); });
    {
        const py::gil_scoped_release no_gil;
        results = ByPlan::apply(plan, &all, at::TensorList(given));
    }
    return to_python(results);
}

static py::bytes form(const py::tuple& inputs) {
    const Numbers numbers = form_of(from_python(inputs));
    return {reinterpret_cast<const char*>(numbers.data()), numbers.size() * sizeof(int64_t)};
}

// calls: the addresses of cuLaunchKernel, cublasGemmEx and aoti_torch_get_current_cuda_stream.
static c10::intrusive_ptr<Plan> plan_of(
        std::string numbers, int64_t count, bool multiplies, const py::list& to_allocate,
        const py::list& results, Numbers kept_inputs, std::tuple<int64_t, int64_t, int64_t> calls,
        py::object blas_handle, py::object in_python) {
    auto plan = c10::make_intrusive<Plan>();
    plan->numbers = std::move(numbers);
    plan->count = count;
    plan->multiplies = multiplies;
    plan->kept_inputs = std::move(kept_inputs);
    plan->launch = reinterpret_cast<Launch*>(std::get<0>(calls));
    plan->product = reinterpret_cast<Product*>(std::get<1>(calls));
    plan->stream_of = reinterpret_cast<StreamOf*>(std::get<2>(calls));
    plan->blas_handle = std::move(blas_handle);
    plan->in_python = std::move(in_python);
    for (const Tensor& t : from_python(to_allocate)) {
        plan->to_allocate.emplace_back();
        if (t.defined()) plan->to_allocate.back() = Memory{t.sizes().vec(), t.scalar_type()};
    }
    for (const auto r : results) {
        Result result{-1};
        if (!r.is_none()) {
            const auto [from, lies] = r.cast<std::pair<int64_t, py::object>>();
            result.from = from;
            result.is_all = lies.is_none();
            if (!result.is_all)
                std::tie(result.shape, result.stride, result.start)
                    = lies.cast<std::tuple<Numbers, Numbers, int64_t>>();
        }
        plan->results.push_back(result);
    }
    return plan;
}

PYBIND11_MODULE(node, module) {
    py::class_<Plan, c10::intrusive_ptr<Plan>>(module, "Plan").def("add_back", &add_back);
    module.def("plan", torch::wrap_pybind_function(plan_of));
    module.def("run", torch::wrap_pybind_function(run));
    module.def("form", torch::wrap_pybind_function(form));
}
