"""The classifier, its data, its recordings and the table of the MNIST experiment, on made-up digits."""

import gzip
import json
import math
import os
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from digits import write as write_digits
from torch import nn
from torch.testing import assert_close

import koopt
from koopt.experiments import classifier, data, minibatch, mnist, mnist_methods, timing
from koopt.forecasters import METHODS

REAL, REAL_FILES = os.environ.get("KOOPT_DATA"), data.FILES
RUN = minibatch.Run(
    seeds=2, seed=3, epochs=5, t1=1, t2=3, ahead=2, images=600, held_out=200, batch=20, decays=(0.9, 0.97)
)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        write_digits(tmp_path_factory.mktemp("digits"), patch)
        yield data.mnist()


@pytest.fixture(scope="module")
def trained(digits):
    return minibatch.train(RUN, 3, lambda step: True)


def network_of(weights):
    network = classifier.Classifier()
    nn.utils.vector_to_parameters(weights, network.parameters())
    return network


# data


def test_images_and_labels_come_as_they_were_written(digits):
    shapes = [tuple(tensor.shape) for tensor in vars(digits).values()]
    assert shapes == [(600, 784), (600,), (200, 784), (200,)]
    assert (digits.train_images.dtype, digits.train_labels.dtype) == (torch.uint8, torch.int64)
    assert digits.train_labels.unique().tolist() == list(range(10))


