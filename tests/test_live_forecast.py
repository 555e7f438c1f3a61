"""Weights for evaluation."""

import math

import pytest
import torch
from live_tasks import STATEFUL, Task, flat, sgd
from torch import nn

import koopt
from koopt.live.evaluating import AVERAGE, FORECASTS, RULE, Taste, blended, by_guard


def test_before_enough_data_the_forecast_is_the_weights_then_the_average():
    task = Task(sgd)
    koop = task.attach(window=56)
    named = dict(task.model.named_parameters())
    assert all(torch.equal(value, named[name]) for name, value in koop.forecast().items())
    copies = []
    for step in range(7):
        task.step(step)
        copies.append(flat(task.model))
    forecast = torch.cat([value.double().flatten() for value in koop.forecast().values()])
    torch.testing.assert_close(forecast, torch.stack(copies[-2:]).mean(dim=0), rtol=1e-6, atol=1e-7)


def test_weights_that_were_put_elsewhere_are_followed():
    """``parameter.data = ...``, as vector_to_parameters() does it: their memory is another one."""
    task = Task(sgd)
    koop = task.attach(mode="forecast")
    task.run(steps=1)
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(task.model.parameters()), task.model.parameters())
    task.step(1)
    assert torch.equal(koop._means.rows[1], flat(task.model).float())


class Decay:
    """Weights that decay to a limit, with noise."""

    def __init__(self, noise=0.05, guarded=False):
        torch.manual_seed(0)
        self.noise, self.model = noise, nn.Linear(40, 1, bias=False)
        self.limit, self.away = torch.randn(1, 40), torch.randn(1, 40)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        self.model.weight.grad = torch.zeros_like(self.model.weight)
        self.calls = 0
        self.koop = koopt.attach(self.optimizer, self.model, self.guard if guarded else None, "forecast")

    def guard(self):
        self.calls += 1
        return self.distance(self.model.weight)

    def distance(self, weight):
        return (weight - self.limit).norm()

    def at(self, step):
        return self.limit + self.away * math.exp(-step / 400)

    def run(self, steps):
        for step in range(self.koop.steps, self.koop.steps + steps):
            with torch.no_grad():
                self.model.weight.copy_(self.at(step) + self.noise * torch.randn(1, 40))
            self.optimizer.step()

    def average(self, share):
        steps = self.koop.steps
        return torch.stack([self.at(step) for step in range(round(steps * (1 - share)), steps)]).mean(dim=0)


def test_the_rule_follows_a_decay_better_than_its_average():
    decay = Decay()
    decay.run(800)
    own = decay.distance(decay.koop.forecast()["weight"])
    assert own < 0.9 * decay.distance(decay.average(3 / 16))
    for steps in (200, 400):
        error = (decay.koop.forecast(steps)["weight"] - decay.at(800 + steps)).norm()
        assert error < 0.35 * decay.distance(decay.at(800))


def test_with_a_guard_it_looks_farther():
    """Where drift is all there is, the guard's choice is nearer to the limit than the rule and than any average."""
    decay, alone = Decay(guarded=True), Decay()
    for run in (decay, alone):
        run.run(800)
    calls = decay.calls
    own = decay.distance(decay.koop.forecast()["weight"])
    assert decay.calls - calls == 1 + len(FORECASTS)
    assert own < 0.8 * alone.distance(alone.koop.forecast()["weight"])
    assert own < 0.8 * decay.distance(decay.average(1 / 16))


def test_noise_alone_is_averaged():
    """Without drift nothing comes nearer than the mean over a long time."""
    decay = Decay(guarded=True)
    decay.away.zero_()
    decay.run(600)
    assert decay.distance(decay.koop.forecast()["weight"]) < 0.15 * decay.distance(decay.model.weight)


def test_the_choice_remembers_earlier_looks():
    """One lucky look does not change the choice; a later look weighs more, and so do many."""
    taste = Taste()
    for step in (100, 200, 300):
        taste.learn(step, [0.1, 0.0, 0.05, 0.0, 0.0])
    taste.learn(400, [0.0, 0.12, 0.0, 0.0, 0.0])
    assert taste.order()[:2] == [0, 1]
    taste.learn(800, [0.0, 0.12, 0.0, 0.0, 0.0])
    assert taste.order()[0] == 1
    again = Taste()
    again.load_state_dict(taste.state_dict())
    taste.learn(900, [0.3, 0.0, 0.0, 0.0, 0.0])
    again.learn(900, [0.3, 0.0, 0.0, 0.0, 0.0])
    assert again.scores == taste.scores


