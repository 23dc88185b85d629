"""Published checkpoints: their placements on a base model, and models that bring their operators along."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import meansparse_fx as msfx
from meansparse_fx.errors import SiteError, StateError, StatisticsError
from meansparse_fx.nn import MeanSparse
from meansparse_fx.published import site_name
from tests.models import Functional

IMAGES = torch.rand(3, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Published(nn.Module):
    """The operator in the published form: buffers, a strict band, and a Python branch on alpha."""

    def __init__(self, channels: int, dim: int = 1):
        super().__init__()
        self.dim = dim
        g = torch.Generator().manual_seed(channels)
        self.register_buffer("running_mean", 0.2 * torch.randn(channels, generator=g))
        self.register_buffer("running_var", torch.rand(channels, generator=g) + 0.5)
        self.register_buffer("threshold", torch.tensor(0.4))
        self.register_buffer("flag_update_statistics", torch.tensor(0))
        self.register_buffer("batch_num", torch.tensor(0.0))

    def forward(self, x):
        if self.threshold == 0:
            return x
        shape = [-1 if d == self.dim % x.dim() else 1 for d in range(x.dim())]
        mean = self.running_mean.view(shape)
        band = self.threshold * self.running_var.sqrt().view(shape)
        return torch.where((x - mean).abs() < band, mean * torch.ones_like(x), x)


class WideBlock(nn.Module):
    """A pre-activation block as WideResNets have it, with a squeeze-and-excitation gate; `Op` makes its operators."""

    def __init__(self, inputs: int, outputs: int, op):
        super().__init__()
        self.batchnorm_0 = nn.BatchNorm2d(inputs)
        self.meansparse_0 = op(inputs)
        self.relu_0 = nn.SiLU(inplace=True)
        self.conv_0 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.batchnorm_1 = nn.BatchNorm2d(outputs)
        self.meansparse_1 = op(outputs)
        self.relu_1 = nn.SiLU(inplace=True)
        self.conv_1 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.squeeze, self.excite, self.relu_se = nn.Conv2d(outputs, 2, 1), nn.Conv2d(2, outputs, 1), nn.ReLU()
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None
        self.meansparse_2 = op(outputs)

    def forward(self, x):
        out = self.relu_0(self.meansparse_0(self.batchnorm_0(x)))
        if self.shortcut is not None:
            x = out
        out = self.conv_1(self.relu_1(self.meansparse_1(self.batchnorm_1(self.conv_0(out)))))
        out = out * torch.sigmoid(self.excite(self.relu_se(self.squeeze(out.mean((2, 3), keepdim=True)))))
        out = torch.add(x if self.shortcut is None else self.shortcut(x), out)
        return self.meansparse_2(out)


class Wide(nn.Module):
    def __init__(self, op):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.blocks = nn.Sequential(WideBlock(6, 8, op), WideBlock(8, 8, op))
        self.batchnorm = nn.BatchNorm2d(8)
        self.meansparse_end = op(8)
        self.relu = nn.SiLU(inplace=True)
        self.logits = nn.Linear(8, 5)

    def forward(self, x):
        return self.logits(self.relu(self.meansparse_end(self.batchnorm(self.blocks(self.conv(x))))).mean((2, 3)))


class TokenMlp(nn.Module):
    def __init__(self, op):
        super().__init__()
        self.fc1, self.act, self.fc2, self.drop = nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6), nn.Dropout(0.1)
        self.meansparse1, self.meansparse2 = op(12, -1), op(6, -1)

    def forward(self, x):
        return self.drop(self.meansparse2(self.fc2(self.act(self.meansparse1(self.fc1(x))))))


class TokenBlock(nn.Module):
    """A transformer block with a mixing branch that has no activation, and an MLP branch that has one."""

    def __init__(self, op):
        super().__init__()
        self.norm1, self.norm2, self.mix = nn.LayerNorm(6), nn.LayerNorm(6), nn.Linear(64, 64)
        self.mlp = TokenMlp(op)
        self.meansparse1, self.meansparse2 = op(6, -1), op(6, -1)

    def forward(self, x):
        n, h, w, c = x.shape
        x = x + self.mix(self.norm1(x).reshape(n, h * w, c).transpose(1, 2)).transpose(1, 2).reshape(n, h, w, c)
        x = self.meansparse1(x.reshape(n, -1, c))
        x = self.meansparse2(x + self.mlp(self.norm2(x)))
        return x.reshape(n, h, w, c)


class Tokens(nn.Module):
    def __init__(self, op):
        super().__init__()
        self.embed = nn.Conv2d(3, 6, 1)
        self.blocks = nn.Sequential(TokenBlock(op), TokenBlock(op))
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.blocks(self.embed(x).permute(0, 2, 3, 1)).mean((1, 2)))


class ConvBlock(nn.Module):
    """A ConvNeXt block; published checkpoints replaced ``act`` and ``drop_path`` by sequences."""

    def __init__(self, op):
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.fc1, self.act, self.fc2 = nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6)
        self.drop_path = nn.Identity()
        if op is Published:
            self.act = nn.Sequential(op(12, -1), self.act)
            self.drop_path = nn.Sequential(self.drop_path, op(6))

    def forward(self, x):
        y = self.fc2(self.act(self.fc1(self.conv(x).permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)
        return self.drop_path(y) + x


class Conv(nn.Module):
    def __init__(self, op):
        super().__init__()
        self.stem, self.blocks, self.head = (
            nn.Conv2d(3, 6, 1),
            nn.Sequential(ConvBlock(op), ConvBlock(op)),
            nn.Linear(6, 5),
        )

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def nothing(channels: int, dim: int = 1) -> nn.Module:
    return nn.Identity()


# Architecture, its placement, and how many sites of each kind that makes.
FAMILIES = {
    "wrn": (Wide, "robustbench:wrn", {"activation": 5, "residual_sum": 2}),
    "swin": (Tokens, "robustbench:swin", {"activation": 2, "residual_sum": 4, "residual_branch": 2}),
    "convnext": (Conv, "robustbench:convnext", {"activation": 2, "residual_branch": 2}),
}


def build(architecture, op):
    torch.manual_seed(0)
    model = architecture(op)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2)
    return model.double().eval()


def kinds(plan):
    counts = {}
    for site in plan.active:
        counts[site.kind] = counts.get(site.kind, 0) + 1
    return counts


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


def test_placement_on_the_base_equals_the_published_model(family):
    architecture, placement, expected = family
    base, published = build(architecture, nothing), build(architecture, Published)
    sparse = msfx.transform(base, IMAGES, placement=placement)
    assert kinds(sparse.meta["plan"]) == expected
    assert torch.equal(sparse(IMAGES), base(IMAGES))
    msfx.load_published(sparse, published.state_dict())
    assert torch.equal(sparse(IMAGES), published(IMAGES))
    assert not torch.equal(sparse(IMAGES), base(IMAGES))


def test_a_model_with_published_operators_keeps_its_function(family):
    architecture, _, expected = family
    published = build(architecture, Published)
    before = copy.deepcopy(published.state_dict())
    sparse = msfx.transform(published, IMAGES)
    assert kinds(sparse.meta["plan"]) == expected
    assert torch.equal(sparse(IMAGES), published(IMAGES))
    assert not any(isinstance(m, Published) for m in sparse.modules())
    assert sum(isinstance(m, MeanSparse) for m in sparse.modules()) == sum(expected.values())
    assert all(torch.equal(v, before[k]) for k, v in published.state_dict().items())


def test_both_ways_give_the_same_model(family):
    """Names, state_dict keys and base are those of the plain architecture, so that one statistics file serves both."""
    architecture, placement, _ = family
    base, published = build(architecture, nothing), build(architecture, Published)
    placed, taken = msfx.transform(base, IMAGES, placement=placement), msfx.transform(published, IMAGES)
    assert list(msfx.operators(placed)) == list(msfx.operators(taken))
    assert placed.state_dict().keys() == taken.state_dict().keys()
    assert torch.equal(msfx.restore(taken)(IMAGES), base(IMAGES))
    statistics = msfx.calibrate(placed, [IMAGES], progress=False)
    msfx.set_statistics(taken, statistics)
    for model in (placed, taken):
        msfx.set_alpha(model, 0.5)
    assert torch.equal(placed(IMAGES), taken(IMAGES))


def test_a_model_with_published_operators_is_saved_and_loaded(family, tmp_path):
    architecture, _, _ = family
    published = build(architecture, Published)
    sparse = msfx.transform(published, IMAGES)
    msfx.save(sparse, tmp_path / "saved")
    loaded = msfx.load(tmp_path / "saved", published, IMAGES)
    assert torch.equal(loaded(IMAGES), sparse(IMAGES))
    assert str(msfx.inspect(loaded)) == str(msfx.inspect(sparse))


def test_gradients_are_the_published_ones(family):
    architecture, _, _ = family
    published = build(architecture, Published)
    sparse = msfx.transform(published, IMAGES)
    grads = []
    for model in (published, sparse):
        x = IMAGES.clone().requires_grad_()
        model(x).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-14)  # float64; one kernel adds in another order


def test_the_band_is_open_as_published():
    """A value at exactly alpha * std from the mean stays, one float below it goes: powers of two make that exact."""
    model = nn.Sequential(Published(1), nn.ReLU()).eval()
    model[0].running_mean.fill_(1.0)
    model[0].running_var.fill_(4.0)
    model[0].threshold.fill_(0.25)
    edge = torch.tensor([1.5, torch.nextafter(torch.tensor(1.5), torch.tensor(0.0)).item(), 0.5, 0.75]).view(1, 1, 2, 2)
    sparse = msfx.transform(model, edge, placement=msfx.Placement(channel_dims={"1": 1}))
    assert sparse(edge).flatten().tolist() == [1.5, 1.0, 0.5, 1.0] == model(edge).flatten().tolist()
    assert msfx.get_alpha(sparse) == 0.25


def test_alpha_can_be_asked_for(family):
    architecture, _, _ = family
    published = build(architecture, Published)
    base = build(architecture, nothing)
    assert torch.equal(msfx.transform(published, IMAGES, alpha=0.0)(IMAGES), base(IMAGES))


def test_one_graph_under_torch_compile():
    sparse = msfx.transform(build(Wide, Published), IMAGES)
    compiled = torch.compile(sparse, backend="eager", fullgraph=True)
    assert torch.equal(compiled(IMAGES), sparse(IMAGES))


def test_an_operator_at_no_known_place_is_taken_where_it_stands():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Published(4), nn.MaxPool2d(2), nn.ReLU()).double().eval()
    sparse = msfx.transform(model, IMAGES)
    assert [(s.name, s.kind, s.skipped) for s in sparse.meta["plan"]] == [
        ("1", "published", None),
        ("3", "activation", "published: the checkpoint has no operator here"),
    ]
    assert torch.equal(sparse(IMAGES), model(IMAGES))


@pytest.mark.parametrize(
    ("read", "names"),
    [
        (lambda m, y: m.left(m.a(y)) + m.left(m.b(y)), ["residual_sum", "b"]),
        (lambda m, y: torch.cat((m.a(z := y.flatten(2)), z)), ["a"]),  # of `residual_sum` on the base, z would be too
    ],
    ids=["two read it", "one reads a view that others read"],
)
def test_each_operator_that_reads_a_residual_sum_is_taken(read, names):
    """Its alpha reaches all of them, and nothing else."""

    def forward(m, x):
        h = m.conv(x)
        return read(m, h + m.left(m.act(h)))

    torch.manual_seed(0)
    layers = {"conv": nn.Conv2d(3, 4, 1), "left": nn.Conv2d(4, 4, 1), "act": nn.ReLU()}
    model = Functional(forward, **layers, a=Published(4), b=Published(4)).double().eval()
    base = Functional(forward, **layers, a=nn.Identity(), b=nn.Identity()).double().eval()
    sparse = msfx.transform(model, IMAGES)
    assert list(msfx.operators(sparse)) == names
    assert torch.equal(sparse(IMAGES), model(IMAGES))
    msfx.set_alpha(sparse, 0.0)
    assert torch.equal(sparse(IMAGES), base(IMAGES))


def test_not_calibrated_is_not_a_measurement():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Published(4), nn.ReLU()).double().eval()
    for key in ("running_mean", "running_var", "threshold"):
        getattr(model[1], key).zero_()
    sparse = msfx.transform(model, IMAGES)
    with pytest.raises(StateError, match="calibrate first"):
        msfx.set_alpha(sparse, 0.2)


def test_errors():
    published = build(Wide, Published)
    with pytest.raises(SiteError, match="are its placement"):
        msfx.transform(published, IMAGES, placement="robustbench:wrn")
    with pytest.raises(SiteError, match="no placement is called 'wrn'; there are activations, robustbench:wrn"):
        msfx.inspect(build(Wide, nothing), IMAGES, "wrn")
    sparse = msfx.transform(build(Wide, nothing), IMAGES)
    with pytest.raises(StatisticsError, match=r"residual_sum is in one of them only: transform the base"):
        msfx.load_published(sparse, published.state_dict())
    with pytest.raises(StatisticsError, match="no published MeanSparse operators"):
        msfx.load_published(sparse, build(Wide, nothing).state_dict())
    with pytest.raises(StatisticsError, match="no published architecture has an operator"):
        site_name("layer.3.sparse")
    flagged = build(Wide, Published)
    flagged.meansparse_end.flag_update_statistics.fill_(1)
    with pytest.raises(StateError, match="is being calibrated"):
        msfx.transform(flagged, IMAGES)


def test_a_wrong_checkpoint_changes_nothing():
    sparse = msfx.transform(build(Wide, nothing), IMAGES, placement="robustbench:wrn")
    before = copy.deepcopy(sparse.state_dict())
    other = build(Wide, Published).state_dict()
    other["logits.weight"] = torch.zeros(7, 8)
    with pytest.raises(StatisticsError, match=r"not this model's: 1 differ, logits\.weight first"):
        msfx.load_published(sparse, other)
    after = sparse.state_dict()
    assert all(torch.equal(after[k].nan_to_num(), v.nan_to_num()) for k, v in before.items())


# Residual connections, by data flow.


def residual_sites(function, **children):
    placement = msfx.Placement(kinds=("residual_sum", "residual_branch"))
    children = {"conv": nn.Conv2d(3, 3, 3, padding=1), "act": nn.ReLU()} | children
    plan = msfx.inspect(Functional(function, **children).double().eval(), IMAGES, placement)
    return {s.name: s.inside for s in plan if s.kind != "activation" and s.skipped is None}


def test_a_skip_may_be_projected_and_reordered():
    found = residual_sites(lambda m, x: m.down(x) + m.conv(m.act(m.conv(x))), down=nn.Conv2d(3, 3, 1))
    assert found == {"residual_branch": ("act",), "residual_sum": ("act",)}
    found = residual_sites(lambda m, x: m.conv(x) + m.act(x))  # an activation is no skip, however short
    assert found == {"residual_branch": ("act",), "residual_sum": ("act",)}
    found = residual_sites(lambda m, x: m.conv(x) + m.act(x).roll(1, 2) * 2)
    assert found == {"residual_branch": ("act",), "residual_sum": ("act",)}


def test_sums_that_close_no_residual_connection():
    parallel = residual_sites(lambda m, x: m.a(m.act(x)) + m.b(m.act(x)), a=nn.Conv2d(3, 3, 1), b=nn.Conv2d(3, 3, 1))
    assert parallel == {}
    assert residual_sites(lambda m, x: x * m.act(m.conv(x))) == {}
    bias = residual_sites(lambda m, x: m.act(x) + torch.ones_like(m.conv.weight[0, :, :1, :1]))
    assert bias == {}
    gate = residual_sites(lambda m, x: x + m.act(m.conv(x.mean((2, 3), keepdim=True))))
    assert gate == {}


def test_a_sum_that_one_activation_reads_is_covered_by_it():
    def post_activation(m, x):
        x = m.act(x + m.conv(F.gelu(m.conv(x))))
        return m.act(x + m.conv(x))

    model = Functional(post_activation, conv=nn.Conv2d(3, 3, 3, padding=1), act=nn.ReLU()).double().eval()
    both = msfx.Placement(kinds=("activation", "residual_sum"))
    plan = msfx.inspect(model, IMAGES, both)
    assert {s.name: s.skipped for s in plan if s.kind == "residual_sum"} == {
        "residual_sum": "covered: read by act alone",
        "residual_sum_1": "covered: read by act_1 alone",
    }
    sums = msfx.inspect(model, IMAGES, msfx.Placement(kinds=("residual_sum",)))
    assert [s.name for s in sums.active] == ["residual_sum", "residual_sum_1"]


def test_sites_that_read_each_other():
    """An activation of an activation; a branch that ends in one; a sum of a sum; all rewritten, and undone."""

    def forward(m, x):
        x = m.conv(m.act(F.gelu(m.act(m.conv(x)))))
        y = x + m.act(m.conv(x))
        z = y + F.gelu(y)
        return m.act(z) + z

    model = Functional(forward, conv=nn.Conv2d(3, 3, 3, padding=1), act=nn.ReLU()).double().eval()
    every = msfx.Placement(kinds=("activation", "residual_sum", "residual_branch"))
    sparse = msfx.transform(model, IMAGES, placement=every)
    assert torch.equal(sparse(IMAGES), model(IMAGES))
    assert len(msfx.operators(sparse)) == 12
    statistics = msfx.calibrate(sparse, [IMAGES], progress=False)
    compiled = torch.compile(
        model, backend="meansparse", options={"placement": every, "observe": True, "inner": "eager"}
    )
    assert torch.equal(compiled(IMAGES), model(IMAGES))
    observed = msfx.compile_report(compiled).statistics()
    assert observed.keys() == statistics.keys()
    for name, expected in statistics.items():
        torch.testing.assert_close(observed[name].mean, expected.mean, rtol=1e-9, atol=1e-12)
    msfx.set_alpha(sparse, 0.7)
    assert not torch.equal(sparse(IMAGES), model(IMAGES))
    assert torch.equal(msfx.restore(sparse)(IMAGES), model(IMAGES))


def test_restore_and_calibrate_with_every_kind():
    model = build(Tokens, nothing)
    every = msfx.Placement(kinds=("activation", "residual_sum", "residual_branch"))
    sparse = msfx.transform(model, IMAGES, placement=every)
    seen = {}
    x = model.embed(IMAGES).permute(0, 2, 3, 1)
    for number, block in enumerate(model.blocks):  # by hand: what each site reads
        mixed = block.mix(block.norm1(x).reshape(3, 64, 6).transpose(1, 2)).transpose(1, 2).reshape(3, 8, 8, 6)
        seen[f"blocks.{number}.residual_branch"], x = mixed, x + mixed
        seen[f"blocks.{number}.residual_sum"], x = x, x.reshape(3, -1, 6)
        hidden = block.mlp.fc1(block.norm2(x))
        seen[f"blocks.{number}.mlp.act"] = hidden
        out = block.mlp.fc2(F.gelu(hidden))
        seen[f"blocks.{number}.residual_branch_1"] = out
        seen[f"blocks.{number}.residual_sum_1"] = x + out
        x = (x + out).reshape(3, 8, 8, 6)
    statistics = msfx.calibrate(sparse, [IMAGES], progress=False)
    assert statistics.keys() == seen.keys()
    for name, values in seen.items():
        torch.testing.assert_close(statistics[name].mean, values.flatten(0, -2).mean(0), rtol=1e-9, atol=1e-12)
    assert torch.equal(msfx.restore(sparse)(IMAGES), model(IMAGES))


def test_the_plug_in_refuses_published_operators():
    compiled = torch.compile(build(Wide, Published), backend="meansparse", options={"inner": "eager"})
    with pytest.raises(BackendCompilerFailed, match=r"StateError: the model holds \d+ published operators \("):
        compiled(IMAGES)
    torch.compiler.reset()
