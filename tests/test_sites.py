"""Sites: every activation is found, named, given its channels, and skipped only for a stated reason."""

import functools
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torchvision.ops import stochastic_depth

from meansparse_fx.capture import capture
from meansparse_fx.errors import SiteError
from meansparse_fx.sites import Placement, find_sites
from meansparse_fx.sites.plan import Refusal
from tests.models import Functional

IMAGES = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)


def plan_of(model, images=IMAGES, placement=None):
    captured = capture(model.eval(), images)
    return find_sites(captured.graph_module, captured.route, images, placement)


def sites_of(function, images=IMAGES, placement=None, **children):
    return plan_of(Functional(function, **children), images, placement).sites


# The zoo. Expected: candidates by (producer, channel dimension, rank, first words of the reason to skip).

ZOO = {
    "torchvision:resnet18": (64, {("batch_norm", 1, 4, ""): 9, ("add", 1, 4, ""): 8}),
    "torchvision:resnet50": (64, {("batch_norm", 1, 4, ""): 33, ("add", 1, 4, ""): 16}),
    "torchvision:mobilenet_v3_small": (
        64,
        {("batch_norm", 1, 4, ""): 23, ("conv", 1, 4, "gate"): 9, ("linear", 1, 2, ""): 1},
    ),
    "torchvision:efficientnet_b0": (64, {("batch_norm", 1, 4, ""): 33, ("conv", 1, 4, "gate"): 16}),
    "torchvision:vit_b_16": (224, {("linear", 2, 3, ""): 12}),
    "timm:convnext_tiny": (64, {("linear", 3, 4, ""): 18}),
    "timm:swin_tiny_patch4_window7_224": (224, {("linear", 2, 3, ""): 12}),
    "timm:seresnet50": (64, {("batch_norm", 1, 4, ""): 33, ("conv", 1, 4, "gate"): 16, ("add", 1, 4, ""): 16}),
    "timm:regnety_002": (64, {("batch_norm", 1, 4, ""): 27, ("conv", 1, 4, "gate"): 13, ("add", 1, 4, ""): 13}),
    "timm:levit_128s": (224, {("batch_norm", 1, 4, ""): 3, ("reshape", 2, 3, ""): 22}),
    "timm:swinv2_cr_tiny_ns_224": (224, {("linear", 1, 2, "input-independent"): 12, ("linear", 2, 3, ""): 12}),
}
SLOW = {"torchvision:vit_b_16", "timm:swin_tiny_patch4_window7_224", "timm:levit_128s", "timm:swinv2_cr_tiny_ns_224"}


@functools.cache
def zoo_plan(name):
    library, model = name.split(":")
    if library == "timm":
        built = pytest.importorskip("timm").create_model(model)
    else:
        built = pytest.importorskip("torchvision").models.get_model(model)
    size, _ = ZOO[name]
    return plan_of(built, torch.linspace(-1, 1, 2 * 3 * size * size).reshape(2, 3, size, size))


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in ZOO])
def test_zoo(name):
    plan = zoo_plan(name)
    found = Counter((s.producer, s.channel_dim, len(s.shape), s.refusal.kind if s.refusal else "") for s in plan)
    assert found == ZOO[name][1]
    assert len({s.name for s in plan}) == len(plan)
    assert all(s.channels == s.shape[s.channel_dim] for s in plan)


def test_names_and_reasons_of_a_real_model():
    first = list(zoo_plan("timm:seresnet50"))[:5]
    assert [(s.name, s.producer, s.channels) for s in first] == [
        ("act1", "batch_norm", 64),
        ("layer1.0.act1", "batch_norm", 64),
        ("layer1.0.act2", "batch_norm", 64),
        ("layer1.0.se.act", "conv", 16),
        ("layer1.0.act3", "add", 256),
    ]
    assert first[3].skipped == "gate: squeeze-and-excitation, pooled then multiplied onto layer1.0.bn3"
    assert [s.name for s in zoo_plan("torchvision:resnet18")][:3] == ["relu", "layer1.0.relu", "layer1.0.relu_1"]


# Finding and naming.


def test_every_way_to_call_an_activation_is_a_site():
    def forward(self, x):
        x = F.relu(self.conv(x))
        x = self.act(x)
        x = (x + 1).relu()
        return F.gelu(self.act(x), approximate="tanh")

    sites = sites_of(forward, conv=nn.Conv2d(3, 4, 3), act=nn.SiLU())
    assert [(s.name, s.activation.name, s.producer) for s in sites] == [
        ("relu", "relu", "conv"),
        ("act", "silu", "relu"),
        ("relu_1", "relu", "add"),
        ("act_1", "silu", "relu"),
        ("gelu_tanh", "gelu_tanh", "silu"),
    ]
    assert {(s.channel_dim, s.channels, s.shape) for s in sites} == {(1, 4, (2, 4, 6, 6))}


def test_functions_are_named_after_the_module_that_calls_them():
    block = Functional(lambda self, x: F.relu(self.conv(x)), conv=nn.Conv2d(3, 3, 1))
    sites = plan_of(nn.Sequential(nn.Sequential(block, block), nn.Linear(8, 8))).sites
    assert [s.name for s in sites] == ["0.0.relu", "0.0.relu_1"]


def test_a_repeat_takes_no_name_that_a_module_has():
    def forward(self, x):
        return self.relu_0(self.relu_1(self.relu(self.relu(self.relu(self.conv(x))))))

    sites = sites_of(forward, conv=nn.Conv2d(3, 3, 1), **{n: nn.ReLU() for n in ("relu", "relu_0", "relu_1")})
    assert [s.name for s in sites] == ["relu", "relu_2", "relu_3", "relu_1", "relu_0"]


