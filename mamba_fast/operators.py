"""
An autograd.Function as an operator, which torch.compile and torch.export take as it is: they do not
look into it, and are told the shapes of what comes out. And what every backward pass here has in
common: it cannot be differentiated again.
"""
from __future__ import annotations

import functools

import torch

COMPILES = hasattr(torch.compiler, "nested_compile_region")     # torch 2.8: what is asked of it


def is_exporting():
    """Whether torch.export looks on. Not torch.compiler.is_exporting(), which in torch 2.11 is also
    true for torch.compile."""
    return getattr(torch.compiler, "_is_exporting_flag", False)     # from torch 2.7 on


def is_traced():
    """Whether PyTorch's calls are written down, to be done again, or are something else, as
    torch.func and forward-mode differentiation make them: what is not one of them, as C++ and
    kernels, would be missing."""
    return (torch.jit.is_tracing() or torch._C._functorch.peek_interpreter_stack() is not None
            or torch.autograd.forward_ad._current_level >= 0
            or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None)


def as_operator(name, function, schema, results):
    """
    function, an autograd.Function, as a function of the same inputs.
    schema: these, as torch.library writes them.  results: the names of the inputs that its results
    are like. All that comes out is contiguous. Forward saves first a tensor of its own, of any
    size, which backward finds without its shape, and then the inputs that are in function.saved.
    Settings, which are no tensors, backward finds as attributes of ctx.
    """
    parts, count = schema.split(", "), len(results)
    names = [part.split()[-1] for part in parts]
    tensors = [k for k, part in zip(names, parts) if part.startswith("Tensor")]

    def forward(*inputs):
        ctx = Context()
        made = function.forward(ctx, *inputs)
        return *(made if count > 1 else (made,)), ctx.saved_tensors[0].flatten()

    def backward(*given):
        grads, kept, inputs = given[:count], given[count], dict(zip(names, given[count + 1:]))
        ctx = Context(**inputs)
        ctx.save_for_backward(kept, *(inputs[k] for k in function.saved))
        with torch.no_grad():
            made = dict(zip(names, function.backward(ctx, *grads)))
        return tuple(kept.new_empty(0) if made[k] is None else made[k] for k in tensors)

    define, of = functools.partial(torch.library.custom_op, mutates_args=()), "Tensor, ".__mul__
    run = define(name, forward, schema=f"({schema}) -> ({of(count)}Tensor)")
    grads_schema = "".join(f"Tensor g{k}, " for k in results)
    gradients = define(f"{name}_backward", backward, schema=(
        f"({grads_schema}Tensor kept, {schema}) -> ({of(len(tensors) - 1)}Tensor)"))

    def empty_like(t):
        return torch.empty_like(t, memory_format=torch.contiguous_format)

    @run.register_fake
    def shapes(*inputs):
        given, size = dict(zip(names, inputs)), torch.library.get_ctx().new_dynamic_size()
        return *(empty_like(given[k]) for k in results), inputs[0].new_empty(size)

    @gradients.register_fake
    def shapes_of_gradients(*given):
        inputs = dict(zip(names, given[count + 1:]))
        return tuple(given[0].new_empty(0) if inputs[k] is None else empty_like(inputs[k])
                     for k in tensors)

    def keep_inputs(ctx, inputs, output):
        given = dict(zip(names, inputs))
        ctx.settings = {k: given[k] for k in names if k not in tensors}
        ctx.save_for_backward(output[-1], *(given[k] for k in tensors))

    def differentiate(ctx, *grads):
        kept, *saved = ctx.saved_tensors
        inputs = {**ctx.settings, **dict(zip(tensors, saved))}
        made = gradients(*grads[:-1], kept, *(inputs[k] for k in names))
        made = {k: g for k, g in zip(tensors, made) if inputs[k] is not None}
        return tuple(made.get(k) for k in names)
    run.register_autograd(differentiate, setup_context=keep_inputs)

    def operator(*inputs):
        made = run(*inputs)[:-1]
        return made if count > 1 else made[0]
    return operator


def without_autocast(backward):
    """Decorator of a backward pass that computes in the types of what was saved, wherever it is
    called."""
    @functools.wraps(backward)
    def run(ctx, *gradients):
        kind = next((g.device.type for g in gradients if g is not None), "cpu")
        if not torch.is_autocast_enabled(kind):
            return backward(ctx, *gradients)
        with torch.autocast(kind, enabled=False):
            return backward(ctx, *gradients)
    return run


def differentiable_once(backward):
    """Decorator of a backward pass: to differentiate what it returns is an error. PyTorch's own,
    once_differentiable, is silent where only what was saved depends on a parameter."""
    @functools.wraps(backward)
    def run(ctx, *gradients):
        if not torch.is_grad_enabled():     # not create_graph=True
            return backward(ctx, *gradients)
        with torch.no_grad():
            results = backward(ctx, *gradients)
        if torch.compiler.is_compiling():
            return results
        inputs = [t for t in (*ctx.saved_tensors, *gradients) if t is not None and t.requires_grad]
        if not inputs:      # what was saved is a result itself: nobody can tell what it depends on
            NoSecond.backward(ctx)
        results = results if isinstance(results, tuple) else (results,)
        return tuple(t if t is None else NoSecond.apply(t, *inputs) for t in results)
    return run


class AtOnce(torch.autograd.Function):
    """
    function(*inputs) as one operation.
    function returns a tuple of results and a tuple of what back needs.  back(needs, gradients,
    *that) returns the gradients of inputs, or None for those of which needs says False; gradients:
    those of the results, or None.
    """

    @staticmethod
    def forward(ctx, function, back, *inputs):
        results, saved = function(*inputs)
        ctx.back = back
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    @differentiable_once
    @without_autocast
    def backward(ctx, *gradients):
        needs, saved = ctx.needs_input_grad[2:], ctx.saved_tensors
        return None, None, *ctx.back(needs, gradients, *saved)


class NoSecond(torch.autograd.Function):
    """A tensor that depends on inputs, but in a way that nobody knows."""

    @staticmethod
    def forward(ctx, x, *inputs):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("there is no second derivative of this; with the sequential scan there "
                           "is, and without mamba_fast/")


class Context:
    """What an autograd.Function has as ctx, for calls without autograd."""

    def __init__(self, **settings):
        vars(self).update(settings)

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors

    def set_materialize_grads(self, value):
        pass
