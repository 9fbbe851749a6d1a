from __future__ import annotations

import backends
import gradients
import pytest
import torch
from packed_weights import random_weight
from tolerance import DTYPES, assert_close
from torch.nn import functional

from mistral_ext import ops
from mistral_ext.ops import Quantized


def plain_loss(x, wide, targets, weights=None):
    losses = functional.cross_entropy(x @ wide.to(x.dtype).T, targets, reduction="none")
    return losses if weights is None else losses * weights.to(x.dtype)


def case(tokens, vocab, dtype, generator, size=64):
    """x, targets of which every third is ignored, and weights of tokens."""
    x = torch.randn(tokens, size, generator=generator).to(dtype)
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    targets[::3] = -100
    return x, targets, torch.rand(tokens, generator=generator)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "vocab"), [(2, 1), (5, 7), (40, 1003), (500, 130)])
def test_loss_and_gradient(isa, tokens, vocab, dtype, generator):
    """500 tokens are more than a chunk, also without those that are ignored."""
    x, targets, factors = case(tokens, vocab, dtype, generator)
    weight = (torch.randn(vocab, 64, generator=generator) / 4).to(dtype)
    total, losses = ops.linear_cross_entropy(x, weight, targets, factors)
    exact = plain_loss(x.double(), weight.double(), targets)
    plain = plain_loss(x, weight, targets).float()
    assert_close(losses, exact, plain)
    assert_close(total, exact @ factors.double(), plain @ factors)
    assert not losses[::3].any()

    gradients.check(
        lambda x: ops.linear_cross_entropy(x, weight, targets, factors)[0].to(x.dtype),
        lambda x: plain_loss(x, weight, targets, factors).sum(),
        [x],
        torch.tensor(0.5, dtype=dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["q4_0", "q6_k", "iq4_xs"])
def test_weights_in_4_to_6_bits_and_few_tokens(isa, form, dtype, generator):
    """Activations are not rounded to 8 bits, although 3 tokens are few."""
    assert not ops.exact_products()
    x, targets, _ = case(4, 50, dtype, generator, size=256)
    weight = random_weight(form, (50, 256), 256 if form != "q4_0" else 32, generator)
    wide = weight.dequantize(torch.float64)
    _, losses = ops.linear_cross_entropy(x, weight, targets)
    assert_close(
        losses, plain_loss(x.double(), wide, targets), plain_loss(x, wide, targets).float()
    )
    gradients.check(
        lambda x: ops.linear_cross_entropy(x, weight, targets)[0].to(x.dtype),
        lambda x: plain_loss(x, wide, targets).sum(),
        [x],
        torch.ones((), dtype=dtype),
    )


def test_large_logits(isa):
    """exp of them does not fit a float; the target is certain, or impossible."""
    x, weight = torch.tensor([[1.0], [1.0], [-1.0]]), torch.tensor([[500.0], [-500.0], [0.0]])
    x.requires_grad_()
    total, losses = ops.linear_cross_entropy(x, weight, torch.tensor([0, 1, 2]))
    assert losses.tolist() == [0.0, 1000.0, 500.0]
    total.backward()
    assert x.grad.tolist() == [[0.0], [1000.0], [-500.0]]


def test_nothing_to_learn(isa):
    x = torch.ones(3, 8, requires_grad=True)
    total, losses = ops.linear_cross_entropy(x, torch.ones(4, 8), torch.full((3,), -100))
    total.backward()
    assert total == 0
    assert not losses.any()
    assert not x.grad.any()


def test_what_is_not_finite_is_seen(isa):
    x = torch.ones(2, 8)
    x[1, 3] = float("nan")
    total, losses = ops.linear_cross_entropy(x, torch.ones(4, 8), torch.tensor([0, 0]))
    assert losses.isnan().tolist() == [False, True]
    assert total.isnan()


def test_ignored_tokens_are_not_read(isa):
    x = torch.full((2, 8), float("nan"))
    x[0] = 1
    total, _ = ops.linear_cross_entropy(x, torch.ones(4, 8), torch.tensor([2, -100]))
    torch.testing.assert_close(total, torch.tensor(4.0).log())


def test_weights_of_ignored_tokens_are_not_read(isa):
    x = torch.ones(2, 8, requires_grad=True)
    factors = torch.tensor([2.0, float("nan")])
    targets = torch.tensor([2, -100])
    total, _ = ops.linear_cross_entropy(x, torch.ones(4, 8), targets, factors)
    torch.testing.assert_close(total, 2 * torch.tensor(4.0).log())
    total.backward()
    assert x.grad.isfinite().all()


def test_the_gradient_has_no_gradient():
    x = torch.ones(2, 8, requires_grad=True)
    total, _ = ops.linear_cross_entropy(x, torch.eye(4, 8), torch.tensor([0, 1]))
    with pytest.raises(RuntimeError, match="its gradient has no gradient: call backward without"):
        torch.autograd.grad(total**2, x, create_graph=True)
    (total**2).backward()
    assert x.grad.any()


def test_losses_have_no_gradient():
    x = torch.ones(2, 8, requires_grad=True)
    total, losses = ops.linear_cross_entropy(x, torch.ones(4, 8), torch.tensor([0, 1]))
    assert total.requires_grad
    assert not losses.requires_grad


def test_few_logits_are_in_memory(generator, monkeypatch):
    """The logits of at most 512 tokens exist at a time."""
    made, empty = [], torch.Tensor.new_empty

    def new_empty(like, shape, **options):
        made.append(tuple(shape) if isinstance(shape, tuple) else (shape,))
        return empty(like, shape, **options)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    x = torch.randn(600, 8, generator=generator).requires_grad_()
    targets = torch.randint(0, 1000, (600,), generator=generator)
    ops.linear_cross_entropy(x, torch.randn(1000, 8, generator=generator), targets)[0].backward()
    assert [shape for shape in made if 1000 in shape] == [(512, 1000), (88, 1000)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 7, 1003, 9000])
def test_rows_of_logits(backend, vocab, dtype, generator):
    """The kernel alone, on rows that lie apart: few, odd and many logits, losses near and far,
    logits of which exp is 0 in float32."""
    around = torch.full((9, vocab + 8), float("nan"), dtype=dtype)
    logits = around[1:-1, :vocab]
    logits.copy_(4 * torch.randn(7, vocab, generator=generator))
    logits[3, vocab // 2 :] = -torch.inf
    logits[4, vocab // 2] = 90
    logits[5] -= 200
    logits[6, : vocab // 2] = -1e4
    targets = torch.tensor([0, vocab - 1, vocab // 3, 0, vocab // 2, vocab // 2, vocab - 1])
    factors, losses = torch.rand(7, generator=generator), torch.empty(7)
    if vocab == 1:
        logits[3] = 2

    def loss(x):
        return functional.cross_entropy(x, targets, reduction="none")

    def gradient(x):
        return gradients.differentiate(lambda x: loss(x).float() @ factors, [x], torch.ones(()))[0]

    wide, narrow = logits.double(), logits.clone()
    kernel = backends.in_use().cross_entropy
    kernel(logits, targets, None, losses, 1)
    assert torch.equal(logits, narrow), "without factors the logits stay"
    assert_close(losses, loss(wide), loss(narrow).float())
    kernel(logits, targets, factors, losses, 1)
    assert_close(losses, loss(wide), loss(narrow).float())
    assert_close(logits, gradient(wide), gradient(narrow))
    assert around[:, vocab:].isnan().all()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"targets": torch.tensor([0, 4])}, ValueError, "targets has 4, expected 0 to 3"),
        ({"targets": torch.tensor([-1, 0])}, ValueError, "targets has -1, expected 0 to 3"),
        ({"targets": torch.zeros(3).long()}, ValueError, "targets has shape [3], expected [2]"),
        ({"targets": torch.zeros(2).int()}, TypeError, "targets has dtype torch.int32, expected"),
        ({"weights": torch.zeros(1)}, ValueError, "weights has shape [1], expected [2]"),
        ({"weights": torch.zeros(2).half()}, TypeError, "weights has dtype torch.float16, expec"),
        ({"weight": torch.zeros(4, 9)}, ValueError, "weight has shape [4, 9], expected [any, 8]"),
        (
            {"weight": Quantized(torch.zeros(4, 8).char(), torch.zeros(4, 1), "int8")},
            TypeError,
            "scales of weight has dtype torch.float32, expected torch.bfloat16",
        ),
    ],
)
def test_argument_checks(changes, error, message):
    given = {"x": torch.zeros(2, 8), "weight": torch.zeros(4, 8), "targets": torch.tensor([0, 1])}
    with pytest.raises(error) as caught:
        ops.linear_cross_entropy(**given | changes)
    assert message in str(caught.value)