def test_a_constant_that_the_graph_computes_leaves_the_call_in_place():
    class Slope(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.register_buffer("slope", torch.tensor(0.5))

        def forward(self, x):
            return F.leaky_relu(self.conv(x), self.slope.sum().item(), self.inplace)

    for inplace in (False, True):
        model = Slope()
        model.inplace = inplace
        (call,) = (site.activation for site in plan_of(model))
        assert (call.name, call.fused, call.inplace) == ("leaky_relu", False, inplace)


def test_no_activation_is_an_error():
    with pytest.raises(SiteError, match="no activation found in Sequential"):
        plan_of(nn.Sequential(nn.Conv2d(3, 4, 3)))


def test_missing_images_are_an_error():
    graph_module = capture(nn.Sequential(nn.ReLU()).eval()).graph_module
    with pytest.raises(SiteError, match="needs example images"):
        find_sites(graph_module, "symbolic trace", None)


class Flattened(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, start):
        ctx.shape = x.shape
        return x.flatten(start)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.view(ctx.shape), None


# The channel axis. Each function takes a convolution's result c [2, 4, 6, 6] or a linear layer's t [2, 3, 8, 5] and
# returns what the activation reads; expected is the channel dimension there.

AXES = {
    "conv": (lambda c, t: c, 1),
    "linear": (lambda c, t: t, 3),
    "permute": (lambda c, t: c.permute(0, 2, 3, 1), 3),
    "torch.permute": (lambda c, t: torch.permute(c, (0, 2, 1, 3)), 2),
    "transpose": (lambda c, t: c.transpose(1, -1), 3),
    "movedim": (lambda c, t: c.movedim(1, -1), 3),
    "movedim pair": (lambda c, t: torch.movedim(c, (0, 1), (1, 0)), 0),
    "flatten": (lambda c, t: c.flatten(2), 1),
    "flatten all": (lambda c, t: c.flatten(1), None),
    "flatten batch": (lambda c, t: t.flatten(0, 1), 2),
    "tokens": (lambda c, t: c.flatten(2).transpose(1, 2), 2),
    "view": (lambda c, t: c.view(-1, 4, 36), 1),
    "view with sizes": (lambda c, t: c.view(c.shape[0], c.size(1), -1), 1),
    "view splits channels": (lambda c, t: c.view(-1, 2, 2, 36), None),
    "unflatten space": (lambda c, t: c.unflatten(2, (3, 2)), 1),
    "reshape_as": (lambda c, t: t.flatten(0, 1).reshape_as(t), 3),
    "unsqueeze": (lambda c, t: c.unsqueeze(1), 2),
    "squeeze": (lambda c, t: c.mean((2, 3), keepdim=True).squeeze(-1), 1),
    "expand": (lambda c, t: c[:, :, :1].expand(-1, -1, 7, -1), 1),
    "repeat": (lambda c, t: c.repeat(3, 1, 1, 1, 1), 2),
    "repeat channels": (lambda c, t: c.repeat(1, 2, 1, 1), None),
    "add broadcast": (lambda c, t: c.permute(0, 2, 3, 1) + 1 + c.mean((2, 3))[:, None, None], 3),
    "add disagrees": (lambda c, t: c[..., :4] + c.permute(0, 2, 3, 1)[:, :4], None),
    "cat": (lambda c, t: torch.cat([c, c * 2], 1), 1),
    "stack": (lambda c, t: torch.stack((c, c), dim=1), 2),
    "chunk": (lambda c, t: c.chunk(2, 1)[1], 1),
    "split": (lambda c, t: torch.split(c, 2, dim=1)[0], 1),
    "unbind": (lambda c, t: c.unbind(2)[0], 1),
    "unbind channels": (lambda c, t: c.unbind(1)[0], None),
    "getitem": (lambda c, t: t[:, 0, ..., None], 2),
    "getitem new": (lambda c, t: c[None, ..., 1:], 2),
    "getitem channel": (lambda c, t: c[:, 0], None),
    "getitem by tensor": (lambda c, t: c[torch.tensor([0, 1])], None),
    "select": (lambda c, t: c.select(2, 0), 1),
    "roll": (lambda c, t: torch.roll(c, 1, 2), 1),
    "pad": (lambda c, t: F.pad(c, (1, 1)), 1),
    "pad channels": (lambda c, t: F.pad(t, (1, 1)), None),
    "interpolate": (lambda c, t: F.interpolate(c, scale_factor=2), 1),
    "pool": (lambda c, t: F.max_pool2d(c, 2), 1),
    "pool of nhwc": (lambda c, t: F.avg_pool2d(t, 2), None),
    "mean": (lambda c, t: c.mean((2, 3)), 1),
    "mean last": (lambda c, t: c.permute(0, 2, 3, 1).mean(dim=1), 2),
    "mean keepdim": (lambda c, t: c.mean((-1, -2), keepdim=True), 1),
    "mean of channels": (lambda c, t: c.mean(1), None),
    "max": (lambda c, t: torch.max(c, dim=2)[0], 1),
    "maximum": (lambda c, t: torch.max(c, c * 2), 1),
    "softmax": (lambda c, t: c.softmax(1), 1),
    "matmul right": (lambda c, t: torch.ones(3, 7, 8) @ t, 3),
    "matmul left": (lambda c, t: c.flatten(2) @ torch.ones(36, 5), 1),
    "attention": (lambda c, t: F.scaled_dot_product_attention(t, t, t), 3),
    "layer_norm": (lambda c, t: F.layer_norm(t.flatten(1), (t.shape[1] * 40,)), 1),
    "layer_norm over what x.shape tells": (lambda c, t: F.layer_norm(c, c.shape[1:]), 1),
    "group_norm": (lambda c, t: F.group_norm(c, 2), 1),
    "pixel_shuffle": (lambda c, t: F.pixel_shuffle(c, 2), 1),
    "T": (lambda c, t: c.mean((2, 3)).T, 0),
    "T of three": (lambda c, t: t.flatten(0, 1).mT, 1),
    "mT of space": (lambda c, t: c.mT, 1),
    "dropout": (lambda c, t: F.dropout(t, training=False), 3),
    "transpose back": (lambda c, t: c.transpose(-1, 1), 3),
    "transpose batch": (lambda c, t: c.transpose(0, 1), 0),
    "transpose space": (lambda c, t: c.transpose(2, 3), 1),
    "view of one channel": (lambda c, t: c[:, :1].view(-1, 1, 1, 36), None),
    "stack on": (lambda c, t: torch.stack((c.mean((2, 3)).T, c.mean((2, 3)).T)), 1),
    "stack behind": (lambda c, t: torch.stack((c, c), -1), 1),
    "norm": (lambda c, t: c.norm(2, (2, 3)), 1),
    "norm of channels": (lambda c, t: torch.norm(c, 2, 1), None),
    "mean of batch": (lambda c, t: c.mean(0), 0),
    "mean of all": (lambda c, t: c.mean(), None),
    "mean of channels kept": (lambda c, t: c.mean((1, 2), keepdim=True), None),
    "select behind": (lambda c, t: t.select(-2, 0), 2),
    "select channel": (lambda c, t: t.select(-1, 0), None),
    "unbind batch": (lambda c, t: c.unbind()[0], 0),
    "getitem first": (lambda c, t: t[0], 2),
    "getitem last": (lambda c, t: t[..., 0], None),
    "getitem by list": (lambda c, t: c[[0, 1]], 1),
    "getitem of channels by list": (lambda c, t: c[:, [0, 1, 2, 3]], None),
    "in no row": (lambda c, t: c.topk(2, 3)[0], 1),
    "in no row, of space": (lambda c, t: torch.rot90(c, 1, (2, 3)).unfold(2, 2, 2), 1),
    "in no row, of channels": (lambda c, t: torch.diagonal(c, dim1=1, dim2=2), 2),
    "getitem between": (lambda c, t: c[0, None, 1:, None], 1),
    "bmm": (lambda c, t: torch.baddbmm(torch.ones(1), torch.ones(3, 7, 8), t[0]), 2),
    "mm": (lambda c, t: c.flatten(2)[0].mm(torch.ones(36, 5)), 0),
    "matmul of both": (lambda c, t: c.flatten(2) @ c.flatten(2).mT, None),
    "matmul inside": (lambda c, t: t @ torch.ones(5, 7), None),
    "attention by name": (lambda c, t: F.scaled_dot_product_attention(t, t, value=t), 3),
    "attention of each channel": (lambda c, t: F.scaled_dot_product_attention(c, c, c), 1),
    "layer_norm of space": (lambda c, t: F.layer_norm(c, (6, 6)), 1),
    "max_pool1d": (lambda c, t: F.max_pool1d(c.flatten(2), 2), 1),
    "expand ahead": (lambda c, t: c.mean((2, 3)).expand(3, -1, -1), 2),
    # One of each row of the table of operators that no other line has.
    "swapaxes": (lambda c, t: torch.swapaxes(c, 1, 2), 2),
    "moveaxis": (lambda c, t: torch.moveaxis(c, 1, 3), 3),
    "view_as": (lambda c, t: c.flatten(2).view_as(c), 1),
    "expand_as": (lambda c, t: c.expand_as(torch.stack((c, c))), 2),
    "repeat_interleave": (lambda c, t: c.repeat_interleave(2, 3), 1),
    "repeat_interleave of channels": (lambda c, t: c.repeat_interleave(2, 1), None),
    "concat": (lambda c, t: torch.concat((c, c), 2), 1),
    "cumsum": (lambda c, t: c.cumsum(2), 1),
    "sort": (lambda c, t: c.sort(2)[0], 1),
    "clone": (lambda c, t: c.clone(), 1),
    "cast": (lambda c, t: c.double(), 1),
    "embedding": (lambda c, t: F.embedding(c.long().abs(), torch.ones(99, 7)), 4),
    "conv1d": (lambda c, t: F.conv1d(c.flatten(2), torch.ones(6, 4, 1)), 1),
    "conv2d": (lambda c, t: F.conv2d(t, torch.ones(6, 3, 1, 1)), 1),
    "conv_transpose3d": (lambda c, t: F.conv_transpose3d(c[:, :, None], torch.ones(4, 6, 1, 1, 1)), 1),
    "batch_norm": (lambda c, t: F.batch_norm(t, torch.zeros(3), torch.ones(3)), 1),
    "instance_norm": (lambda c, t: F.instance_norm(t), 1),
    "rms_norm": (lambda c, t: F.rms_norm(c, (6,)), 3),
    "bilinear": (lambda c, t: F.bilinear(t, t, torch.ones(7, 5, 5)), 3),
    "pixel_unshuffle": (lambda c, t: F.pixel_unshuffle(c, 2), 1),
    "channel_shuffle": (lambda c, t: F.channel_shuffle(t, 3), 1),
    "avg_pool1d": (lambda c, t: F.avg_pool1d(c.flatten(2), 2), 1),
    "avg_pool2d": (lambda c, t: F.avg_pool2d(c, 2), 1),
    "avg_pool3d": (lambda c, t: F.avg_pool3d(c[..., None], (2, 2, 1)), 1),
    "adaptive_max_pool1d": (lambda c, t: F.adaptive_max_pool1d(c.flatten(2), 4), 1),
    "adaptive_max_pool2d": (lambda c, t: F.adaptive_max_pool2d(c, 4), 1),
    "adaptive_avg_pool3d": (lambda c, t: F.adaptive_avg_pool3d(c[..., None], (2, 2, 1)), 1),
    "pool of lines": (lambda c, t: F.avg_pool1d(t.flatten(0, 1), 2), None),
    "pool of volumes": (lambda c, t: F.avg_pool3d(c.transpose(1, 2)[..., None], (2, 2, 1)), None),
    "stochastic_depth": (lambda c, t: stochastic_depth(c, 0.5, "row", training=False), 1),
    "called by name": (lambda c, t: F.max_pool2d(input=c, kernel_size=2), 1),
    "narrow": (lambda c, t: c.narrow(1, 1, 2), 1),
    "a Function that keeps the shape": (lambda c, t: Flattened.apply(c, 3), 1),
    "a Function that changes it": (lambda c, t: Flattened.apply(c, 2), None),
    "linear to a number": (lambda c, t: F.linear(t[0, 0, 0], torch.ones(5)), None),
    "elementwise by torch's word": (lambda c, t: torch.frac(c.deg2rad()), 1),
}


@pytest.mark.parametrize("name", AXES)
def test_channel_axis(name):
    function, expected = AXES[name]
    sites = sites_of(
        lambda self, x: F.relu(function(self.conv(x), self.linear(x))), conv=nn.Conv2d(3, 4, 3), linear=nn.Linear(8, 5)
    )
    (site,) = sites
    assert site.channel_dim == expected
    assert site.channels == (None if expected is None else site.shape[expected])
    if expected is None:
        cure = "give it by hand, Placement(channel_dims={'relu': dimension})"
        assert site.refusal == Refusal("no layer around it tells", site.node, cure, kind="channel axis unknown")
        assert site.skipped == f"channel axis unknown: no layer around it tells: {cure}"


WEIGHT = nn.Parameter(torch.ones(6, 4))
PRODUCTS = {
    "einsum": (lambda c, w: torch.einsum("nchw,dc->ndhw", c, w), 1),
    "einsum to the front": (lambda c, w: torch.einsum("nchw,dc->dnhw", c, w), 0),
    "einsum of tokens": (lambda c, w: torch.einsum("nlc,dc->nld", c.flatten(2).mT, w), 2),
    "einsum of space": (lambda c, w: torch.einsum("nchw,wv->nchv", c, w), 1),
    "einsum of a channel each": (lambda c, w: torch.einsum("nchw,dc->ndchw", c, w), None),
    "einsum of groups": (lambda c, w: torch.einsum("ngchw,gdc->ngdhw", c[:, None], w[None]), None),
    "tensordot": (lambda c, w: torch.tensordot(c, w, ([1], [1])), 3),
    "left product": (lambda c, w: w @ c.flatten(2), 1),
    "left product of tokens": (lambda c, w: w[:, :3] @ c.flatten(2).mT[:, :3], 2),
    "right product": (lambda c, w: c.flatten(2).mT @ w.T, 2),
    "product of nothing known": (lambda c, w: c.reshape(2, -1, 4) @ w.t(), 2),
    "product with a bias": (lambda c, w: torch.addmm(w[:, 0], c.mean((2, 3)), w.T), 1),
    "batched": (lambda c, w: torch.bmm(w.expand(c.shape[0], -1, -1), c.flatten(2)), None),
    "a constant": (lambda c, w: torch.ones(6, 4) @ c.flatten(2), None),
    "outer product": (lambda c, w: torch.einsum("nlc,d->nlcd", c.reshape(2, -1, 4), w[0]), None),
    "a weight twice": (lambda c, w: torch.einsum("nchw,dc,ec->ndehw", c, w, w), None),
    "two weights": (lambda c, w: torch.einsum("nchw,dc,ec->ndehw", c, w, w * 1), None),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_with_a_weight_make_channels(name):
    function, expected = PRODUCTS[name]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.weight = nn.Conv2d(3, 4, 3), WEIGHT

        def forward(self, x):
            return F.relu(function(self.conv(x), self.weight))

    (site,) = plan_of(Net()).sites
    assert site.channel_dim == expected


# What a plan calls the maker of what the activation reads: an operator's own name where it has no word.
MAKERS = {
    "conv": (
        lambda c, t: c,
        lambda c, t: F.dropout2d(c, training=False),
        lambda c, t: F.conv2d(t, torch.ones(6, 3, 1, 1)),
    ),
    "linear": (lambda c, t: t, lambda c, t: F.linear(t, torch.ones(4, 5))),
    "batch_norm": (lambda c, t: F.batch_norm(t, torch.zeros(3), torch.ones(3)),),
    "group_norm": (lambda c, t: F.group_norm(c, 2),),
    "layer_norm": (lambda c, t: F.layer_norm(t, (5,)),),
    "add": (lambda c, t: c + 1, lambda c, t: 1 + c, lambda c, t: c.add_(1)),
    "sub": (lambda c, t: c - 1, lambda c, t: torch.sub(c, 1)),
    "mul": (lambda c, t: c * 2, lambda c, t: c.mul(2)),
    "div": (lambda c, t: c / 2, lambda c, t: torch.true_divide(c, 2)),
    "permute": (lambda c, t: c.permute(0, 2, 3, 1), lambda c, t: c.mT.transpose(1, 2), lambda c, t: c.movedim(1, 2)),
    "reshape": (lambda c, t: c.flatten(2), lambda c, t: c[:, :, None].squeeze(2), lambda c, t: c.flatten(2).view_as(c)),
    "expand": (lambda c, t: c.expand_as(torch.stack((c, c))),),
    "cat": (lambda c, t: torch.cat((c, c)),),
    "stack": (lambda c, t: torch.stack((c, c)),),
    "slice": (lambda c, t: c[:, 1:], lambda c, t: c.chunk(2, 1)[0], lambda c, t: c.select(2, 0)),
    "shuffle": (lambda c, t: F.pixel_shuffle(c, 2), lambda c, t: F.channel_shuffle(c, 2)),
    "pool": (lambda c, t: F.max_pool2d(c, 2), lambda c, t: F.adaptive_avg_pool1d(c.flatten(2), 2)),
    "matmul": (lambda c, t: c @ c.mT, lambda c, t: torch.bmm(t[0], t[0].mT)),
    "attention": (lambda c, t: F.scaled_dot_product_attention(t, t, t),),
    "softmax": (lambda c, t: c.softmax(1),),
    "flip": (lambda c, t: torch.flip(c, (2,)),),
}


@pytest.mark.parametrize("word", MAKERS)
def test_makers_have_the_words_of_the_field(word):
    children = {"conv": nn.Conv2d(3, 4, 3), "linear": nn.Linear(8, 5)}
    for function in MAKERS[word]:
        (site,) = sites_of(lambda self, x, f=function: F.relu(f(self.conv(x), self.linear(x))), **children)
        assert site.producer == word


@pytest.mark.parametrize(
    ("layer", "rank", "axis", "producer"),
    [
        (nn.Conv1d(4, 6, 1), 3, 1, "conv"),
        (nn.Conv3d(4, 6, 1), 5, 1, "conv"),
        (nn.ConvTranspose1d(4, 6, 1), 3, 1, "conv"),
        (nn.ConvTranspose2d(4, 6, 1), 4, 1, "conv"),
        (nn.ConvTranspose3d(4, 6, 1), 5, 1, "conv"),
        (nn.Linear(4, 6), 3, 2, "linear"),
        (nn.BatchNorm1d(4), 3, 1, "batch_norm"),
        (nn.InstanceNorm1d(4, affine=True), 3, 1, "instance_norm"),
        (nn.GroupNorm(2, 4), 4, 1, "group_norm"),
        (nn.LayerNorm(4), 3, 2, "layer_norm"),
        (nn.RMSNorm(4), 3, 2, "rms_norm"),
        (nn.Conv2d(4, 6, 1), 4, 1, "conv"),
        (nn.BatchNorm3d(4), 5, 1, "batch_norm"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_layers_say_where_their_channels_are(layer, rank, axis, producer):
    images = torch.rand(2, *[4] * (rank - 1), generator=torch.Generator().manual_seed(0))
    (behind,) = sites_of(lambda self, x: F.relu(self.layer(x)), images, layer=layer)
    assert (behind.channel_dim, behind.channels, behind.producer) == (axis, behind.shape[axis], producer)
    (before,) = sites_of(lambda self, x: self.layer(F.relu(x)), images, layer=layer)
    assert (before.channel_dim, before.channels, before.producer) == (axis, 4, "input")


@pytest.mark.parametrize(
    ("module", "images", "expected"),
    [
        (nn.MultiheadAttention(8, 2, batch_first=True), IMAGES[:, 0], 2),
        (nn.LSTM(8, 5, batch_first=True), IMAGES[:, 0], 2),
        (nn.GRU(8, 5, batch_first=True), IMAGES[:, 0], 2),
    ],
)
def test_modules_with_several_results(module, images, expected):
    def forward(self, x):
        arguments = (x, x, x) if isinstance(self.module, nn.MultiheadAttention) else (x,)
        return F.relu(self.module(*arguments)[0])

    (site,) = sites_of(forward, images, module=module)
    assert site.channel_dim == expected


@pytest.mark.parametrize(
    ("module", "producer"),
    [
        *((nn.AdaptiveAvgPool2d(2), "pool"), (nn.LPPool2d(2, 2), "pool"), (nn.Upsample(scale_factor=2), "upsample")),
        *((nn.PixelUnshuffle(2), "shuffle"), (nn.ChannelShuffle(2), "shuffle"), (nn.Softmax2d(), "softmax2d")),
        *((nn.ConstantPad2d(1, 0.0), "constantpad2d"), (nn.CircularPad2d(1), "circularpad2d")),
        *((nn.ReflectionPad2d(1), "reflectionpad2d"), (nn.LocalResponseNorm(2), "localresponsenorm")),
        *((nn.Sigmoid(), "sigmoid"), (nn.LogSigmoid(), "logsigmoid"), (nn.Flatten(2), "reshape")),
        *((nn.Dropout2d(), "conv"), (nn.Identity(), "conv")),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else value,
)
def test_modules_without_weights_leave_the_channels_where_they_are(module, producer):
    site = plan_of(nn.Sequential(nn.Conv2d(3, 4, 3), module, nn.ReLU())).sites[-1]
    assert (site.channel_dim, site.channels, site.producer) == (1, site.shape[1], producer)


def test_a_windows_attention_returns_its_tokens():
    attention = pytest.importorskip("torchvision").models.swin_transformer.ShiftedWindowAttention(8, [2, 2], [0, 0], 1)
    (site,) = plan_of(nn.Sequential(attention, nn.ReLU())).sites  # of [N, H, W, C]
    assert (site.channel_dim, site.channels, site.producer) == (3, 8, "attention")


def test_unknown_layers_leave_it_to_the_readers():
    class Odd(nn.Module):
        def forward(self, x):
            return x * 2 if x.shape[-1] > 4 else x

    assert sites_of(lambda self, x: F.relu(self.odd(x)), odd=Odd())[0].channel_dim is None
    for reader, expected in ((nn.Conv2d(3, 4, 3), 1), (nn.Linear(8, 4), 3)):
        (site,) = sites_of(lambda self, x: self.reader(F.relu(self.odd(x)) + 1), odd=Odd(), reader=reader)
        assert (site.channel_dim, site.producer, site.skipped) == (expected, "odd", None)
        (site,) = sites_of(lambda self, x: self.reader(input=F.relu(input=self.odd(x))), odd=Odd(), reader=reader)
        assert (site.channel_dim, site.producer, site.skipped) == (expected, "odd", None)
        (site,) = sites_of(lambda self, x: self.reader(F.relu(self.odd(x)).mT), odd=Odd(), reader=reader)
        assert site.channel_dim is None
        # Of two readers, one says nothing.
        (site,) = sites_of(lambda self, x: (self.reader(y := F.relu(self.odd(x))), y + 1), odd=Odd(), reader=reader)
        assert (site.channel_dim, site.producer, site.skipped) == (expected, "odd", None)


def test_channel_dims_given_by_hand():
    placement = Placement(channel_dims={"relu": -1})
    (site,) = sites_of(lambda self, x: F.relu(x), placement=placement)
    assert (site.channel_dim, site.channels, site.producer, site.skipped) == (3, 8, "input", None)
    with pytest.raises(SiteError, match=r"relu: .*dimension 4, its input has shape \[2, 3, 8, 8\]"):
        sites_of(lambda self, x: F.relu(x), placement=Placement(channel_dims={"relu": 4}))
    with pytest.raises(SiteError, match="'rule', which is no site"):
        sites_of(lambda self, x: F.relu(x), placement=Placement(channel_dims={"rule": 1}))


def test_the_producer_is_seen_through_dropout():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(), nn.Identity(), nn.ReLU())
    assert plan_of(model).sites[0].producer == "conv"


# Gates.


def home_made(pool, back):
    """Return a squeeze-and-excitation nobody would recognise by its names."""

    def forward(self, x):
        x = self.stem(x)
        y = self.up(F.relu(self.down(pool(x))))
        return F.gelu(back(x, torch.sigmoid(y)))

    return Functional(forward, stem=nn.Conv2d(3, 4, 3), down=nn.Linear(4, 2), up=nn.Linear(2, 4))


@pytest.mark.parametrize(
    "pool", [lambda x: x.mean((2, 3)), lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1), lambda x: x.amax(3).amax(2)]
)
@pytest.mark.parametrize(
    "back",
    [
        lambda x, y: x * y[:, :, None, None],
        lambda x, y: y.view(x.shape[0], -1, 1, 1).expand_as(x) * x,
        lambda x, y: torch.mul(x, y.unsqueeze(-1).unsqueeze(-1)),
        lambda x, y: x * y.view(*y.shape, 1, 1).repeat(1, 1, *x.shape[2:]).reshape_as(x),
    ],
)
@pytest.mark.parametrize("size", [8, 3])  # of 3, one pixel is left to pool
def test_home_made_gates_are_skipped(pool, back, size):
    gate, main = plan_of(home_made(pool, back), IMAGES[:, :, :size, :size]).sites
    assert gate.skipped == "gate: squeeze-and-excitation, pooled then multiplied onto stem"
    assert (main.name, main.producer, main.skipped) == ("gelu", "mul", None)


@pytest.mark.parametrize(
    ("dims", "pool"),
    [
        (1, F.adaptive_avg_pool1d),
        (1, F.adaptive_max_pool1d),
        (2, F.adaptive_max_pool2d),
        (3, F.adaptive_avg_pool3d),
        (1, lambda x, size: F.avg_pool1d(x, 6)),
        (2, lambda x, size: F.max_pool2d(x, 6)),
        (3, lambda x, size: F.avg_pool3d(x, 6)),
        (1, lambda x, size: x @ x.mean(1, keepdim=True).softmax(-1).mT),  # attention of one query
        (2, lambda x, size: x.logsumexp((2, 3), keepdim=True)),
    ],
)
def test_whatever_pools_makes_a_gate(dims, pool):
    def forward(self, x):
        x = self.stem(x)
        return F.gelu(x * torch.sigmoid(self.up(F.relu(self.down(pool(x, 1))))))

    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    layers = {"stem": conv(3, 4, 1), "down": conv(4, 2, 1), "up": conv(2, 4, 1)}
    gate, main = sites_of(forward, torch.rand(2, 3, *[6] * dims), **layers)
    assert gate.skipped == "gate: squeeze-and-excitation, pooled then multiplied onto stem"
    assert main.skipped is None


def test_a_gate_whose_pooling_has_a_hook_is_skipped():
    pooling = Functional(lambda self, x: x.mean((2, 3), keepdim=True))
    pooling.register_forward_hook(lambda module, args, result: None)

    def forward(self, x):
        x = self.stem(x)
        return F.gelu(x * torch.sigmoid(self.up(F.relu(self.down(self.pooling(x))))))

    layers = {"stem": nn.Conv2d(3, 4, 1), "down": nn.Conv2d(4, 2, 1), "up": nn.Conv2d(2, 4, 1)}
    gate, main = sites_of(forward, pooling=pooling, **layers)
    assert gate.skipped == "gate: squeeze-and-excitation, pooled then multiplied onto stem"
    assert main.skipped is None


def test_a_gate_of_one_token_is_skipped():
    def forward(self, x):
        x = self.stem(x)
        return F.gelu(x * torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool1d(x, 1))))))

    layers = {"stem": nn.Conv1d(3, 4, 1), "down": nn.Conv1d(4, 2, 1), "up": nn.Conv1d(2, 4, 1)}
    gate, main = sites_of(forward, torch.rand(2, 3, 1), **layers)
    assert gate.skipped == "gate: squeeze-and-excitation, pooled then multiplied onto stem"
    assert main.skipped is None


