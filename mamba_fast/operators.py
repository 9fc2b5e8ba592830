"""
A recurrence of mamba.py as an operator, which torch.compile and torch.export take as it is: they do
not look into it, and are told the shapes of what comes out.
"""
from __future__ import annotations

import functools

import torch

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


class Context:
    """What an autograd.Function has as ctx, for calls without autograd."""

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors
