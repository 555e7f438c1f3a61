"""Buffers that depend on the weights: renewed after a jump and for a forecast, or kept."""

import pytest
import torch
from live_tasks import STATEFUL, Task


class Normed:
    """Dropout and batch norm, with a guard in eval mode, where running statistics matter."""

    def __init__(self, guard=None, **options):
        self.task = Task(**STATEFUL)
        self.refreshes = 0
        self.answer = guard
        self.koop = self.task.attach(guard=self.guard, refresh=self.refresh, **({"mode": "jump"} | options))

    def guard(self):
        self.task.model.eval()
        return self.answer() if self.answer else self.task.loss()

    def refresh(self):
        """As a user would, with random numbers drawn by dropout, and a mode and gradients left behind."""
        self.refreshes += 1
        torch.optim.swa_utils.update_bn([self.task.x], self.task.model)
        self.task.loss().backward()
        self.task.model.eval()

    @property
    def norm(self):
        return self.task.model[3]


def test_an_accepted_jump_renews_buffers_and_is_better_with_them():
    normed = Normed()
    accepted = []

    def watch(jump):
        if not jump.accepted:
            return
        accepted.append(jump)
        model, random = normed.task.model, torch.get_rng_state()
        assert normed.norm.num_batches_tracked == 2  # of update_bn, and the backward pass of `refresh`
        model.eval()
        assert normed.task.loss().item() == jump.after < jump.before
        model.train()
        torch.set_rng_state(random)

    normed.koop.on_jump(watch)
    normed.task.run(steps=60)
    assert accepted
    assert normed.refreshes >= len(accepted)
    assert normed.koop.steps == 60


def test_a_jump_that_is_not_better_with_renewed_buffers_is_taken_back_with_them():
    plain = Task(**STATEFUL).run().bits
    calls = []

    def guard():  # every candidate is better, until its buffers are renewed
        calls.append(1)
        return 1.0 if len(calls) == 1 or normed.refreshes else 0.5

    normed = Normed(guard)
    normed.task.run()
    jump = normed.koop.jumps[0]
    assert normed.refreshes == 1
    assert (jump.before, jump.after, jump.accepted) == (1.0, 1.0, False)
    assert jump.reason == "with its buffers refreshed the best candidate was not better"
    assert jump.evaluations == len(calls) - sum(other.evaluations for other in normed.koop.jumps[1:])
    assert normed.task.bits == plain


def test_without_refresh_buffers_are_kept():
    task = Task(**STATEFUL)
    koop = task.attach(guard=task.loss, mode="jump")
    tracked = []
    koop.on_jump(lambda jump: tracked.append((jump.accepted, task.model[3].num_batches_tracked.item(), jump.step)))
    task.run()
    assert any(accepted for accepted, _, _ in tracked)
    assert all(count == step for _, count, step in tracked)


def test_forecast_weights_renews_buffers_and_puts_everything_back():
    normed = Normed(mode="forecast")
    normed.task.run(steps=30)
    before = normed.task.bits
    with normed.koop.forecast_weights():
        assert normed.refreshes == 1
        assert normed.norm.num_batches_tracked == 2
        assert normed.task.model.training
    assert normed.task.bits == before
    assert normed.norm.num_batches_tracked == 30


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_while_buffers_are_renewed_restores_everything(error):
    normed, plain = Normed(), Task(**STATEFUL)

    def refresh():
        normed.task.loss().backward()  # moves the statistics
        raise error

    normed.koop._judge.refresh = refresh
    plain.run(steps=12)
    with pytest.raises(error):
        normed.task.run(steps=12)
    assert normed.task.bits == plain.bits
    with pytest.raises(error), normed.koop.forecast_weights():
        pass
    assert normed.task.bits == plain.bits