def test_the_larger_of_two_features_is_not_pooled():
    """`torch.max` pools, too; of vectors there is no space to pool over."""

    def forward(self, x):
        x = self.stem(x)
        return self.head(x * F.relu(self.own(torch.max(self.left(x), self.right(x)))))

    (site,) = sites_of(
        forward,
        torch.rand(2, 3),
        **{n: nn.Linear(4, 4) for n in ("own", "left", "right", "head")},
        stem=nn.Linear(3, 4),
    )
    assert site.skipped is None


def test_a_pooled_context_that_is_subtracted_is_no_gate():
    def forward(self, x):
        x = self.stem(x)
        return x - self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1))))

    (site,) = sites_of(forward, stem=nn.Conv2d(3, 4, 3), down=nn.Conv2d(4, 2, 1), up=nn.Conv2d(2, 4, 1))
    assert site.skipped is None


def test_a_pooled_context_that_is_added_is_a_gate():
    def forward(self, x):
        x = self.stem(x)
        return F.relu(x + self.up(F.gelu(self.down(F.adaptive_avg_pool2d(x, 1)))))

    context, main = sites_of(forward, stem=nn.Conv2d(3, 4, 3), down=nn.Conv2d(4, 2, 1), up=nn.Conv2d(2, 4, 1))
    assert context.skipped == "gate: global context, pooled then added onto stem"
    assert main.skipped is None


@pytest.mark.parametrize("size", [(2, 1), (6, 1), 3])
def test_what_is_pooled_over_a_part_of_space_is_no_gate(size):
    def forward(self, x):
        x = self.stem(x)
        part = self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, size))))
        return x * F.interpolate(torch.sigmoid(part), (6, 6))

    (site,) = sites_of(forward, stem=nn.Conv2d(3, 4, 3), down=nn.Conv2d(4, 1, 1), up=nn.Conv2d(1, 4, 1))
    assert site.skipped is None


def test_a_head_after_pooling_is_no_gate():
    def forward(self, x):
        x = self.head(self.stem(x).mean((2, 3)))
        return self.out(F.relu(x) * 2 + x)

    (site,) = sites_of(forward, stem=nn.Conv2d(3, 4, 3), head=nn.Linear(4, 6), out=nn.Linear(6, 2))
    assert (site.skipped, site.channel_dim, site.channels) == (None, 1, 6)


def test_gates_within_the_main_path_leave_it_alone():
    block = home_made(lambda x: x.mean((2, 3)), lambda x, y: x * y[:, :, None, None])
    reasons = [s.skipped for s in plan_of(nn.Sequential(block, nn.Conv2d(4, 3, 1), block)).sites]
    assert [r is None for r in reasons] == [False, True, False, True]


def test_what_does_not_see_the_image_is_skipped():
    class Bias(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.ones(5, 4))
            self.mlp = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 8))
            self.act = nn.ReLU()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.act(self.conv(x + self.mlp(self.table).mean(0)))

    bias, main = plan_of(Bias()).sites
    assert bias.skipped.startswith("input-independent: ")
    assert main.skipped is None


def by_index(self, x):
    filled = torch.zeros(x.shape[0], 4, 8, 8)
    filled[:, :3] = x
    return F.relu(self.conv(filled))


def by_a_view(self, x):
    filled = torch.zeros(x.shape[0], 4, 8, 8)
    filled[:, 1:].copy_(x)
    return F.relu(self.conv(filled * 2))


def by_out(self, x):
    filled = torch.zeros(x.shape[0], 3, 8, 8)
    torch.mul(x, 2, out=filled)
    return F.relu(self.conv(torch.cat([filled, filled[:, :1]], 1)))


def into_a_buffer(self, x):
    self.memory[:, :3].copy_(x.mean(0))
    return F.relu(self.conv(self.memory + torch.zeros(x.shape[0], 1, 1, 1)))


@pytest.mark.parametrize("function", [by_index, by_a_view, by_out, into_a_buffer])
def test_what_images_are_written_into_depends_on_them(function):
    model = Functional(function, conv=nn.Conv2d(4, 5, 3)).requires_grad_(False)
    model.register_buffer("memory", torch.zeros(1, 4, 8, 8))
    (site,) = plan_of(model).sites
    assert (site.name, site.skipped, site.channels) == ("relu", None, 5)


