"""
A recurrence of mamba.py as an operator, which torch.compile and torch.export take as it is: they do
not look into it, and are told the shapes of what comes out. And what every backward pass here has
in common: it cannot be differentiated again.
"""
from __future__ import annotations

import functools

import torch

COMPILES = hasattr(torch.compiler, "nested_compile_region")     # torch 2.8: what is asked of it

INPUTS = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C"


def as_operator(name, function, channels_first=False):
    """
    (u, delta, A, B, C, state) -> y (B, L, D), last state (B, D, N), made of an autograd.Function.
    Its forward takes these and `keep`, whether there will be a backward pass, for which it saves u,
    delta, A, B, C and any number of states, (B, N, D) each, or (B, D, N) if channels_first.
    """
    define = functools.partial(torch.library.custom_op, mutates_args=())

    def forward(*inputs):
        ctx = Context()
        return *function.forward(ctx, *inputs), torch.stack(ctx.saved_tensors[5:])

    def backward(gy, glast, *inputs_and_kept):
        ctx = Context()
        ctx.save_for_backward(*inputs_and_kept[:5], *inputs_and_kept[5])
        with torch.no_grad():
            return function.backward(ctx, gy, glast)[:6]

    run = define(name, forward, schema=(
        f"({INPUTS}, Tensor state, bool keep) -> (Tensor, Tensor, Tensor)"))
    gradients = define(f"{name}_backward", backward, schema=(
        f"(Tensor gy, Tensor glast, {INPUTS}, Tensor kept) -> ({', '.join(['Tensor'] * 6)})"))

    @run.register_fake
    def shapes(u, delta, A, B, C, state, keep):
        count = torch.library.get_ctx().new_dynamic_size()
        kept = A.new_empty(count, u.shape[0], *(A if channels_first else A.t()).shape)
        return torch.empty_like(u), torch.empty_like(state), kept

    @gradients.register_fake
    def shapes_of_gradients(gy, glast, *inputs):
        return *map(torch.empty_like, inputs[:5]), torch.empty_like(glast)

    def keep_inputs(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:5], output[2])

    def differentiate(ctx, gy, glast, _):
        return *gradients(gy, glast, *ctx.saved_tensors), None
    run.register_autograd(differentiate, setup_context=keep_inputs)

    def operator(u, delta, A, B, C, state):
        inputs = (u, delta, A, B, C, state)
        keep = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
        return run(*inputs, keep)[:2]
    return operator


def differentiable_once(backward):
    """Decorator of a backward pass: to differentiate what it returns is an error. PyTorch's own,
    once_differentiable, is silent where only what was saved depends on a parameter."""
    @functools.wraps(backward)
    def run(ctx, *gradients):
        with torch.no_grad():
            results = backward(ctx, *gradients)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():    # not create_graph=True
            return results
        inputs = [t for t in (*ctx.saved_tensors, *gradients) if t is not None and t.requires_grad]
        if not inputs:      # what was saved is a result itself: nobody can tell what it depends on
            NoSecond.backward(ctx)
        results = results if isinstance(results, tuple) else (results,)
        return tuple(t if t is None else NoSecond.apply(t, *inputs) for t in results)
    return run


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

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors
