"""transformers' models with attn_implementation="mistral_ext", against sdpa."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers
from adapters import write_peft
from transformers import DynamicCache
from transformers_models import (
    LLAMA,
    MISTRAL,
    WINDOW,
    gradients,
    make_cache,
    make_pair,
    padding_mask,
    random_ids,
    run_chunks,
)

from mistral_ext.integrations import transformers as integration


@pytest.fixture(autouse=True)
def _registered():
    integration.register()


@pytest.fixture(scope="module")
def pair():
    integration.register()
    return make_pair()


@pytest.fixture(scope="module")
def llamas():
    integration.register()
    return make_pair(LLAMA)


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [1, 2, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 1])
@torch.no_grad()
def test_lengths_around_the_window(pair, count):
    theirs, ours = pair
    ids = random_ids(2, count)
    for use_cache in (False, True):
        got = ours(ids, use_cache=use_cache).logits
        assert_same(got, theirs(ids, use_cache=use_cache).logits)


@pytest.mark.parametrize("models", ["pair", "llamas"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding(request, models, side):
    theirs, ours = request.getfixturevalue(models)
    ids = random_ids(3, 40)
    mask = padding_mask(side, [0, 7, 39], 40)
    expected = theirs(ids, attention_mask=mask).logits
    got = ours(ids, attention_mask=mask).logits
    assert_same(got[mask.bool()], expected[mask.bool()])
    assert got.isfinite().all()


# "plain" keeps all keys, "sliding" the window's, "static" has room for more than there are.
@pytest.mark.parametrize("kind", ["plain", "sliding", "static"])
@pytest.mark.parametrize("models", ["pair", "llamas"])
@pytest.mark.parametrize("padding", [None, [0, 3, 9]])
@pytest.mark.parametrize("sizes", [(40, 1, 1), (1, 10, 5, 1, 20, 1), (15, 1, 1, 16, 17)])
def test_caches(request, kind, models, padding, sizes):
    theirs, ours = request.getfixturevalue(models)
    count = sum(sizes)
    ids = random_ids(3, count)
    mask = None if padding is None else padding_mask("left", padding, count)
    positions = torch.arange(count).expand(3, -1)
    given = mask, sizes, positions
    expected = run_chunks(theirs, ids, make_cache(kind, theirs), *given)
    got = run_chunks(ours, ids, make_cache(kind, ours), *given)
    seen = torch.ones(3, count, dtype=torch.bool) if mask is None else mask.bool()
    assert_same(got[seen], expected[seen])


@torch.inference_mode()
def test_a_mask_of_all_positions_of_a_static_cache(llamas):
    """Its tokens beyond the new ones do not count."""
    theirs, ours = llamas
    ids, mask = random_ids(2, 20), padding_mask("left", [0, 5], 64)
    for model, out in ((theirs, expected := []), (ours, got := [])):
        cache = make_cache("static", model)
        for chunk in ids.split(10, dim=1):
            out.append(model(chunk, attention_mask=mask, past_key_values=cache).logits)
    seen = mask[:, :20].bool()
    assert_same(torch.cat(got, dim=1)[seen], torch.cat(expected, dim=1)[seen])


def test_one_mask_for_calls_with_different_numbers_of_tokens():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 6, 64), torch.randn(1, 2, 6, 64), torch.randn(1, 2, 6, 64)
    mask = torch.tensor([[1, 1, 0, 0, 1, 1]])
    whole, _ = integration.attention_forward(torch.nn.Identity(), q, k, v, mask)
    last, _ = integration.attention_forward(torch.nn.Identity(), q[:, :, 5:], k, v, mask)
    assert_same(last, whole[:, 5:])


def test_padding_between_tokens(llamas):
    """Right-padded prompts that go on: the padding stays in the cache."""
    theirs, ours = llamas
    ids = random_ids(3, 20)
    mask = torch.cat([padding_mask("right", [0, 4, 11], 12), torch.ones(3, 8).long()], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    given = mask, (12, 5, 1, 2), positions
    expected = run_chunks(theirs, ids, DynamicCache(), *given)
    got = run_chunks(ours, ids, DynamicCache(), *given)
    assert_same(got[mask.bool()], expected[mask.bool()])
    # One chunk that holds the gap itself.
    given = mask, (20,), positions
    assert_same(run_chunks(ours, ids, DynamicCache(), *given)[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("lengths", [[11, 1, 28], [1, 1, 38], [20, 20]])
@torch.no_grad()
def test_packed_sequences(pair, lengths):
    theirs, ours = pair
    ids = random_ids(1, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    got = ours(ids, position_ids=positions, use_cache=False).logits
    assert_same(got, theirs(ids, position_ids=positions, use_cache=False).logits)
    alone = [theirs(part, use_cache=False).logits for part in ids.split(lengths, dim=1)]
    assert_same(got, torch.cat(alone, dim=1))


@torch.no_grad()
def test_rows_packed_in_different_ways(pair):
    theirs, ours = pair
    ids = random_ids(2, 12)
    positions = torch.stack([torch.cat([torch.arange(5), torch.arange(7)]), torch.arange(12)])
    got = ours(ids, position_ids=positions, use_cache=False).logits
    assert_same(got, theirs(ids, position_ids=positions, use_cache=False).logits)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 3}])
def test_generate(pair, options):
    """Left-padded prompts, past the window."""
    theirs, ours = pair
    ids, mask = random_ids(3, 12), padding_mask("left", [0, 4, 9], 12)
    more = {"do_sample": False, "max_new_tokens": 2 * WINDOW, "attention_mask": mask}
    expected = theirs.generate(ids, **more, **options)
    assert torch.equal(ours.generate(ids, **more, **options), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_halves_are_as_exact_as_sdpa(dtype):
    theirs, ours = make_pair()
    ids = random_ids(2, 40)
    exact = theirs(ids).logits
    errors = [
        (model.to(dtype)(ids).logits.float() - exact).square().mean() for model in (ours, theirs)
    ]
    assert errors[0] <= 2 * errors[1]


@torch.no_grad()
def test_group_of_one_head_and_head_dim_128():
    theirs, ours = make_pair(LLAMA, num_key_value_heads=6, head_dim=128)
    ids = random_ids(2, 19)
    assert_same(ours(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("models", ["pair", "llamas"])
@pytest.mark.parametrize("padding", [None, [0, 7, 30]])
def test_gradients(request, models, padding):
    theirs, ours = request.getfixturevalue(models)
    ids = random_ids(3, 40)
    given = {} if padding is None else {"attention_mask": padding_mask("right", padding, 40)}
    expected = gradients(theirs, ids, **given)
    for name, gradient in gradients(ours, ids, **given).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5)


def test_gradients_of_packed_sequences(pair):
    ids = random_ids(1, 31)
    positions = torch.cat([torch.arange(n) for n in (20, 11)])[None]
    expected, found = (gradients(m, ids, position_ids=positions, use_cache=False) for m in pair)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5)


def test_autocast(pair):
    """There q and k of a model in float32 stay in float32, and v does not."""
    ids = random_ids(2, 40)
    exact = gradients(pair[0], ids)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = (gradients(model, ids) for model in pair)
        with torch.no_grad():
            logits, ours = (model(ids).logits for model in pair)
    assert (ours.dtype, logits.dtype) == (torch.bfloat16, torch.bfloat16)
    for name, gradient in exact.items():
        lost = (expected[name] - gradient).norm()
        assert (found[name] - gradient).norm() < 1.2 * lost, name
    lost = (logits - pair[0](ids).logits).norm()
    assert (ours - pair[0](ids).logits).norm() < 1.2 * lost


def test_gradients_over_keys_of_earlier_calls_are_refused(pair):
    cache = DynamicCache()
    with torch.no_grad():
        pair[1](random_ids(1, 4), past_key_values=cache)
    with pytest.raises(RuntimeError, match="attention: q requires a gradient"):
        pair[1](random_ids(1, 4), past_key_values=cache)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 0.1}, "dropout is 0.1, expected 0 with 'mistral_ext' attention"),
        ({"softcap": 30.0}, "softcap is 30.0, expected None"),
        ({"is_causal": False}, "is_causal is False, expected True"),
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, r"attention_mask has shape \[1, 1, 4, 4\]"),
    ],
)
def test_what_the_kernel_does_not_do_is_refused(options, message):
    q, k = torch.randn(1, 4, 4, 64), torch.randn(1, 2, 4, 64)
    given = {"attention_mask": None} | options
    with pytest.raises(ValueError, match=message):
        integration.attention_forward(torch.nn.Identity(), q, k, k, **given)


def test_attention_in_chunks_is_refused():
    """A decode step has no mask that would show the chunks."""
    layer = torch.nn.Identity()
    layer.config = transformers.Llama4TextConfig(attention_chunk_size=8)
    q, k = torch.randn(1, 4, 1, 64), torch.randn(1, 2, 12, 64)
    with pytest.raises(ValueError, match="attention_chunk_size is 8, expected None"):
        integration.attention_forward(layer, q, k, k, None)


def test_masks_of_other_kinds_are_refused():
    def all_see_all(row, head, query, key):
        return query >= 0 * key

    with pytest.raises(ValueError, match="a token sees a later one"):
        integration.document_mask(1, 4, 4, mask_function=all_see_all)
    with pytest.raises(ValueError, match="the model's mask is a function of its own"):
        integration.document_mask(1, 4, 4, use_vmap=True)


@pytest.mark.parametrize("kind", [MISTRAL, LLAMA])
@torch.no_grad()
def test_accelerated_models_compute_the_same(kind):
    theirs, model = make_pair(kind)
    ids = random_ids(2, 21)
    exact = theirs(ids).logits
    assert integration.accelerate_model(model) == 2 * 2 + 1  # the norms
    assert_same(model(ids).logits, exact)
    theirs, model = theirs.bfloat16(), make_pair(kind)[1].bfloat16()
    # In each of two layers: two norms, four projections, the feed-forward block and its three.
    assert integration.accelerate_model(model) == 2 * 10 + 2
    errors = [(each(ids).logits.float() - exact).square().mean() for each in (model, theirs)]
    assert errors[0] <= 2 * errors[1]
    assert model.state_dict().keys() == theirs.state_dict().keys()


@torch.no_grad()
def test_accelerated_models_call_hooks_and_own_their_parameters():
    model = make_pair()[1].bfloat16()
    integration.accelerate_model(model)
    called = []
    model.model.layers[0].mlp.register_forward_hook(lambda *given: called.append(given))
    assert model(random_ids(1, 3)).logits.any()
    assert len(called) == 1
    for parameter in model.parameters():
        parameter.zero_()
    assert not model(random_ids(1, 3)).logits.any()


def test_accelerated_models_have_no_gradients(pair):
    model = MISTRAL[1](pair[1].config)
    integration.accelerate_model(model)
    with pytest.raises(RuntimeError, match="requires a gradient"):
        model(random_ids(1, 4))


def test_projections_with_a_bias_or_an_adapter_stay():
    model = make_pair(LLAMA, mlp_bias=True, attention_bias=True)[1].bfloat16()
    assert integration.accelerate_model(model) == 2 * 2 + 2  # norms and the output matrix
    model = make_pair(LLAMA)[1].bfloat16()
    block = model.model.layers[0].mlp
    block.up_proj = torch.nn.Sequential(block.up_proj)  # an adapter wraps it like this
    assert integration.accelerate_model(model) == 2 * 10 + 2 - 1
    assert not isinstance(vars(block).get("forward"), functools.partial)


@torch.no_grad()
def test_an_adapter_attached_later_takes_part(tmp_path):
    exact, plain, ours = make_pair()[0], make_pair()[0].bfloat16(), make_pair()[1].bfloat16()
    integration.accelerate_model(ours)
    targets = ["gate_proj", "up_proj", "down_proj"]
    ids = random_ids(2, 21)
    without = exact(ids).logits
    expected, theirs, got = (
        write_peft(model, tmp_path / str(i), target_modules=targets)(ids).logits
        for i, model in enumerate((exact, plain, ours))
    )
    errors = [(logits.float() - expected).square().mean() for logits in (got, theirs, without)]
    assert errors[0] <= 2 * errors[1] < errors[2]


def test_modules_with_a_hook_of_accelerate_stay():
    hooks = pytest.importorskip("accelerate.hooks")
    model = make_pair()[1].bfloat16()
    first, second = (layer.mlp for layer in model.model.layers)
    hooks.add_hook_to_module(model.model.norm, hooks.ModelHook())
    hooks.add_hook_to_module(first, hooks.ModelHook())
    hooks.add_hook_to_module(second.down_proj, hooks.ModelHook())
    # Two blocks stay, the norm, and the projection with a hook.
    assert integration.accelerate_model(model) == 2 * 10 + 2 - 4
    for module in (model.model.norm, first, second, second.down_proj):
        forward = vars(module).get("forward")
        assert getattr(forward, "func", None) not in (
            integration._rms_norm,
            integration._linear,
            integration._feed_forward,
        )


def test_other_models_are_not_accelerated(pair):
    gpt2 = transformers.GPT2Model(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1))
    with pytest.raises(ValueError, match="model is of type 'gpt2', expected mistral or llama"):
        integration.accelerate_model(gpt2)
    model = MISTRAL[1](
        transformers.MistralConfig(**pair[0].config.to_dict() | {"hidden_act": "gelu"})
    )
    with pytest.raises(ValueError, match="model has hidden_act 'gelu', expected silu"):
        integration.accelerate_model(model)
