"""The benchmark's tasks, on made-up digits and a made-up play."""

import hashlib
import math

import numpy as np
import pytest
import torch
from digits import write as write_digits
from scipy.integrate import solve_ivp
from torch import nn
from torch.testing import assert_close

from koopt.bench.tasks import QUICK, TASKS, burgers, de_solver, digits, making, shakespeare
from koopt.experiments import classifier, data, oscillator

FULL_BATCH = [name for name, task in TASKS.items() if task.full_batch]
NOISY = [name for name, task in TASKS.items() if not task.full_batch]
LENGTH = 20_000


def write_play(folder, monkeypatch):
    """A text whose letters tell where they stand: a-e to train, g-k guard, v validation, z test."""
    rng = np.random.default_rng(0)
    parts = [
        "".join(rng.choice(list(letters), len(where)))
        for letters, where in zip(("abcde", "ghijk", "v", "z"), shakespeare.splits(LENGTH), strict=True)
    ]
    content = "".join(parts).encode()
    (folder / "tinyshakespeare").mkdir()
    (folder / "tinyshakespeare" / "input.txt").write_bytes(content)
    monkeypatch.setattr(data, "SHAKESPEARE_MD5", hashlib.md5(content).hexdigest())
    monkeypatch.setenv("KOOPT_DATA", str(folder))


