"""Which weights make up each patch, against expectations written out a module; gather and scatter as exact inverses."""

import itertools
from collections import Counter

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import koopt

BY = ["weight", "node", "layer", "network"]


def numbered(model):
    """The trainable weights by name, each weight a number of its own."""
    count = itertools.count()
    return {
        name: torch.tensor([next(count) for _ in range(p.numel())]).reshape(p.shape)
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def patches_of(model, by="node", max_size=None):
    """The patches as sets of weights, after checking that every weight is in exactly one."""
    numbers = numbered(model)
    groups = koopt.partition(model, by, max_size).gather(numbers)
    patches = [tuple(patch) for group in groups for patch in group.tolist()]
    held = [number for patch in patches for number in patch]
    assert sorted(held) == sorted(number for tensor in numbers.values() for number in tensor.flatten().tolist())
    return Counter(frozenset(patch) for patch in patches)


def patch(*tensors):
    return frozenset(number for tensor in tensors for number in tensor.flatten().tolist())


def units(*tensors):
    """Patches that join row i of every tensor."""
    return [patch(*rows) for rows in zip(*tensors, strict=True)]


def transposed(module, w):
    """Output channel c of a transposed convolution: index c of dim 1 within its group, for all the group's inputs."""
    inputs, outputs = module.in_channels // module.groups, module.out_channels // module.groups
    found = []
    for channel in range(module.out_channels):
        group, position = divmod(channel, outputs)
        weights = [w["weight"][i, position] for i in range(group * inputs, (group + 1) * inputs)]
        found.append(patch(*weights, *([w["bias"][channel]] if "bias" in w else [])))
    return found


def recurrent(*suffixes, bias=True, projected=False):
    def expected(module, w):
        found = []
        for s in suffixes:
            names = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if bias else [])]
            found += units(*[w[name + s] for name in names])
            found += units(w["weight_hr" + s]) if projected else []
        return found

    return expected


def weight_and_bias(module, w):
    return units(w["weight"], w["bias"])


def weight_rows(module, w):
    return units(w["weight"])


def elementwise(module, w):
    return [patch(*pair) for pair in zip(w["weight"].flatten(), w["bias"].flatten(), strict=True)]


def joint_attention(module, w):
    return units(w["in_proj_weight"], w["in_proj_bias"]) + units(w["out_proj.weight"], w["out_proj.bias"])


def separate_attention(module, w):
    bias, size = w["in_proj_bias"], module.embed_dim
    found = units(w["out_proj.weight"], w["out_proj.bias"])
    for i, name in enumerate("qkv"):
        found += units(w[f"{name}_proj_weight"], bias[i * size : (i + 1) * size])
    return found


def frozen(model, *names):
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