def test_what_is_written_afterwards_does_not():
    def function(self, x):
        filled = torch.ones(x.shape[0], 4, 8, 8)
        bias = F.relu(self.conv(filled))
        filled[:, :3] = x
        return F.gelu(self.conv(filled)) + bias

    first, second = sites_of(function, conv=nn.Conv2d(4, 5, 3))
    assert first.skipped.startswith("input-independent: ")
    assert second.skipped is None


# Placement.


def test_placement_has_the_last_word_on_what_structure_allows():
    model = home_made(lambda x: x.mean((2, 3)), lambda x, y: x * y[:, :, None, None])
    gate, main = plan_of(model, placement=Placement(exclude=("relu", "gelu"))).sites
    assert gate.skipped.startswith("gate: ")
    assert main.skipped == "placement: excluded"


def test_a_plan_prints_all_that_is_known():
    def forward(self, x):
        x = self.act(self.conv(x))
        x = x + self.same(F.gelu(self.same(x)))
        x = x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))
        return F.silu(F.fold(F.unfold(x, 2), (6, 6), 2))

    layers = {
        "conv": nn.Conv2d(3, 4, 3),
        "same": nn.Conv2d(4, 4, 1),
        "down": nn.Conv2d(4, 2, 1),
        "up": nn.Conv2d(2, 4, 1),
    }
    placement = Placement(kinds=("activation", "residual_sum"), exclude="gelu")
    plan = plan_of(Functional(forward, act=nn.ReLU(), **layers), placement=placement).with_fusion({"act": "norm"})
    table = plan.table()
    gate = "gate: squeeze-and-excitation, pooled then multiplied onto add"
    axis = (
        "channel axis unknown: no layer around it tells: give it by hand, Placement(channel_dims={'silu': dimension})"
    )
    assert list(zip(*(column.cells for column in table.columns), strict=True)) == [
        ("act", "relu", "Nx4x6x6", "4 @ dim 1", "conv", "rewritten; fused: norm"),
        ("gelu", "gelu", "Nx4x6x6", "4 @ dim 1", "conv", "placement: excluded"),
        ("residual_sum", "residual_sum", "Nx4x6x6", "4 @ dim 1", "add", "rewritten"),
        ("relu", "relu", "Nx2x1x1", "2 @ dim 1", "conv", gate),
        ("silu", "silu", "Nx4x6x6", "?", "fold", axis),
    ]
    assert [column.header for column in table.columns] == ["site", "activation", "input", "channels", "after", "status"]
    assert [column.justify for column in table.columns] == ["left", "left", "left", "right", "left", "left"]
    assert table.caption == (
        f"2 of 5 sites rewritten, captured by {plan.route}; skipped: 1 placement, 1 gate, 1 channel axis unknown"
    )
    assert plan.left == {"gelu"}
    (only,) = plan_of(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())).table().caption.splitlines()
    assert only == f"1 of 1 sites rewritten, captured by {plan.route}"


