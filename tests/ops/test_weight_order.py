"""Weights with values in another order than their inputs: the ops put x in that order."""

from __future__ import annotations

import pytest
import torch
from packed_weights import random_weight

from mistral_ext import ops
from mistral_ext.model.rope import frequencies

K = 128
SEQUENCES = torch.tensor([[0, 5, 0, 0, 8]])


@pytest.fixture(autouse=True)
def _exact_products():
    before = ops.exact_products()
    ops.set_exact_products(True)
    yield
    ops.set_exact_products(before)


@pytest.fixture
def made():
    """x, the weight of a norm, 3 weights in an order of their own, and the same as tensors."""
    random = torch.Generator().manual_seed(0)
    order = torch.randperm(K, generator=random)
    weights = [
        random_weight("q4_z", (64, K), 32, random)._replace(order=order.clone()) for _ in range(3)
    ]
    x, norm = torch.randn(5, K, generator=random), torch.rand(K, generator=random)
    natural = []
    for weight in weights:
        columns = torch.empty(64, K)
        columns[:, order] = weight._replace(order=None).dequantize()
        natural.append(columns)
    return x, norm, weights, natural


def test_columns_are_dequantised_in_the_order_of_inputs(made):
    _, _, weights, natural = made
    for weight, expected in zip(weights, natural, strict=True):
        assert torch.equal(weight.dequantize(), expected)
        assert torch.equal(weight.to("cpu").dequantize(), expected)
        indices = torch.tensor([7, 0, 7])
        assert torch.equal(ops.embedding(indices, weight), expected[indices])


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_products(made):
    x, norm, weights, natural = made
    close(ops.linear(x, weights[0]), ops.linear(x, natural[0]))
    close(ops.linear(x, weights, norm), ops.linear(x, natural, norm))
    close(ops.linear_swiglu(x, weights[:2], norm), ops.linear_swiglu(x, natural[:2], norm))
    residuals = torch.ones(5, 64), torch.ones(5, 64)
    ops.linear_residual(x, weights[0], residuals[0])
    ops.linear_residual(x, natural[0], residuals[1])
    close(*residuals)


def test_largest_outputs(made):
    x, norm, weights, natural = made
    actual = ops.linear_argmax(x, weights[0], norm)
    expected = ops.linear_argmax(x, natural[0], norm)
    close(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


def test_queries_and_keys(made):
    x, norm, weights, natural = made
    results = []
    for given in (weights, natural):
        pools = torch.zeros(8, 64), torch.zeros(8, 64)
        steps = frequencies(1e4, 64, torch.device("cpu"))
        results.append(ops.linear_rope(x, given, norm, 1e-5, *pools, SEQUENCES, steps))
    close(*results)


def test_orders_of_some_weights_are_refused(made):
    x, _, weights, natural = made
    for mixed in ([weights[0], natural[1]], [natural[0], weights[1]]):
        with pytest.raises(ValueError, match="weights have an order in part, expected the same"):
            ops.linear(x, mixed)


def test_different_orders_are_refused(made):
    x, _, weights, _ = made
    for other in (weights[0].order.flip(0), weights[0].order[:-1]):
        mixed = [*weights[:2], weights[2]._replace(order=other)]
        with pytest.raises(ValueError, match=r"weights\[2\] has another order than weights\[0\]"):
            ops.linear(x, mixed)


def test_equal_orders_are_compiled_as_one_graph(made):
    x, _, weights, _ = made
    compiled = torch.compile(lambda x: ops.linear(x, weights), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), ops.linear(x, weights))