MODULES = {
    "linear": (lambda: nn.Linear(4, 3), weight_and_bias),
    "linear without bias": (lambda: nn.Linear(4, 3, bias=False), weight_rows),
    "linear, weight frozen": (lambda: frozen(nn.Linear(4, 3), "weight"), lambda m, w: units(w["bias"])),
    "linear, bias frozen": (lambda: frozen(nn.Linear(4, 3), "bias"), weight_rows),
    "bilinear": (lambda: nn.Bilinear(2, 3, 4), weight_and_bias),
    "conv1d": (lambda: nn.Conv1d(2, 3, 2), weight_and_bias),
    "conv2d": (lambda: nn.Conv2d(4, 6, (2, 3), groups=2), weight_and_bias),
    "conv2d depthwise": (lambda: nn.Conv2d(3, 6, 2, groups=3, bias=False), weight_rows),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), weight_and_bias),
    "transposed conv1d": (lambda: nn.ConvTranspose1d(2, 3, 2), transposed),
    "transposed conv2d in groups": (lambda: nn.ConvTranspose2d(4, 6, (2, 3), groups=2), transposed),
    "transposed conv2d depthwise": (lambda: nn.ConvTranspose2d(3, 3, 2, groups=3), transposed),
    "transposed conv3d without bias": (lambda: nn.ConvTranspose3d(4, 2, 2, groups=2, bias=False), transposed),
    "transposed conv, weight frozen": (
        lambda: frozen(nn.ConvTranspose1d(2, 3, 2), "weight"),
        lambda m, w: units(w["bias"]),
    ),
    "batch norm": (lambda: nn.BatchNorm2d(3), elementwise),
    "instance norm": (lambda: nn.InstanceNorm1d(3, affine=True), elementwise),
    "group norm": (lambda: nn.GroupNorm(2, 4), elementwise),
    "layer norm": (lambda: nn.LayerNorm(3), elementwise),
    "layer norm over two axes": (lambda: nn.LayerNorm((2, 3)), elementwise),
    "layer norm without bias": (
        lambda: nn.LayerNorm((2, 3), bias=False),
        lambda m, w: [patch(x) for x in w["weight"].flatten()],
    ),
    "rms norm": (lambda: nn.RMSNorm((2, 3)), lambda m, w: [patch(x) for x in w["weight"].flatten()]),
    "embedding": (lambda: nn.Embedding(5, 3), weight_rows),
    "embedding bag": (lambda: nn.EmbeddingBag(5, 3), weight_rows),
    "prelu": (lambda: nn.PReLU(3), weight_rows),
    "attention": (lambda: nn.MultiheadAttention(4, 2), joint_attention),
    "attention without bias": (
        lambda: nn.MultiheadAttention(4, 2, bias=False),
        lambda m, w: units(w["in_proj_weight"]) + units(w["out_proj.weight"]),
    ),
    "attention with kdim and vdim": (lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=5), separate_attention),
    "attention with kdim, without bias": (
        lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=5, bias=False),
        lambda m, w: [u for name in "qkv" for u in units(w[f"{name}_proj_weight"])] + units(w["out_proj.weight"]),
    ),
    "attention with bias_k": (
        lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True),
        lambda m, w: [*joint_attention(m, w), patch(w["bias_k"]), patch(w["bias_v"])],
    ),
    "attention with kdim, weights frozen": (
        lambda: frozen(nn.MultiheadAttention(4, 2, kdim=3), "q_proj_weight", "k_proj_weight", "v_proj_weight"),
        lambda m, w: units(w["in_proj_bias"]) + units(w["out_proj.weight"], w["out_proj.bias"]),
    ),
    "rnn": (lambda: nn.RNN(2, 3), recurrent("_l0")),
    "gru, both ways": (lambda: nn.GRU(2, 3, bidirectional=True), recurrent("_l0", "_l0_reverse")),
    "lstm, two layers": (lambda: nn.LSTM(2, 3, num_layers=2), recurrent("_l0", "_l1")),
    "lstm, two layers, both ways, projected": (
        lambda: nn.LSTM(2, 3, num_layers=2, bidirectional=True, proj_size=2),
        recurrent("_l0", "_l0_reverse", "_l1", "_l1_reverse", projected=True),
    ),
    "lstm without bias": (lambda: nn.LSTM(2, 3, bias=False), recurrent("_l0", bias=False)),
    "lstm, weight_ih frozen": (
        lambda: frozen(nn.LSTM(2, 3), "weight_ih_l0"),
        lambda m, w: units(w["weight_hh_l0"], w["bias_ih_l0"], w["bias_hh_l0"]),
    ),
    "rnn cell": (lambda: nn.RNNCell(2, 3), recurrent("")),
    "gru cell without bias": (lambda: nn.GRUCell(2, 3, bias=False), recurrent("", bias=False)),
    "lstm cell": (lambda: nn.LSTMCell(2, 3), recurrent("")),
    "parameter list with a scalar": (
        lambda: nn.ParameterList([nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.ones(2, 3))]),
        lambda m, w: [patch(w["0"]), *units(w["1"])],
    ),
    "weight norm": (
        lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
        lambda m, w: units(w["parametrizations.weight.original0"], w["parametrizations.weight.original1"], w["bias"]),
    ),
    "weight norm along the inputs": (
        lambda: parametrizations.weight_norm(nn.Linear(4, 3), dim=1),
        lambda m, w: [
            patch(w["parametrizations.weight.original0"]),
            *units(w["parametrizations.weight.original1"], w["bias"]),
        ],
    ),
    "weight norm of a transposed convolution": (
        lambda: parametrizations.weight_norm(nn.ConvTranspose1d(2, 3, 2)),
        lambda m, w: (
            units(w["parametrizations.weight.original0"])
            + units(w["parametrizations.weight.original1"].transpose(0, 1), w["bias"])
        ),
    ),
    "spectral norm": (
        lambda: parametrizations.spectral_norm(nn.Linear(4, 3)),
        lambda m, w: units(w["parametrizations.weight.original"], w["bias"]),
    ),
    "weight norm in a recurrent layer": (
        lambda: parametrizations.weight_norm(nn.GRU(2, 3), "weight_hh_l0"),
        lambda m, w: units(
            w["weight_ih_l0"],
            w["parametrizations.weight_hh_l0.original0"],
            w["parametrizations.weight_hh_l0.original1"],
            w["bias_ih_l0"],
            w["bias_hh_l0"],
        ),
    ),
    "pruned": (
        lambda: prune.random_unstructured(nn.Linear(4, 3), "weight", 0.5),
        lambda m, w: units(w["weight_orig"], w["bias"]),
    ),
}


@pytest.mark.parametrize("case", MODULES)
def test_nodes(case):
    make, expected = MODULES[case]
    model = make()
    assert patches_of(model) == Counter(expected(model, numbered(model)))


@pytest.mark.parametrize("case", MODULES)
def test_nodes_deeper_in_a_model(case):
    make, expected = MODULES[case]
    inner = make()
    model = nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"inner": inner}))
    numbers = numbered(model)
    own = {name.removeprefix("1.inner."): w for name, w in numbers.items() if name.startswith("1.inner.")}
    first = units(numbers["0.weight"], numbers["0.bias"])
    assert patches_of(model) == Counter(first + expected(inner, own))


CHANNELS = {
    "linear": (nn.Linear(4, 3), [(5, 4)], -1),
    "bilinear": (nn.Bilinear(2, 3, 4), [(5, 2), (5, 3)], -1),
    "conv2d": (nn.Conv2d(4, 6, 3, groups=2), [(2, 4, 5, 5)], 1),
    "transposed conv1d": (nn.ConvTranspose1d(4, 3, 2), [(2, 4, 5)], 1),
    "transposed conv2d": (nn.ConvTranspose2d(6, 4, 3, groups=2), [(2, 6, 5, 5)], 1),
    "transposed conv3d": (nn.ConvTranspose3d(2, 4, 2, groups=2), [(1, 2, 3, 3, 3)], 1),
    "batch norm": (nn.BatchNorm1d(3), [(5, 3, 2)], 1),
    "group norm": (nn.GroupNorm(2, 4), [(5, 4, 2)], 1),
    "layer norm": (nn.LayerNorm(6), [(5, 6)], -1),
}


@pytest.mark.parametrize("case", CHANNELS)
def test_a_node_moves_one_output_channel(case):
    model, shapes, axis = CHANNELS[case]
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    weights = {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64) for name, p in model.named_parameters()
    }
    parts = koopt.partition(model)
    model = model.double()
    before = torch.func.functional_call(model, weights, tuple(inputs))
    (nodes,) = parts.gather(weights)
    moved = []
    for i in range(len(nodes)):
        changed = nodes.clone()
        changed[i] += 1.0
        after = torch.func.functional_call(model, parts.scatter([changed]), tuple(inputs))
        difference = (after - before).abs().movedim(axis, 0).flatten(1).amax(dim=1)
        moved.append(difference.gt(1e-12).nonzero().flatten().tolist())
    assert sorted(moved) == [[channel] for channel in range(before.shape[axis])]


class ResidualBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.gain = nn.Parameter(torch.tensor(1.0))


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2)
        self.decoder = nn.Linear(8, 11)
        self.decoder.weight = self.embedding.weight


def perceptron(*sizes, activation=nn.Sigmoid):
    layers = [module for a, b in itertools.pairwise(sizes) for module in (nn.Linear(a, b), activation())]
    return nn.Sequential(*layers[:-1])


NETWORKS = {
    "resnet": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3), ResidualBlock(4), ResidualBlock(4), nn.Flatten(), nn.Linear(16, 10)
    ),
    "transformer": Language,
    "oscillator": lambda: perceptron(1, 10, 10, 2),
    "mnist": lambda: perceptron(784, 20, 20, 20, 10, activation=nn.ReLU),
}


def odd_and_even(name, parameter):
    return torch.arange(parameter.numel()).reshape(parameter.shape) % 2


CUTS = [(by, None) for by in BY] + [
    ("node", 7),
    ("network", 157),
    ("weight", 3),
    (odd_and_even, None),
    (odd_and_even, 5),
]


@pytest.mark.parametrize(("by", "max_size"), CUTS)
@pytest.mark.parametrize("network", NETWORKS)
def test_every_weight_in_one_patch_without_padding(network, by, max_size):
    model = NETWORKS[network]()
    parts = koopt.partition(model, by, max_size)
    flat = torch.cat([index.flatten() for index in parts.indices])
    assert flat.sort().values.equal(torch.arange(parts.size))
    weights = dict(model.named_parameters())
    patches = parts.gather(weights)
    assert sum(group.numel() for group in patches) == sum(p.numel() for p in model.parameters()) == parts.size
    assert [tuple(group.shape) for group in patches] == list(parts.groups)
    sizes = [size for _, size in parts.groups]
    assert sizes == sorted(set(sizes)), "one group a size, by rising size"
    assert max_size is None or max(sizes) <= max_size


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("network", NETWORKS)
def test_scatter_is_the_exact_inverse_of_gather(network, dtype, lead):
    model = NETWORKS[network]()
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn((*lead, *p.shape), generator=generator).to(dtype) for name, p in model.named_parameters()
    }
    for by, max_size in CUTS:
        parts = koopt.partition(model, by, max_size)
        patches = parts.gather(weights)
        assert all(group.shape[:-2] == lead and group.dtype == dtype for group in patches)
        back = parts.scatter(patches)
        assert list(back) == list(weights)
        assert all(torch.equal(back[name], weights[name]) for name in weights)
        again = parts.gather(back)
        assert all(torch.equal(a, b) for a, b in zip(again, patches, strict=True))


def test_patches_keep_their_leading_axes():
    model = perceptron(1, 10, 10, 2)
    parts = koopt.partition(model)
    window = {name: torch.randn(4, *p.shape) for name, p in model.named_parameters()}
    for t in range(4):
        now = parts.gather({name: w[t] for name, w in window.items()})
        assert all(torch.equal(a, b[t]) for a, b in zip(now, parts.gather(window), strict=True))


def test_numbers_on_the_device_give_the_same():
    model = perceptron(1, 10, 10, 2)
    weights = dict(model.named_parameters())
    parts = koopt.partition(model)
    moved = parts.to("cpu")
    assert all(torch.equal(a, b) for a, b in zip(parts.gather(weights), moved.gather(weights), strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda():
    model = Language().cuda()
    weights = dict(model.named_parameters())
    for by, max_size in CUTS:
        for parts in (koopt.partition(model, by, max_size), koopt.partition(model, by, max_size).to("cuda")):
            patches = parts.gather(weights)
            assert all(group.is_cuda for group in patches)
            assert all(torch.equal(w, weights[name]) for name, w in parts.scatter(patches).items())


def test_consecutive_groups_hold_no_numbers():
    model = perceptron(3, 4, 5)
    for by in ("weight", "network"):
        assert koopt.partition(model, by).places == (slice(0, 41),)
    assert koopt.partition(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "layer").places == (slice(0, 12),)
    assert koopt.partition(nn.Embedding(4, 3)).places == (slice(0, 12),)
    assert isinstance(koopt.partition(nn.Linear(2, 2)).places[0], torch.Tensor)


def test_mixed_dtypes_are_gathered_in_one_that_holds_them():
    parts = koopt.partition(nn.Linear(2, 1))
    (patches,) = parts.gather({"weight": torch.ones(1, 2, dtype=torch.bfloat16), "bias": torch.ones(1).double()})
    assert patches.dtype == torch.float64


def test_layers_are_modules_and_tied_weights_stand_once():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 3, bias=False))
    w = numbered(model)
    expected = [patch(w["0.weight"], w["0.bias"]), patch(w["1.weight"], w["1.bias"]), patch(w["2.weight"])]
    assert patches_of(model, "layer") == Counter(expected)

    language = Language()
    parts = koopt.partition(language)
    assert "embedding.weight" in parts.names
    assert "decoder.weight" not in parts.names
    w = numbered(language)
    found = patches_of(language)
    assert all(found[patch(row)] == 1 for row in w["embedding.weight"])
    assert all(found[patch(bias)] == 1 for bias in w["decoder.bias"])
    assert patches_of(language, "layer")[patch(w["decoder.bias"])] == 1