@pytest.mark.skipif(not REAL, reason="KOOPT_DATA names no folder with MNIST")
def test_the_real_digits_are_read_where_they_are(monkeypatch):
    monkeypatch.setenv("KOOPT_DATA", REAL)
    monkeypatch.setattr(data, "FILES", REAL_FILES)
    real = data.mnist()
    assert real.train_labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert_close(classifier.normalized(real.train_images).mean(), torch.tensor(0.0), atol=1e-3, rtol=0)
    assert_close(classifier.normalized(real.train_images).std(), torch.tensor(1.0), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-images-idx3-ubyte.gz", b"", "damaged or not the train-images"),
        ("train-labels-idx1-ubyte.gz", gzip.compress(bytes(100)), "damaged or not the train-labels"),
        ("t10k-images-idx3-ubyte.gz", gzip.compress(b"abc" * 100)[:-9], "damaged"),
        ("t10k-labels-idx1-ubyte.gz", None, "KOOPT_DATA"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, monkeypatch, name, content, message):
    write_digits(tmp_path, monkeypatch)
    path = tmp_path / "mnist" / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((ValueError, OSError), match=message):
        data.mnist()


def test_unpacked_files_do_as_well(tmp_path, monkeypatch):
    write_digits(tmp_path, monkeypatch)
    for path in list((tmp_path / "mnist").iterdir()):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    assert len(data.mnist().test_labels) == 200


@pytest.mark.parametrize("content", [b"", b"\0\0\x09\1\0\0\0\0", b"\0\0\x08\1\0\0\0\2\0", b"\0\0\x08\2\0\0\0\2"])
def test_what_is_not_idx_is_refused(content):
    with pytest.raises(ValueError, match="content"):
        data.parsed(content)


def test_without_data_and_network_both_ways_to_get_them_are_told(tmp_path, monkeypatch):
    monkeypatch.delenv("KOOPT_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(data, "MIRRORS", ("http://127.0.0.1:9/mnist/",))
    with pytest.raises(OSError, match=r"127\.0\.0\.1.*connect to the network.*KOOPT_DATA"):
        data.mnist()


def test_a_download_is_kept_and_a_damaged_one_is_fetched_again(tmp_path, monkeypatch):
    import functools
    import http.server
    import threading

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    write_digits(tmp_path, monkeypatch)
    monkeypatch.delenv("KOOPT_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(data, "MIRRORS", ("http://127.0.0.1:9/", f"http://127.0.0.1:{server.server_port}/mnist/"))
    told = []
    try:
        first = data.mnist(lambda *news: told.append(news))
        assert told
        assert all(done <= total for _, done, total in told)
        (damaged,) = (tmp_path / "cache").rglob("t10k-labels*")
        damaged.write_bytes(b"damaged")
        assert_close(data.mnist().test_labels, first.test_labels)
    finally:
        server.shutdown()
        server.server_close()
    assert_close(data.mnist().train_images, first.train_images)  # from the cache


# the classifier


def test_many_networks_at_once_are_as_each_alone(digits):
    weights = torch.stack([classifier.initial_weights(seed) for seed in range(3)])
    images = classifier.normalized(digits.train_images[:30]).reshape(3, 10, 784)
    labels = digits.train_labels[:30].reshape(3, 10)
    parameters = [layer.clone().requires_grad_() for layer in classifier.layers(weights)]
    losses = classifier.loss_of(classifier.logits(parameters, images), labels)
    losses.sum().backward()
    for i in range(3):
        network = network_of(weights[i])
        loss = nn.functional.cross_entropy(network(images[i]), labels[i])
        loss.backward()
        assert_close(losses[i], loss)
        for layer, parameter in zip(parameters, network.parameters(), strict=True):
            assert_close(layer.grad[i], parameter.grad)


def test_loss_and_accuracy_on_shared_images(digits):
    weights = torch.stack([classifier.initial_weights(seed) for seed in range(5)])
    images, labels = classifier.normalized(digits.test_images), digits.test_labels
    losses, shares = classifier.loss_and_accuracy(weights, images, labels, chunk=2)
    for row, loss, share in zip(weights, losses, shares, strict=True):
        output = network_of(row)(images)
        assert_close(loss, nn.functional.cross_entropy(output, labels).detach())
        assert share == (output.argmax(dim=1) == labels).double().mean()


# recordings


def test_a_group_is_trained_as_each_network_alone_would_be(digits, trained):
    """Against the plain loop, on the same batches: PyTorch's optimizer, schedule and averages."""
    images, labels = classifier.normalized(digits.train_images), digits.train_labels
    network = network_of(classifier.initial_weights(4))
    optimizer = torch.optim.Adadelta(network.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.97)
    averaged = [parameter.detach().clone() for parameter in network.parameters()]
    shuffle = torch.Generator().manual_seed(4)
    path = [nn.utils.parameters_to_vector(network.parameters()).detach()]
    for _ in range(RUN.t2):
        for rows in torch.randperm(400, generator=shuffle).split(20):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images[rows]), labels[rows]).backward()
            optimizer.step()
            average(averaged, [parameter.detach() for parameter in network.parameters()], 0)
            path.append(nn.utils.parameters_to_vector(network.parameters()).detach())
        schedule.step()
    path = torch.stack(path)
    close = {"atol": 2e-4, "rtol": 1e-3}  # float32, 60 steps, another order of sums
    assert (RUN.epoch_steps, RUN.look, RUN.window_steps, RUN.horizon) == (20, 1, 40, 40)
    assert_close(trained.samples[:, 1], path[20:61], **close)
    assert_close(trained.blocks[:, 1], path[21:61], **close)
    assert_close(trained.epochs[:4, 1], path[::20], **close)
    assert_close(trained.averages[1, 1], nn.utils.parameters_to_vector(averaged), **close)
    loss, share = classifier.loss_and_accuracy(path, images[400:], labels[400:])
    assert_close(trained.loss[:61, 1], loss, **close)
    assert (trained.accuracy[:61, 1] - share).abs().max() < 0.02


def test_blocks_are_means_of_the_steps_up_to_t2(digits):
    longer = replace(RUN, batch=5, epochs=4, ahead=1)  # 80 steps an epoch, blocks of 4
    kept = minibatch.train(longer, 3, lambda step: True)
    assert (longer.look, len(kept.blocks), len(kept.samples), len(kept.window)) == (4, 40, 41, 161)
    assert_close(kept.blocks[:, 0], kept.window[1:].reshape(40, 4, -1).mean(dim=1))
    assert torch.equal(kept.samples[:, 0], kept.window[::4])
    assert torch.equal(kept.window[-1], kept.epochs[3, 0])


def test_the_paper_forecast_is_that_of_algorithm_1(trained):
    """Every node and quasi-node by the printed algorithm."""
    window, horizon = trained.window, 7
    found, spectrum = minibatch.forecast_every_step(window, horizon, 1e-4, (None, 1e9))
    parts = koopt.partition(classifier.Classifier(), "node", max_size=157)
    slow = [
        torch.stack([koopt.operator.algorithm_1(patch, horizon, rtol=1e-4) for patch in patches.transpose(0, 1)])
        for patches in parts.gather_flat(window)
    ]
    assert_close(found[0], parts.scatter_flat(slow), atol=2e-5, rtol=1e-3)
    assert torch.equal(found[0], found[1])
    assert sorted({patches.shape[2] for patches in parts.gather_flat(window)}) == [21, 157]
    assert (spectrum.abs() > 0).any()


def test_a_stopped_group_leaves_nothing_and_a_finished_one_is_kept(digits, tmp_path):
    assert minibatch.record(RUN, 3, tmp_path, lambda step: step < 30) is False
    assert not list(tmp_path.iterdir())
    assert minibatch.record(RUN, 3, tmp_path, lambda step: True) is True
    again = minibatch.opened(RUN, 3, tmp_path)
    assert {name: tensor.shape for name, tensor in vars(again).items()} == RUN.shapes(3)
    assert minibatch.opened(replace(RUN, seeds=2), 3, tmp_path).loss.equal(again.loss)
    for other in (replace(RUN, gamma=0.5), replace(RUN, epochs=6)):
        with pytest.raises(ValueError, match="other settings"):
            minibatch.opened(other, 3, tmp_path)
    path = minibatch.file_of(RUN, 3, tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        minibatch.opened(RUN, 3, tmp_path)


def test_groups_cover_all_seeds_once():
    run = replace(RUN, seeds=12, seed=7)
    covered = [seed for first in run.firsts for seed in range(first, first + run.networks(first))]
    assert covered == list(range(7, 19))


# the table


@pytest.fixture(scope="module")
def outcome(digits, tmp_path_factory):
    """A small experiment from recordings that are there."""

    class Small(mnist_methods.Settings):
        @property
        def run(self):
            return RUN

    settings = Small(seeds=2, seed=3, epochs=5, ranks=(1, 2), ahead=3, repeats=1)
    folder = tmp_path_factory.mktemp("mnist")
    minibatch_folder = folder / "recordings"
    minibatch_folder.mkdir()
    minibatch.record(RUN, 3, minibatch_folder, lambda step: True)
    told = []
    rows = mnist.reproduce(settings, folder, lambda *news: told.append(news))
    return settings, rows, folder, told


def test_rows_have_every_method_under_both_protocols(outcome):
    settings, rows, _, _ = outcome
    asked = mnist_methods.methods(settings)
    assert [(row["protocol"], row["what"]) for row in rows] == [
        (protocol, method.what) for protocol in ("validation", "test") for method in asked
    ]
    settings_named = [row["setting"] for row in rows if row["protocol"] == "test"]
    assert settings_named.count("paper") == 3
    assert settings_named.count("recommended") == 1
    for row in rows:
        assert 0 <= row["success"] <= 1
        assert row["step_ms"] == min(row["step_in_memory_ms"], row["step_data_loader_ms"])
        assert all(value is None or not isinstance(value, float) or math.isfinite(value) for value in row.values())
    assert [row["paper_teq_over_T"] for row in rows if "paper_teq_over_T" in row] == [0.97]
    (unchanged,) = (row for row in rows if row["method"] == "last" and row["protocol"] == "test")
    assert (unchanged["success"], unchanged["teq_over_T"], unchanged["loss"]) == (0.0, 0.0, unchanged["loss_at_t2"])


def test_a_row_by_hand(outcome, trained, digits):
    """The mean of the last epoch, from its definition."""
    _, rows, _, _ = outcome
    (row,) = (row for row in rows if row["method"] == "mean" and row["protocol"] == "test")
    weights = trained.samples[-20:].mean(dim=0)
    images, labels = classifier.normalized(digits.test_images), digits.test_labels
    loss = torch.stack([nn.functional.cross_entropy(network_of(w)(images), labels) for w in weights]).detach()
    assert row["loss"] == pytest.approx(loss.mean().item(), rel=1e-5)
    path = [classifier.loss_and_accuracy(w, images, labels)[0] for w in trained.epochs[3:]]
    steps = []
    for i in range(2):
        curve = np.interp(np.arange(41), [0, 20, 40], [losses[i].item() for losses in path])
        below = np.flatnonzero(curve[1:] <= loss[i].item() + 1e-9)
        steps.append(0 if loss[i] >= curve[0] else below[0] + 1 if len(below) else 40)
    assert row["teq_over_T"] == pytest.approx(np.mean(steps) / 40, abs=1 / 40)


def test_forecasts_are_those_of_a_trajectory(trained, outcome):
    """The table's forecast is what a user gets who records with these options."""
    settings, *_ = outcome
    best = next(method for method in mnist_methods.methods(settings) if method.setting == "recommended")
    found = mnist_methods.forecast(RUN, trained, best)[0]
    network = classifier.Classifier()
    traj = koopt.Trajectory(network, window=40, stride=1, average=True)
    for weights in trained.window[1:]:
        nn.utils.vector_to_parameters(weights, network.parameters())
        traj.record()
    weights = traj.forecast(best.horizon, method="ensemble", **best.options)
    assert_close(torch.cat([tensor.flatten() for tensor in weights.values()]), found)
    for method in ("line", "regression", "dema", "mean"):
        chosen = next(m for m in mnist_methods.methods(settings) if m.method == method)
        window = trained.blocks[-(chosen.snapshots or 40) :, 0]
        expected = METHODS[method](window, chosen.horizon, **chosen.options) @ window.double()
        assert_close(mnist_methods.forecast(RUN, trained, chosen)[0], expected.float())


def test_the_result_is_written_with_its_figure(outcome):
    settings, rows, folder, told = outcome
    result = json.loads((folder / "result.json").read_text())
    assert result["experiment"] == "mnist"
    assert len(result["rows"]) == len(rows)
    assert result["settings"]["run"] == json.loads(json.dumps(asdict(RUN)))
    assert [(folder / name).stat().st_size > 10_000 for name in result["figures"]] == [True]
    assert told[-1][1] == told[-1][2]
    titles = [title for title, _, listed in mnist.tables(settings, rows) if listed]
    assert len(titles) == 2


def test_the_step_is_timed_both_ways(digits):
    in_memory, loaded = timing.classifier_step_seconds(digits, batch=20, steps=8)
    assert 0 < in_memory < 1
    assert 0 < loaded < 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 0}, "--seeds is 0"),
        ({"seed": -1}, "--seed is -1"),
        ({"seed": 2**64 - 1}, "below 2"),
        ({"epochs": 6}, "--epochs is 6"),
    ],
)
def test_settings_out_of_range_are_refused_before_anything_is_written(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        mnist.reproduce(replace(mnist_methods.Settings(), **change), tmp_path / "new", lambda *_: None)
    assert not list(tmp_path.iterdir())
