"""The training step: gradients against differences and dense weights, packing, parts, rematerialisation, memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from finetune_toys import dense_twin, loss_and_gradient, toy_examples, toy_model, toy_rows
from lora_toys import random_adapter

import realm_jax as realm
from realm_jax import lora
from realm_jax.errors import AdapterError, RealmError
from realm_jax.finetune import Data, TrainingConfig, make_rows, mean_loss, train
from realm_jax.finetune import step as step_module
from realm_jax.finetune.rows import Order
from realm_jax.finetune.step import init_state, learning_rate, summed_loss, train_step, whole_deltas, with_fixed
from realm_jax.finetune.train import Trainer
from realm_jax.model import transformer

SHORT = TrainingConfig(
    steps=12, batch=2, learning_rate=3e-3, warmup=2, log_every=4, evaluate_every=4, checkpoint_every=4
)


@functools.lru_cache(maxsize=8)
def model_of(format, layers=1):
    return toy_model(format, layers)


def close(got, want, tolerance=1e-5):
    """Trees of arrays, each equal to a share of its largest number."""
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(np.abs(y).max(), 1e-30))


@pytest.mark.parametrize(
    ("format", "dora"),
    [
        ("IQ4_XS", False),
        ("Q4_K", True),
        pytest.param("Q8_0", False, marks=pytest.mark.slow),
        pytest.param("Q4_K", False, marks=pytest.mark.slow),
        pytest.param("Q6_K", False, marks=pytest.mark.slow),
    ],
)
def test_gradients_are_those_of_differences_and_of_dense_weights(format, dora):
    model = model_of(format)
    adapter = random_adapter(model, seed=1, dora=dora)
    rows = toy_rows()
    loss, gradient = loss_and_gradient(model, adapter, rows)
    dense_loss, dense_gradient = loss_and_gradient(dense_twin(model), adapter, rows)
    np.testing.assert_allclose(loss, dense_loss, rtol=1e-6)
    close(gradient, dense_gradient)

    state, fixed = init_state(adapter.deltas, SHORT)
    fixed = whole_deltas(model.params, state.trained, fixed)  # lengths are constants of the gradient
    batch = tuple(jnp.asarray(x) for x in rows.take(np.arange(len(rows))))
    count = rows.learned_RT[:, 1:].sum()

    @jax.jit
    def at(trained):
        deltas = with_fixed(trained, fixed)
        return summed_loss(model.params, model.config, deltas, batch, SHORT) / count

    leaves, tree = jax.tree.flatten(gradient)
    for seed in range(3):  # directions that share something with the gradient, so that there is a slope to see
        key = jax.random.key(seed)
        noise = [jax.random.normal(jax.random.fold_in(key, i), x.shape) for i, x in enumerate(leaves)]
        direction = [x / jnp.linalg.norm(x) + 0.3 * n / jnp.linalg.norm(n) for x, n in zip(leaves, noise, strict=True)]
        want = sum(float(jnp.vdot(x, d)) for x, d in zip(leaves, direction, strict=True))
        size = 3e-3
        step = jax.tree.unflatten(tree, [size * d for d in direction])
        ahead, behind = (
            float(at(jax.tree.map(jnp.add, state.trained, jax.tree.map(lambda x, s=s: s * x, step)))) for s in (1, -1)
        )
        assert (ahead - behind) / (2 * size) == pytest.approx(want, rel=3e-3)


def test_only_the_adapter_has_a_gradient():
    model = model_of("Q8_0")
    adapter = lora.init_adapter(model, jax.random.key(0), rank=4, targets=("q", "down"))
    _, gradient = loss_and_gradient(model, adapter, toy_rows())
    found = [(path, delta) for path, delta in adapter.replace(deltas=gradient).items()]
    assert {path[-1] for path, _ in found} == {"q", "down"}
    for _, delta in found:
        assert delta.scale is None and delta.norms is None and delta.magnitude is None
        assert jnp.any(delta.b != 0) and not jnp.any(delta.a)  # b is zero at the start, so a does nothing yet


def test_packed_documents_are_as_if_each_had_a_row():
    model = model_of("Q8_0", layers=2)
    adapter = random_adapter(model, seed=2)
    examples = toy_examples((9, 5, 12, 3, 17))
    packed, apart = (make_rows(examples, 16, pack=pack) for pack in (True, False))
    assert len(packed) == 3 and len(apart) == 5
    loss, gradient = loss_and_gradient(model, adapter, packed)
    other_loss, other_gradient = loss_and_gradient(model, adapter, apart)
    np.testing.assert_allclose(loss, other_loss, rtol=1e-6)
    close(gradient, other_gradient)
    mixed = dataclasses.replace(packed, first_RT=np.zeros_like(packed.first_RT))  # that the test can fail
    assert abs(float(loss_and_gradient(model, adapter, mixed)[0]) - float(loss)) > 1e-3


def test_positions_begin_anew_with_each_document(monkeypatch):
    seen = []
    tables = transformer.rope_tables
    monkeypatch.setattr(transformer, "rope_tables", lambda *args: seen.append(args[2]) or tables(*args))
    rows = toy_rows((4, 3), row_tokens=8)
    model = model_of("Q8_0")
    with jax.disable_jit():
        summed_loss(model.params, model.config, None, rows.take(np.arange(1)), SHORT)
    assert seen[0].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0]]


def test_parts_of_a_batch_add_up_to_the_batch():
    model = model_of("Q8_0")
    adapter = random_adapter(model, seed=3)
    rows = toy_rows((9, 16, 12, 15), pack=False)  # unequal counts of learned tokens
    whole, parts = (loss_and_gradient(model, adapter, rows, parts=parts) for parts in (1, 4))
    close(parts, whole)


def test_rematerialisation_changes_nothing_but_memory():
    model, rows = model_of("Q8_0", layers=4), toy_rows((33,) * 4, row_tokens=32)
    trained, temporary = [], []
    for remat in (True, False):
        training = TrainingConfig(steps=1, batch=4, warmup=0, optimizer="sgd", learning_rate=1.0, clip=0.0, remat=remat)
        trainer = Trainer(model, Data(rows), training, random_adapter(model, seed=4), 0)
        temporary.append(trainer.compile().memory_analysis().temp_size_in_bytes)
        trainer.advance()
        trained.append(trainer.state.trained)
    close(*trained, 1e-6)
    assert temporary[0] < 0.5 * temporary[1]


@pytest.mark.parametrize(
    ("dtype", "dora"),
    [
        ("float32", True),
        pytest.param("float32", False, marks=pytest.mark.slow),
        pytest.param("bfloat16", False, marks=pytest.mark.slow),
    ],
)
def test_a_step_holds_no_dequantized_base(dtype, dora):
    model = model_of("Q8_0", layers=4)
    rows = toy_rows((9,) * 2, row_tokens=8, pack=False)
    dense = sum(4 * w.size for w in jax.tree.leaves(dense_twin(model).params))
    training = dataclasses.replace(SHORT, dtype=dtype)
    trainer = Trainer(model, Data(rows), training, lora.init_adapter(model, jax.random.key(0), rank=2, dora=dora), 0)
    assert trainer.compile().memory_analysis().temp_size_in_bytes < dense / 4

    if dtype == "bfloat16" or dora:
        return

    def naive(params, state, fixed, batch):
        return train_step(dense_twin(model.replace(params=params)).params, state, fixed, batch, **static)

    static = {"config": model.config, "training": trainer.training}
    arguments = (model.params, trainer.state, trainer.fixed, trainer.batch()[0])
    # that the test can fail
    assert jax.jit(naive).lower(*arguments).compile().memory_analysis().temp_size_in_bytes > dense / 2


def test_logits_by_blocks_give_the_same(monkeypatch):
    model, rows = model_of("Q6_K"), toy_rows()
    adapter = random_adapter(model, seed=5)
    want = loss_and_gradient(model, adapter, rows)
    monkeypatch.setattr(step_module, "VALUES_AT_ONCE", 7 * model.config.vocab_size)  # 7 places at a time, with a rest
    jax.clear_caches()
    close(loss_and_gradient(model, adapter, rows), want)


@pytest.mark.parametrize("adapted", [False, True])
def test_mean_loss_is_that_of_the_logits(adapted):
    model, rows = model_of("Q8_0"), toy_rows((9, 14, 6), pack=False)
    adapter = random_adapter(model, seed=6) if adapted else None
    log_p = jax.nn.log_softmax(realm.forward(model, rows.tokens_RT[:, :-1], adapter=adapter))
    nll = -np.take_along_axis(np.asarray(log_p), rows.tokens_RT[:, 1:, None], -1)[..., 0]
    want = nll[rows.learned_RT[:, 1:]].mean()
    assert mean_loss(model, rows, dataclasses.replace(SHORT, batch=2), adapter) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_training_lowers_the_loss_and_leaves_what_it_was_given(dora):
    model, rows = model_of("Q8_0"), toy_rows((9, 5, 12, 3, 17))
    start = lora.init_adapter(model, jax.random.key(0), rank=4, dora=dora)
    kept = jax.tree.map(np.array, start)
    lines = []
    trained = train(model, Data(rows, rows), SHORT, adapter=start, log=lines.append)
    assert [line["step"] for line in lines] == [0, 4, 8, 12]
    assert lines[-1]["evaluation_loss"] < 0.97 * lines[0]["evaluation_loss"]
    assert lines[0]["evaluation_loss"] == pytest.approx(mean_loss(model, rows, SHORT), rel=1e-6)  # it adds nothing yet
    assert lines[-1]["evaluation_loss"] == pytest.approx(mean_loss(model, rows, SHORT, trained), rel=1e-6)
    jax.tree.map(np.testing.assert_array_equal, kept, jax.tree.map(np.array, start))
    scales = [float(delta.scale) for _, delta in trained.items()]
    assert trained.fitted and scales == [float(delta.scale) for _, delta in start.items()]
    if dora:  # the lengths are those of the trained adapter
        again = trained.replace(fitted=False)
        close(trained.deltas, lora.fit(again, model).deltas, 1e-6)


def test_equal_seeds_give_equal_bits_and_others_another_order():
    model, data = model_of("Q8_0"), Data(toy_rows((9, 5, 12, 3, 17, 11, 8), pack=False))
    start = lora.init_adapter(model, jax.random.key(0), rank=4)
    one, again, other = (train(model, data, SHORT, adapter=start, seed=seed) for seed in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, one, again)
    assert any(np.any(x != y) for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


@pytest.mark.parametrize(
    "optimizer", ["adamw", pytest.param("lion", marks=pytest.mark.slow), pytest.param("sgd", marks=pytest.mark.slow)]
)
def test_bfloat16_activations_train_as_well(optimizer):
    model, rows = model_of("Q8_0"), toy_rows((9, 5, 12, 3, 17))
    rate = {"adamw": 3e-3, "lion": 1e-3, "sgd": 0.3}[optimizer]
    losses = {}
    for dtype in ("float32", "bfloat16"):
        training = dataclasses.replace(SHORT, dtype=dtype, optimizer=optimizer, learning_rate=rate)
        trained = train(model, Data(rows), training, adapter=lora.init_adapter(model, jax.random.key(0), rank=4))
        assert {x.dtype for x in jax.tree.leaves(trained)} == {jnp.dtype(jnp.float32)}
        losses[dtype] = mean_loss(model, rows, SHORT, trained)
    before = mean_loss(model, rows, SHORT)
    assert losses["float32"] < 0.97 * before
    assert losses["bfloat16"] == pytest.approx(losses["float32"], abs=0.15 * (before - losses["float32"]))


def test_every_row_comes_once_in_each_pass_and_the_order_is_of_the_seed_alone():
    order = Order(7, 3, jax.random.key(5))
    steps = np.concatenate([order(step) for step in range(14)])
    passes = steps.reshape(6, 7)
    assert all(sorted(one) == list(range(7)) for one in passes.tolist())
    assert len({tuple(one) for one in passes.tolist()}) == 6
    np.testing.assert_array_equal(Order(7, 3, jax.random.key(5))(11), order(11))
    assert sorted(Order(2, 5, jax.random.key(0))(0).tolist())[1:4] in ([0, 0, 1], [0, 1, 1])  # fewer rows than a batch


@pytest.mark.parametrize(
    ("schedule", "middle", "last"), [("constant", 1, 1), ("linear", 0.5, 1 / 8), ("cosine", 0.5, 0.0381)]
)
def test_schedules(schedule, middle, last):
    training = TrainingConfig(steps=12, warmup=4, learning_rate=2.0, schedule=schedule)
    rates = [float(learning_rate(training, step)) / 2 for step in range(12)]
    np.testing.assert_allclose([*rates[:5:2], rates[8], rates[11]], [0.2, 0.6, 1, middle, last], rtol=2e-3)


def test_clipping_bounds_what_sgd_moves():
    model, rows = model_of("Q8_0"), toy_rows()
    start = lora.init_adapter(model, jax.random.key(0), rank=4)
    training = TrainingConfig(
        steps=1, batch=2, warmup=0, optimizer="sgd", learning_rate=1.0, clip=1e-3, schedule="constant"
    )
    lines = []
    moved = train(model, Data(rows), training, adapter=start, log=lines.append)
    norm = np.sqrt(
        sum(float(jnp.sum((x - y) ** 2)) for x, y in zip(jax.tree.leaves(moved), jax.tree.leaves(start), strict=True))
    )
    assert norm == pytest.approx(1e-3, rel=1e-4)
    assert lines[0]["gradient_norm"] > 1e-2  # as it was before clipping


def test_epochs_are_passes_over_the_rows():
    assert TrainingConfig(epochs=2.5, batch=4, warmup=0).with_steps(rows=10).steps == 7
    with pytest.raises(RealmError, match="warmup is 10 steps; want fewer than the 3 steps"):
        TrainingConfig(epochs=1, batch=4).with_steps(rows=10)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "training.steps and training.epochs: give one of them"),
        ({"steps": 3, "epochs": 1.0}, "give one of them, and not both"),
        ({"steps": 0}, "training.steps is 0; want more than 0"),
        ({"steps": 3, "batch": 6, "accumulate": 4}, "training.batch is 6 rows; want a multiple of accumulate, 4"),
        ({"steps": 3, "evaluate_every": 25}, "training.evaluate_every is 25; want a multiple of log_every, 10"),
        ({"steps": 3, "learning_rate": float("nan")}, "training.learning_rate is nan; want 0 or more"),
    ],
)
def test_configs_that_cannot_work_are_refused(values, message):
    with pytest.raises(RealmError, match=message):
        TrainingConfig(**values)


def test_what_cannot_be_trained_is_refused():
    model, data = model_of("Q8_0"), Data(toy_rows())
    adapter = lora.init_adapter(model, jax.random.key(0), rank=4)
    with pytest.raises(AdapterError, match="is a stack of adapters, which cannot be trained"):
        train(model, data, SHORT, adapter=lora.stack([adapter], model))
    with pytest.raises(AdapterError, match="is empty, which cannot be trained"):
        train(model, data, SHORT, adapter=lora.init_adapter(model, jax.random.key(0), targets=()))
    exploding = dataclasses.replace(SHORT, optimizer="sgd", learning_rate=1e30, clip=0.0)
    with pytest.raises(RealmError, match=r"step 4: the loss is nan .*a lower training.learning_rate"):
        train(model, data, exploding, adapter=adapter)