def test_a_parametrized_module_is_one_layer():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)), nn.Linear(3, 2))
    w = numbered(model)
    expected = [
        patch(*[tensor for name, tensor in w.items() if name.startswith("0.")]),
        patch(w["1.weight"], w["1.bias"]),
    ]
    assert patches_of(model, "layer") == Counter(expected)
    root = parametrizations.weight_norm(nn.Linear(4, 3))
    assert len(patches_of(root, "layer")) == 1


def test_a_shared_module_stands_once():
    shared = nn.Linear(2, 2)
    assert len(patches_of(nn.Sequential(shared, nn.ReLU(), shared))) == 2


def test_parametrizations_with_weights_of_their_own():
    class LowRank(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(2, 4))

        def forward(self, weight):
            return weight + self.left @ self.right

    model = nn.Linear(4, 3)
    parametrize.register_parametrization(model, "weight", LowRank())
    w = numbered(model)
    prefix = "parametrizations.weight."
    expected = units(w[prefix + "original"], w["bias"]) + units(w[prefix + "0.left"]) + units(w[prefix + "0.right"])
    assert patches_of(model) == Counter(expected)


def test_a_model_that_names_its_parameters_differently():
    class Renamed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 3)
            self.hidden = [nn.Parameter(torch.ones(2, 2))]  # in no module's own parameters

        def named_parameters(self, *args, **kwargs):
            yield from self.inner.named_parameters()
            yield "hidden", self.hidden[0]

    model = Renamed()
    w = numbered(model)
    assert patches_of(model) == Counter(units(w["weight"], w["bias"]) + units(w["hidden"]))


def test_frozen_parameters_are_left_out():
    model = frozen(perceptron(2, 3, 2), "0.weight")
    parts = koopt.partition(model)
    assert parts.names == ("0.bias", "2.weight", "2.bias")
    assert parts.size == 3 + 8
    assert "0.weight" not in parts.scatter(parts.gather(dict(model.named_parameters())))


def test_labels():
    model = nn.Linear(3, 2)
    w = numbered(model)
    shared = {"weight": torch.tensor([[7, 7, -1], [-1, 7, 7]]), "bias": torch.tensor([-1, 5])}
    expected = [
        patch(w["weight"][0, :2], w["weight"][1, 1:]),
        patch(w["weight"][0, 2], w["weight"][1, 0], w["bias"][0]),
        patch(w["bias"][1]),
    ]
    assert patches_of(model, lambda name, p: shared[name]) == Counter(expected)
    assert patches_of(model, lambda name, p: shared[name].to(torch.int16)) == Counter(expected)
    whole = {"weight": shared["weight"], "bias": -1}  # one label for all of the bias, shared with some of the weight
    expected = [expected[0], patch(w["weight"][0, 2], w["weight"][1, 0], w["bias"])]
    assert patches_of(model, lambda name, p: whole[name]) == Counter(expected)
    assert patches_of(model, lambda name, p: torch.tensor(whole["bias"])) == Counter([patch(*w.values())])
    assert patches_of(model, lambda name, p: name) == Counter([patch(w["weight"]), patch(w["bias"])])
    assert patches_of(model, lambda name, p: (p.dim(), "x")) == Counter([patch(w["weight"]), patch(w["bias"])])
    masks = patches_of(model, lambda name, p: torch.ones(p.shape, dtype=torch.bool))
    assert masks == Counter([patch(*w.values())])