@pytest.mark.parametrize(
    ("placement", "taken"),
    [
        ({}, ["act", "body.act", "body.gelu"]),
        ({"include": "body"}, ["body.act", "body.gelu"]),
        ({"include": (r"gelu$", r"^act$")}, ["act", "body.gelu"]),
        ({"exclude": "act"}, ["body.gelu"]),
        ({"include": "act", "exclude": "^act"}, ["body.act"]),
        ({"predicate": lambda site: site.producer == "conv"}, ["act", "body.gelu"]),
        ({"include": "body", "predicate": lambda site: site.activation.name == "relu"}, ["body.act"]),
    ],
)
def test_placements_choose_among_sites(placement, taken):
    body = Functional(lambda self, x: F.gelu(self.conv(self.act(x + 1))), conv=nn.Conv2d(4, 4, 1), act=nn.ReLU())
    model = nn.Sequential()
    for name, child in {"conv": nn.Conv2d(3, 4, 3), "act": nn.ReLU(), "body": body}.items():
        model.add_module(name, child)
    plan = plan_of(model, placement=Placement(**placement))
    assert [site.name for site in plan.active] == taken
    assert {site.refusal.kind for site in plan if site.refusal} <= {"placement"}
    assert plan.left == {"act", "body.act", "body.gelu"} - {*taken}


# In-place activations.


def test_later_readers_of_the_input_itself_are_fine():
    sites = sites_of(
        lambda self, x: self.act(h := self.conv(x)) + h, conv=nn.Conv2d(3, 4, 1), act=nn.ReLU(inplace=True)
    )
    assert sites[0].activation.inplace