@pytest.fixture(scope="module", autouse=True)
def made_up(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("data")
        write_digits(folder, patch, train=1200)
        write_play(folder, patch)
        yield folder


def state(model):
    """All that a look must not change."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    return tensors, modes, [parameter.grad for parameter in model.parameters()], torch.get_rng_state()


def train(problem, steps, rate=1e-3):
    optimizer = torch.optim.Adam(problem.model.parameters(), rate)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = problem.loss(problem.batch())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# every task


@pytest.mark.parametrize("name", TASKS)
def test_a_seed_gives_the_same_run_again_and_another_seed_another(name):
    runs = [TASKS[name].problem(seed, True) for seed in (1000, 1000, 1001)]
    before = torch.get_rng_state()
    first, again, other = (train(problem, 3) for problem in runs)
    assert first == again
    assert first != other
    assert_close(runs[0].model.state_dict(), runs[1].model.state_dict(), rtol=0, atol=0)
    assert_close(torch.get_rng_state(), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", TASKS)
def test_making_a_problem_uses_no_global_random_numbers(name):
    before = torch.get_rng_state()
    TASKS[name].problem(1000, False).batch()
    assert_close(torch.get_rng_state(), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", TASKS)
def test_looks_leave_no_trace(name):
    problem = TASKS[name].problem(1000, True)
    train(problem, 2)
    next(module for module in problem.model.modules() if not list(module.children())).eval()  # a mode of its own
    problem.model.zero_grad()
    before = state(problem.model)
    values = problem.guard().item(), problem.validate(), problem.test()
    assert_close(state(problem.model), before, rtol=0, atol=0)
    assert (problem.guard().item(), problem.validate(), problem.test()) == values
    assert all(math.isfinite(value) and value > 0 for value in values)


@pytest.mark.parametrize("name", TASKS)
def test_training_goes_down_and_reaches_every_weight(name):
    problem = TASKS[name].problem(1000, False)
    start = {key: parameter.detach().clone() for key, parameter in problem.model.named_parameters()}
    batch = problem.batch()
    before = problem.loss(batch).item()
    train(problem, 40, TASKS[name].rates[1])
    assert problem.loss(batch).item() < before
    assert all(not torch.equal(parameter, start[key]) for key, parameter in problem.model.named_parameters())


@pytest.mark.parametrize("name", FULL_BATCH)
def test_full_batch_guard_and_validation_are_the_training_loss(name):
    problem = TASKS[name].problem(1000, True)
    loss = problem.loss(problem.batch()).item()
    assert problem.guard().item() == pytest.approx(loss, rel=1e-12)
    assert problem.validate() == pytest.approx(loss, rel=1e-12)


def test_quick_tasks_are_the_same_ones_with_fewer_steps():
    assert list(QUICK) == list(TASKS)
    for name, quick in QUICK.items():
        assert quick.problem is TASKS[name].problem
        assert 0 < quick.steps < TASKS[name].steps
        assert TASKS[name].steps % TASKS[name].looks == 0
        assert set(quick.rates) < set(TASKS[name].rates)


# differential equations


def test_the_residual_of_burgers_is_that_of_autograd_and_so_is_its_gradient():
    network = making.initialized(burgers.Burgers, 1000)
    points = burgers.collocation().requires_grad_()
    u = network(points)
    slope = torch.autograd.grad(u.sum(), points, create_graph=True)[0]
    u_xx = torch.autograd.grad(slope[:, 1].sum(), points, create_graph=True)[0][:, 1]
    wanted = slope[:, 0] + u * slope[:, 1] - burgers.VISCOSITY * u_xx
    found = burgers.residual(network, points.detach())
    assert_close(found, wanted, rtol=0, atol=1e-13)
    weights = list(network.parameters())
    gradients = [torch.autograd.grad(residual.square().mean(), weights) for residual in (found, wanted)]
    assert_close(*gradients, rtol=1e-10, atol=1e-14)


def test_the_exact_solution_satisfies_burgers_equation():
    generator = torch.Generator().manual_seed(0)
    points = 0.05 + 0.9 * torch.rand(200, 2, generator=generator, dtype=torch.float64)
    h = 1e-4
    in_t, in_x = torch.tensor([[h, 0.0], [0.0, h]], dtype=torch.float64)
    u, later, sooner, right, left = (burgers.solution(points + shift) for shift in (0 * in_t, in_t, -in_t, in_x, -in_x))
    u_t, u_x, u_xx = (later - sooner) / (2 * h), (right - left) / (2 * h), (right - 2 * u + left) / h**2
    assert u_xx.abs().max() > 10  # there is something to cancel
    assert_close(u_t + u * u_x - burgers.VISCOSITY * u_xx, torch.zeros_like(u), rtol=0, atol=1e-5)


def test_network_and_exact_solution_start_as_a_sine_and_vanish_at_the_walls():
    axis = torch.linspace(0, 1, 21, dtype=torch.float64)
    start = torch.stack([torch.zeros_like(axis), axis], dim=1)
    walls = torch.cartesian_prod(axis, torch.tensor([0.0, 1.0], dtype=torch.float64))
    for u in (burgers.solution, making.initialized(burgers.Burgers, 1000)):
        assert_close(u(start).detach(), torch.sin(math.pi * axis))
        assert_close(u(walls).detach(), torch.zeros(42, dtype=torch.float64))


def test_the_error_of_burgers_is_relative_to_the_exact_solution():
    problem = burgers.TASK.problem(1000, False)
    nn.init.zeros_(problem.model.last.weight)  # u stays the sine
    axis = torch.linspace(0, 1, 41, dtype=torch.float64)
    truth = burgers.solution(torch.cartesian_prod(axis, axis)).reshape(41, 41)
    wanted = (torch.sin(math.pi * axis) - truth).square().sum().sqrt() / truth.square().sum().sqrt()
    assert problem.test() == pytest.approx(wanted.item())


def test_the_loss_of_the_oscillator_is_that_of_autograd_and_so_is_its_gradient():
    network, times = making.initialized(oscillator.Oscillator, 1000), oscillator.time_points()
    weights = list(network.parameters())
    found, wanted = de_solver.loss(network, times), oscillator.loss_by_autograd(network, times)
    assert_close(found, wanted)
    assert_close(torch.autograd.grad(found, weights), torch.autograd.grad(wanted, weights))


def test_the_oscillators_solution_is_scipys_and_keeps_its_energy():
    times = oscillator.time_points()
    x, p = de_solver.solution(times).T
    found = solve_ivp(
        lambda t, state: [state[1], -state[0] - state[0] ** 3],
        (0, oscillator.END),
        [oscillator.X0, oscillator.P0],
        t_eval=times.squeeze(1).clamp(max=oscillator.END).numpy(),
        rtol=1e-11,
        atol=1e-11,
    )
    assert_close(torch.stack([x, p]), torch.from_numpy(found.y), rtol=0, atol=1e-7)
    energy = p**2 / 2 + x**2 / 2 + x**4 / 4
    assert_close(energy, energy[0].expand(200), rtol=1e-8, atol=0)


def test_the_error_of_the_oscillator_falls_as_it_is_solved():
    problem = de_solver.TASK.problem(1000, False)
    nn.init.zeros_(problem.model.last.weight)
    nn.init.zeros_(problem.model.last.bias)  # x and p stay at their start
    truth = de_solver.solution(oscillator.time_points())
    start = torch.tensor([oscillator.X0, oscillator.P0], dtype=torch.float64)
    assert problem.test() == pytest.approx(((start - truth).norm() / truth.norm()).item())


# digits


def rows(images):
    return {image.numpy().tobytes() for image in images}


def test_splits_of_the_digits_share_nothing_and_leave_nothing_out():
    train_part, guard, validation = digits.splits(60_000)
    assert [len(part) for part in (train_part, guard, validation)] == [54_500, 500, 5_000]
    assert torch.cat([train_part, guard, validation]).sort().values.tolist() == list(range(60_000))


@pytest.mark.parametrize("guarded", [True, False])
def test_the_guards_digits_are_trained_on_only_without_it(guarded):
    mnist = data.mnist()
    train_part, guard, validation = (
        rows(classifier.normalized(mnist.train_images[part])) for part in digits.splits(1200)
    )
    problem = digits.MLP.problem(1000, guarded)
    seen = set.union(*(rows(problem.batch()[0]) for _ in range(170)))  # ten epochs
    assert len(guard) == 10
    assert seen == (train_part if guarded else train_part | guard)
    assert not seen & validation


def test_an_epoch_holds_each_index_once():
    batches = making.shuffled(10, 4, 1000)
    first, second = (torch.cat([next(batches), next(batches)]).tolist() for _ in range(2))
    assert len(set(first)) == 8 == len(set(second))
    assert first != second


def test_images_and_labels_stay_together():
    mnist = data.mnist()
    keys = [image.numpy().tobytes() for image in classifier.normalized(mnist.train_images)]
    label_of = dict(zip(keys, mnist.train_labels.tolist(), strict=True))
    images, labels = digits.CNN.problem(1000, True).batch()
    assert [label_of[image.numpy().tobytes()] for image in images] == labels.tolist()


def test_validation_is_the_loss_in_eval_mode_and_the_guard_the_one_in_train_mode():
    problem, mnist = digits.CNN.problem(1000, True), data.mnist()
    train(problem, 3)
    _, guard, validation = digits.splits(1200)

    def loss(part):
        return nn.functional.cross_entropy(
            problem.model(classifier.normalized(mnist.train_images[part])), mnist.train_labels[part]
        ).item()

    found = problem.guard().item(), problem.validate()
    problem.model.eval()
    assert found[1] == pytest.approx(loss(validation), rel=1e-5)
    problem.model.train()
    assert found[0] == pytest.approx(loss(guard), rel=1e-5)


def test_refresh_gives_batchnorm_the_statistics_of_training_images():
    problem, mnist = digits.CNN.problem(1000, True), data.mnist()
    train(problem, 3)
    problem.refresh()
    model = problem.model
    images = mnist.train_images[digits.splits(1200)[0]]
    with torch.no_grad():
        parts = [model[1](model[0](some)) for some in classifier.normalized(images).split(250)]
    assert_close(model[2].running_mean, torch.stack([part.mean((0, 2, 3)) for part in parts]).mean(0))
    assert_close(model[2].running_var, torch.stack([part.transpose(0, 1).flatten(1).var(1) for part in parts]).mean(0))
    assert (model[2].momentum, model.training) == (0.1, True)


@pytest.mark.parametrize("name", sorted(set(TASKS) - {"mnist-cnn"}))
def test_refresh_changes_nothing_without_batchnorm(name):
    problem = TASKS[name].problem(1000, True)
    before = state(problem.model)
    problem.refresh()
    assert_close(state(problem.model), before, rtol=0, atol=0)


# Shakespeare


def letters(numbers):
    return {"abcdeghijkvz"[number] for number in numbers.flatten().tolist()}


@pytest.mark.parametrize(("guarded", "seen"), [(True, "abcde"), (False, "abcdeghijk")])
def test_the_guards_text_is_trained_on_only_without_it(guarded, seen):
    problem = shakespeare.TASK.problem(1000, guarded)
    batches = [problem.batch() for _ in range(400)]
    assert set.union(*(letters(part) for batch in batches for part in batch)) == set(seen)
    for windows, following in batches[:3]:
        assert windows.shape == following.shape == (16, 64)
        assert_close(windows[:, 1:], following[:, :-1])


def test_splits_of_the_text_follow_each_other_to_its_end():
    parts = shakespeare.splits(1_115_394)
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    assert parts[-1].stop == 1_115_394
    assert [len(part) // 65 for part in parts] == [15411, 32, 858, 858]


def test_windows_of_a_split_stay_in_it_and_do_not_overlap():
    text = torch.arange(1000)
    seen, following = shakespeare.windows(text, range(100, 500), 4)
    assert_close(following, seen + 1)
    assert seen[:, 0].tolist() == [100, 165, 295, 425]
    assert following.max() < 500


def test_the_transformer_does_not_look_ahead():
    network = making.initialized(lambda: shakespeare.Transformer(12), 1000)
    text = torch.randint(12, (1, 64), generator=torch.Generator().manual_seed(0))
    other = text.clone()
    other[0, 40:] = (other[0, 40:] + 1) % 12
    assert_close(network(text)[:, :40], network(other)[:, :40])
    assert not torch.allclose(network(text)[:, 40:], network(other)[:, 40:])
    assert not torch.allclose(network(text)[0, 39], network(text.roll(1))[0, 39])  # but at what was before


def test_a_damaged_play_is_refused_and_a_missing_one_named(made_up, tmp_path, monkeypatch):
    assert len(data.shakespeare()) == LENGTH
    monkeypatch.setenv("KOOPT_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"KOOPT_DATA: .*tinyshakespeare has no input\.txt"):
        data.shakespeare()
    (tmp_path / "tinyshakespeare").mkdir()
    (tmp_path / "tinyshakespeare" / "input.txt").write_text("To be, or not")
    with pytest.raises(ValueError, match=r"damaged or not the input\.txt of Tiny Shakespeare"):
        data.shakespeare()


def test_without_a_play_and_a_network_both_ways_to_get_it_are_told(tmp_path, monkeypatch):
    monkeypatch.delenv("KOOPT_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(data, "SHAKESPEARE", "http://127.0.0.1:9/input.txt")
    with pytest.raises(OSError, match=r"127\.0\.0\.1.*connect to the network.*tinyshakespeare/.*KOOPT_DATA"):
        data.shakespeare()