def test_labels_that_name_a_built_in_partition_agree_with_it():
    model = perceptron(3, 4, 2)
    rows = {"0": 0, "2": 100}

    def node(name, parameter):
        layer = name.split(".")[0]
        label = rows[layer] + torch.arange(parameter.shape[0])
        return label.reshape(-1, *[1] * (parameter.dim() - 1)).expand(parameter.shape)

    assert patches_of(model, node) == patches_of(model, "node")
    assert patches_of(model, lambda name, p: name.split(".")[0]) == patches_of(model, "layer")


@pytest.mark.parametrize("by", ["node", "layer", "network", odd_and_even])
@pytest.mark.parametrize("max_size", [1, 2, 7, 157, 10**6])
def test_quasi_nodes_are_even_pieces(by, max_size):
    model = perceptron(30, 8, 5)
    cut = patches_of(model, by, max_size)
    left = Counter(cut)
    for whole in patches_of(model, by):
        pieces = [piece for piece in cut if piece <= whole]
        left -= Counter(pieces)
        sizes = [len(piece) for piece in pieces]
        assert sum(sizes) == len(whole)
        assert len(sizes) == -(-len(whole) // max_size), "as few pieces as can be"
        assert max(sizes) <= max_size
        assert max(sizes) - min(sizes) <= 1
    assert not left


def test_the_papers_quasi_nodes():
    groups = koopt.partition(perceptron(784, 20, 20, 20, 10, activation=nn.ReLU), max_size=157).groups
    assert groups == ((50, 21), (100, 157))  # 785 = 5 * 157


def test_locate():
    model = perceptron(2, 3, 1)
    nodes = koopt.partition(model)
    w = numbered(model)
    for group, patches in enumerate(nodes.gather(w)):
        for i, numbers in enumerate(patches):
            owners = [name for name in nodes.names if patch(w[name]) & patch(numbers)]
            assert nodes.locate(group, i) == ", ".join(owners)
    assert koopt.partition(perceptron(1, 1, 1, 1), "network").locate(0, 0).endswith(", ...")


REFUSED = {
    "unknown by": (lambda: nn.Linear(2, 2), {"by": "neuron"}, "by is 'neuron', expected \"weight\""),
    "zero": (lambda: nn.Linear(2, 2), {"max_size": 0}, "max_size is 0, expected a whole number >= 1"),
    "negative": (lambda: nn.Linear(2, 2), {"max_size": -3}, "max_size is -3"),
    "bool": (lambda: nn.Linear(2, 2), {"max_size": True}, "max_size is True"),
    "frozen": (lambda: frozen(nn.Linear(2, 2), "weight", "bias"), {}, "no trainable parameter"),
    "without parameters": (lambda: nn.ReLU(), {}, "no trainable parameter"),
    "empty": (lambda: nn.ParameterList([nn.Parameter(torch.ones(0, 3))]), {}, r"'0' is empty, of shape \(0, 3\)"),
    "label of another shape": (
        lambda: nn.Linear(2, 3),
        {"by": lambda name, p: torch.arange(3)},
        r"labels of 'weight' are torch.int64 of shape \(3,\), expected integers of shape \(3, 2\)",
    ),
    "label that broadcasts": (
        lambda: nn.Linear(2, 3),
        {"by": lambda name, p: torch.arange(p.shape[0]).reshape(-1, *[1] * (p.dim() - 1))},
        "labels of 'weight'",
    ),
    "real labels": (
        lambda: nn.Linear(2, 3),
        {"by": lambda name, p: torch.ones(p.shape)},
        "labels of 'weight' are torch.float32",
    ),
    "label that cannot be compared": (
        lambda: nn.Linear(2, 3),
        {"by": lambda name, p: [1, 2]},
        "label of 'weight' is list",
    ),
    "no label": (lambda: nn.Linear(2, 3), {"by": lambda name, p: None}, "label of 'weight' is NoneType"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    make, arguments, message = REFUSED[case]
    model = make()
    with pytest.raises(ValueError, match=message):
        koopt.partition(model, **arguments)


@pytest.mark.parametrize("arguments", [{"by": 3}, {"by": None}, {"max_size": 2.0}, {"max_size": "2"}], ids=str)
def test_wrong_types_are_refused(arguments):
    with pytest.raises((TypeError, ValueError)):
        koopt.partition(nn.Linear(2, 2), **arguments)


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_lazy_parameters_are_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2))
    with pytest.raises(ValueError, match=r"'1.weight' is not initialized \(a lazy module\); run one batch"):
        koopt.partition(model)
    model(torch.ones(1, 2))
    assert koopt.partition(model).size == 12


def test_wrong_weights_and_patches_are_refused():
    parts = koopt.partition(perceptron(2, 3, 1))
    weights = {name: torch.zeros(shape) for name, shape in zip(parts.names, parts.shapes, strict=True)}
    good = parts.gather(weights)
    with pytest.raises(KeyError, match=r"'0\.bias' is missing"):
        parts.gather({name: w for name, w in weights.items() if name != "0.bias"})
    for bad in (torch.zeros(2, 3), torch.zeros(6), torch.tensor(0.0), torch.zeros(5, 3, 3)):
        with pytest.raises(ValueError, match=r"weights\['0.weight'\] has shape"):
            parts.gather(weights | {"0.weight": bad})
    with pytest.raises(ValueError, match=r"weights\['0.bias'\] has shape \(4, 3\), expected \(3,\)"):
        parts.gather(weights | {"0.bias": torch.zeros(4, 3)})
    with pytest.raises(ValueError, match=r"weights\['2.bias'\] has shape \(1,\), expected \(4, 1\)"):
        parts.gather({name: w.expand(4, *w.shape) for name, w in weights.items()} | {"2.bias": torch.zeros(1)})
    with pytest.raises(ValueError, match="got 1 tensors, this partition has 2 patch sizes"):
        parts.scatter(good[:1])
    with pytest.raises(ValueError, match=r"got shape \(1, 4\), expected \(3, 3\)"):
        parts.scatter(good[::-1])
    with pytest.raises(ValueError, match=r"got shape \(5, 1, 4\), expected \(1, 4\)"):
        parts.scatter([good[0], good[1].expand(5, 1, 4)])
    for call in (parts.gather_flat, parts.unflatten):
        with pytest.raises(ValueError, match=r"flat has shape \(12,\), expected \(\*lead, 13\)"):
            call(torch.zeros(12))


def test_the_default_device_does_not_matter():
    model = perceptron(2, 3, 1)
    with torch.device("meta"):
        indices = [index for by in BY for index in koopt.partition(model, by).indices]
    assert {index.device.type for index in indices} == {"cpu"}


BLOCKS = st.sampled_from(
    [
        lambda n: nn.Linear(n, n + 1),
        lambda n: nn.Linear(n, 2, bias=False),
        lambda n: nn.Conv2d(2 * n, 4, 2, groups=2),
        lambda n: nn.ConvTranspose1d(2 * n, 4, 3, groups=2),
        lambda n: nn.BatchNorm1d(n),
        lambda n: nn.LayerNorm((n, 2)),
        lambda n: nn.Embedding(n, 3),
        lambda n: nn.MultiheadAttention(2 * n, 2, kdim=3),
        lambda n: nn.LSTM(n, 2, bidirectional=True),
        lambda n: nn.ParameterList([nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.ones(n))]),
        lambda n: parametrizations.weight_norm(nn.Linear(n, 3)),
    ]
)


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    blocks=st.lists(st.tuples(BLOCKS, st.integers(1, 5), st.booleans()), min_size=1, max_size=5),
    by=st.sampled_from([*BY, odd_and_even]),
    max_size=st.none() | st.integers(1, 9),
    lead=st.sampled_from([(), (2,)]),
)
def test_any_architecture_round_trips(blocks, by, max_size, lead):
    model = nn.Sequential(*[make(n) for make, n, _ in blocks])
    for module, (_, _, is_frozen) in zip(model, blocks, strict=True):
        module.requires_grad_(not is_frozen)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    hypothesis.assume(trainable)
    parts = koopt.partition(model, by, max_size)
    patches_of(model, by, max_size)
    weights = {name: torch.randn((*lead, *p.shape)) for name, p in trainable.items()}
    patches = parts.gather(weights)
    assert sum(group.numel() for group in patches) == sum(w.numel() for w in weights.values())
    back = parts.scatter(patches)
    assert list(back) == list(trainable)
    assert all(torch.equal(back[name], w) for name, w in weights.items())