VIEWS = {
    "view": lambda h: h.view(2, 4, -1),
    "transpose": lambda h: h.transpose(1, 2),
    "slice": lambda h: h[:, :2],
    "chunk": lambda h: h.chunk(2, 1)[0],
    "identity": nn.Identity(),
    "dropout": nn.Dropout(),
    "contiguous": lambda h: h.contiguous(),
    "reshape that copied": lambda h: h.transpose(2, 3).reshape(2, 4, -1),
    "detach": lambda h: h.detach(),
    "contiguous that copied": lambda h: h.transpose(2, 3).contiguous(),
    "reshape_as that copied": lambda h: h.transpose(2, 3).reshape_as(h.flatten(2)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_that_is_read_later_is_an_error(name):
    if isinstance(VIEWS[name], nn.Module):
        children = {"alias": VIEWS[name]}
    else:
        children = {"alias": Functional(lambda self, h: VIEWS[name](h))}

    def forward(self, x):
        h = self.conv(x)
        v = self.alias(h)
        return self.act(h).sum() + v.sum()

    message = r"act: the activation works in place, and sum later reads .* shares .*inplace=False.*exclude=\('act',\)"
    with pytest.raises(SiteError, match=message):
        sites_of(forward, conv=nn.Conv2d(3, 4, 1), act=nn.ReLU(inplace=True), **children)
    placement = Placement(exclude=("act",))
    assert sites_of(forward, placement=placement, conv=nn.Conv2d(3, 4, 1), act=nn.ReLU(inplace=True), **children)
    assert sites_of(forward, conv=nn.Conv2d(3, 4, 1), act=nn.ReLU(), **children)


def test_a_base_that_is_read_later_is_an_error():
    def forward(self, x):
        h = self.conv(x)
        a, b = h.chunk(2, 1)
        return F.relu_(a) + b + h.mean()

    with pytest.raises(SiteError, match=r"relu: .* mean later reads conv"):
        sites_of(forward, conv=nn.Conv2d(3, 4, 1))


def test_views_that_are_used_up_before_are_fine():
    def forward(self, x):
        h = self.conv(x)
        pooled = h.flatten(2).mean(-1)
        a, b = self.norm(h).chunk(2, 1)
        return F.relu_(h).flatten(2).mean(-1) + pooled + (F.silu(a) * b.shape[0]).mean()

    assert len(sites_of(forward, conv=nn.Conv2d(3, 4, 1), norm=nn.BatchNorm2d(4))) == 2


# The graph as any source may give it.


def test_the_graph_is_not_changed_and_runs_on_values_if_it_must():
    class Data(fx.Tracer):
        def is_leaf_module(self, m, module_qualified_name):
            return True

    class Peeking(nn.Module):
        """Looks at values, which a fake tensor has not, and keeps what it computed."""

        def forward(self, x):
            self.kept = x.sum().item()
            return x * self.kept

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Peeking(), nn.ReLU()).eval()
    graph_module = fx.GraphModule(model, Data().trace(model))
    before = graph_module.code
    (site,) = find_sites(graph_module, "by hand", IMAGES, Placement(channel_dims={"2": 1})).sites
    assert (site.producer, site.channels) == ("peeking", 4)
    assert graph_module.code == before
    assert not hasattr(model[1], "kept")


def test_a_module_may_be_called_by_any_of_its_names():
    act = nn.ReLU()
    model = nn.Sequential(nn.Conv2d(3, 4, 1), act, nn.Conv2d(4, 4, 1), act)
    graph = fx.Tracer().trace(model)
    graph.find_nodes(op="call_module", target="1")[1].target = "3"
    assert [s.name for s in find_sites(fx.GraphModule(model, graph), "by hand", IMAGES)] == ["1", "1_1"]


def test_tensors_that_are_not_strided_have_no_memory_to_share():
    def forward(self, x):
        x = F.relu(self.conv(x))
        return torch.sparse.mm(self.mixing, x.flatten(1).T)

    model = Functional(forward, conv=nn.Conv2d(3, 4, 3))
    model.register_buffer("mixing", torch.eye(144).to_sparse())
    (site,) = plan_of(model).sites
    assert (site.channels, site.skipped) == (4, None)


def test_readers_tell_the_channels_of_what_they_read_as_their_input_alone():
    """Neither as a convolution's weight, nor where another operand has more dimensions."""

    def forward(self, x):
        features = self.conv(x)
        weight = F.relu(x[:1].expand(2, -1, -1, -1)[..., :1, :1])
        image = F.gelu(x[:1, 0])
        return F.conv2d(features, weight) + self.conv2(features + image)

    weight, image = sites_of(forward, conv=nn.Conv2d(3, 3, 1), conv2=nn.Conv2d(3, 2, 1))
    assert (weight.channel_dim, image.channel_dim) == (None, None)


@pytest.mark.parametrize(("normalized", "expected"), [((6,), 3), ((4, 6, 6), 1), ((6, 6), 1)])
def test_a_layer_norm_that_reads_them_tells_the_channels_if_it_is_over_one_dimension(normalized, expected):
    """Over several it leaves that to the convolution behind it."""

    def forward(self, x):
        shuffled = self.conv(x).view(-1, 2, 2, 6, 6).transpose(1, 2).flatten(1, 2)
        return self.head(F.layer_norm(self.norm(F.relu(shuffled)), normalized))

    layers = {"conv": nn.Conv2d(3, 4, 3), "norm": nn.LayerNorm(normalized), "head": nn.Conv2d(4, 2, 1)}
    (site,) = sites_of(forward, **layers)
    assert site.channel_dim == expected


def test_one_example_image_tells_no_other_channels_than_several():
    """Of one image, [N * C, 1, H, W] has the channels' size and nothing before it."""

    def forward(self, x):
        return F.relu(self.conv(x).view(-1, 1, 6, 6))

    for rows in (1, 2, 3):
        (site,) = sites_of(forward, torch.rand(rows, 3, 8, 8), conv=nn.Conv2d(3, 4, 3))
        assert (site.channel_dim, site.refusal.kind) == (None, "channel axis unknown")


def test_a_pooled_branch_added_to_one_of_its_own_shape_is_no_gate():
    def forward(self, x):
        x = self.stem(x)
        return self.head(F.relu(self.down(x.mean((2, 3)))) + self.flat(x.flatten(1)))

    layers = {"stem": nn.Conv2d(3, 4, 3), "down": nn.Linear(4, 6), "flat": nn.Linear(144, 6), "head": nn.Linear(6, 2)}
    (site,) = sites_of(forward, **layers)
    assert (site.skipped, site.channels) == (None, 6)