@pytest.mark.parametrize("blend", [AVERAGE, RULE, *FORECASTS])
@pytest.mark.parametrize("time", [8, 29, 56])
def test_blends_keep_what_stands_still(blend, time):
    """Weights that do not move are forecast as they are, whatever the blend: its coefficients sum to one there."""
    assert sum(part.weight for part in blend) == pytest.approx(1)
    coefficients = blended(torch.full((time, 1), 3.0, dtype=torch.float64), blend)
    assert coefficients.shape == (time,)
    assert coefficients.sum().item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("losses", [[math.nan] * 6, [math.inf] * 6, [-1.0, -2.0, -1.5, -3.0, -1.0, 0.0], [0.0] * 6])
def test_any_loss_of_the_guard_is_borne(losses):
    decay = Decay()
    decay.run(100)
    left, seen = list(losses), []

    def evaluate(weights):
        seen.append([value.clone() for value in weights])
        return left.pop(0)

    now, taste = [decay.model.weight.detach().clone()], Taste()
    found = by_guard(decay.koop._means, now, evaluate, taste, 100)
    best = min(range(6), key=lambda i: losses[i]) if losses[0] == -1 else 0
    assert torch.equal(found[0], seen[best][0])
    assert all(math.isfinite(score) for score in taste.scores)


@pytest.mark.parametrize("mode", ["auto", "jump", "forecast"])
def test_with_a_guard_the_forecast_is_never_worse_than_the_weights(mode):
    task = Task(lambda m: sgd(m, lr=0.3))
    koop = task.attach(guard=task.loss, mode=mode, window=32, cycle=1000)
    for step in range(45):
        task.step(step)
        if step % 5:
            continue
        before = task.bits
        now = task.loss().item()
        with koop.forecast_weights():
            assert task.loss().item() <= now
        assert task.bits == before
        koop.forecast(7)
    assert koop.steps == 45


def test_forecast_weights_puts_everything_back():
    task = Task(**STATEFUL)
    koop = task.attach()
    task.run(steps=30)
    before, forecast = task.bits, koop.forecast()
    random = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), koop.forecast_weights():  # noqa: PT012
        assert all(torch.equal(p, forecast[name]) for name, p in task.model.named_parameters())
        task.model(task.x)  # moves the statistics of batch norm
        with pytest.raises(RuntimeError, match=r"optimizer.step\(\) within forecast_weights\(\)"):
            task.optimizer.step()
        with pytest.raises(RuntimeError, match=r"held by forecast_weights\(\)"), koop.forecast_weights():
            pass
        with pytest.raises(RuntimeError, match="held by"):
            koop.forecast()
        1 / 0  # noqa: B018
    torch.set_rng_state(random)
    assert task.bits == before
    task.optimizer.step()  # is allowed again


def test_forecasts_of_weights_that_are_not_finite_are_those_weights():
    task = Task(sgd)
    koop = task.attach(guard=lambda: 1.0)
    task.run(steps=40)
    with torch.no_grad():
        task.model[0].weight[0, 0] = math.nan
    for _ in range(3):
        task.optimizer.step()
    found = koop.forecast()
    assert torch.equal(found["0.bias"], task.model[0].bias)
    assert koop.forecast(5).keys() == found.keys()


def test_block_means_pause_while_jumps_are_accepted():
    task = Task(sgd)
    calls = []

    def guard():  # only at the first attempt every candidate is better
        calls.append(1)
        return 1.0 if len(calls) == 1 or koop.jumps else 0.5

    koop = task.attach(guard=guard, cycle=20)
    held = []
    for step in range(80):
        task.step(step)
        held.append(koop._means.held + koop._means.open)
    accepted, refused, *_ = koop.jumps
    assert (accepted.accepted, refused.accepted) == (True, False)
    assert all(held[: accepted.step - 1])
    assert not any(held[accepted.step - 1 : refused.step])
    assert all(held[refused.step :])
