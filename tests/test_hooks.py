"""Hooks and forwards of a module's own: they run as on the base, or are refused by name."""

from __future__ import annotations

import copy
import functools
import pickle
import types
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils import prune

import meansparse_fx as msfx
from meansparse_fx.errors import CaptureError, SiteError, StateError
from meansparse_fx.export import to_exported_program
from meansparse_fx.passes import refuse_hooks
from tests.test_published import Published

IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class LayerScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.linspace(0.5, 1.5, 4).view(4, 1, 1))

    def forward(self, x):
        return x * self.gamma


class Net(nn.Module):
    """Activations, norms, a convolution, a container, a LayerScale: fused, taken in, called, traced into."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.GELU())
        self.scale, self.softsign, self.head = LayerScale(), nn.Softsign(), nn.Linear(4, 3)

    def forward(self, x):
        x = self.act(self.bn(self.conv(x)))
        x = x + self.scale(self.body(x))
        return self.head(self.softsign(x).mean((2, 3)))


class AtOneSize(Net):
    """Asks the images, so that examples answer while it is traced."""

    def forward(self, x):
        return super().forward(F.pad(x, (0, 1)) if x.shape[-1] % 2 else x)


MODULES = ("", "conv", "bn", "act", "body", "body.1", "body.2", "scale", "softsign", "head")


def net(architecture=Net):
    torch.manual_seed(0)
    model = architecture()
    for module in (model.bn, model.body[1]):
        module.running_mean.normal_()
        module.running_var.uniform_(0.5, 2)
    return model.eval()


def halve(module, args, result):
    return result * 0.5


def halve_gradients(module, *gradients):
    return tuple(g if g is None else g * 0.5 for g in gradients[0])


class Halver:
    def hook(self, module, args, result):
        return result * 0.5


HOOKS = {
    "forward": lambda m: m.register_forward_hook(halve),
    "forward, with kwargs": lambda m: m.register_forward_hook(
        lambda module, args, kwargs, result: result * 0.5, with_kwargs=True, prepend=True, always_call=True
    ),
    "a method": lambda m: m.register_forward_hook(Halver().hook),
    "forward, two": lambda m: (m.register_forward_hook(halve), m.register_forward_hook(lambda *_: _[2].clamp(max=0.1))),
    "partial": lambda m: m.register_forward_hook(functools.partial(halve)),
    "pre": lambda m: m.register_forward_pre_hook(lambda module, args: args[0] * 0.7),
    "pre, with kwargs": lambda m: m.register_forward_pre_hook(
        lambda module, args, kwargs: ((args[0] * 0.7,), kwargs), with_kwargs=True
    ),
    "backward": lambda m: m.register_full_backward_hook(halve_gradients),
    "backward pre": lambda m: m.register_full_backward_pre_hook(halve_gradients),
    "backward, legacy": lambda m: m.register_backward_hook(halve_gradients),
}


def results(model):
    """Return output and images' gradient."""
    x = IMAGES.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return y.detach(), x.grad


def assert_same(model, transformed):
    for got, expected in zip(results(transformed), results(model), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


def assert_hook_runs(model, path, kind, **options):
    """Hook one module, and compare the model with what `transform` and `restore` make of it."""
    before = results(model)
    HOOKS[kind](model.get_submodule(path))
    assert not all(map(torch.equal, results(model), before)), "the hook does something"
    sparse = msfx.transform(model, IMAGES, **options)
    assert len(msfx.operators(sparse)) == 3
    assert_same(model, sparse)
    assert_same(model, msfx.restore(sparse))
    return sparse


LEGACY = pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning")


@LEGACY
@pytest.mark.parametrize("kind", ["forward", "pre, with kwargs", "backward", "backward, legacy"])
@pytest.mark.parametrize("path", MODULES)
def test_hooks_run_as_on_the_base(path, kind):
    assert_hook_runs(net(), path, kind)


@pytest.mark.parametrize("kind", ["forward, with kwargs", "forward, two", "a method", "partial", "pre", "backward pre"])
@pytest.mark.parametrize("path", ["", "act", "body"])
def test_hooks_of_every_kind(path, kind):
    model = net()
    assert_same(model, copy.deepcopy(assert_hook_runs(model, path, kind)))


@pytest.mark.parametrize("kind", ["forward", "pre", "backward"])
@pytest.mark.parametrize("path", ["", "act", "body"])
def test_hooks_where_examples_answer(path, kind):
    assert_hook_runs(net(AtOneSize), path, kind)


@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize("path", ["bn", "act", "body", "body.1", "scale"])
def test_hooks_of_what_is_taken_in(path, kind):
    assert_hook_runs(net().requires_grad_(False), path, kind, fuse="all")


@pytest.mark.parametrize("path", MODULES)
def test_what_hooks_record_is_what_the_base_gives(path):
    model, seen = net(), {}
    model.get_submodule(path).register_forward_hook(lambda module, args, result: seen.update({path: result}))
    sparse = msfx.transform(model, IMAGES)
    model(IMAGES)
    expected = seen.pop(path)
    sparse(IMAGES)
    assert torch.equal(seen[path], expected)


class Recorder:
    def __init__(self):
        self.seen = []

    def __call__(self, module, args, result):
        self.seen.append(result)


@pytest.mark.parametrize("path", MODULES)
def test_a_recorder_is_copied_as_deepcopy_does_and_holds_nothing_of_the_capture(path):
    model, recorder = net().requires_grad_(False), Recorder()
    model.get_submodule(path).register_forward_hook(recorder)
    sparse = msfx.transform(model, IMAGES)
    assert not recorder.seen
    assert torch.equal(copy.deepcopy(sparse)(IMAGES), model(IMAGES))
    assert len(recorder.seen) == 1


class Keeping(nn.Module):
    """Reads what its hook kept, as feature extractors do."""

    def __init__(self, path, register):
        super().__init__()
        self.net, self.recorder = net(), Recorder()
        register(self, self.net.get_submodule(path))

    def keep(self, name, module, args, result=None):
        self.recorder.seen.append(args[0] if result is None else result)

    def forward(self, x):
        self.recorder.seen.clear()
        return self.net(x) + self.recorder.seen[-1].mean()


KEEPING = {
    "a method": lambda model, module: module.register_forward_hook(functools.partial(model.keep, "name")),
    "a method before": lambda model, module: module.register_forward_pre_hook(functools.partial(model.keep, "name")),
    "an object": lambda model, module: module.register_forward_hook(model.recorder),
}


@pytest.mark.parametrize("kind", KEEPING)
@pytest.mark.parametrize("path", MODULES)
def test_a_model_reads_what_its_hooks_keep(path, kind):
    model = Keeping(path, KEEPING[kind]).eval()
    sparse = msfx.transform(model, IMAGES)
    assert [s.skipped for s in sparse.meta["plan"]] == [None] * 3
    assert_same(model, sparse)
    assert_same(model, msfx.restore(sparse))


def test_what_a_plain_function_keeps_is_the_bases_and_the_error_says_so():
    def register(model, module):
        module.register_forward_hook(lambda *given: model.recorder.seen.append(given[-1]))

    with pytest.raises(CaptureError, match="make it a method of the model"):
        msfx.transform(Keeping("act", register).eval(), IMAGES)

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.kept = net(), {}
            kept = self.kept
            self.net.act.register_forward_hook(lambda *given: kept.update(act=given[-1]))

        def forward(self, x):
            return self.net(x) + self.kept["act"].mean()

    model = Named().eval()
    model(IMAGES)
    with pytest.raises(CaptureError, match="make that hook a method of the model"):
        msfx.transform(model, IMAGES)


KEPT = []


def keep_hidden_state(module, args, output):
    KEPT.append(output)


keep_hidden_state.__module__ = "transformers.utils.output_capturing"


def test_transformers_own_hooks_are_a_part_of_the_model():
    """By plain functions its models read what their layers give, registered when it is first asked for."""

    class Backbone(Net):
        def forward(self, x):
            KEPT.clear()
            if not self.body._forward_hooks:
                self.body.register_forward_hook(keep_hidden_state)
            return super().forward(x), self.softsign(KEPT[0])

    model = net(Backbone)
    for _ in ("not asked yet", "asked before"):
        sparse = msfx.transform(model, IMAGES)
        assert all(map(torch.equal, sparse(IMAGES), model(IMAGES)))


def test_a_fusion_is_declined_and_says_so():
    model = net().requires_grad_(False)
    plan = msfx.transform(model, IMAGES, fuse="all").meta["plan"]
    assert {s.name: s.fused for s in plan} == {
        "act": "norm",
        "body.2": "norm",
        "softsign": "LayerScale + sum",
    }
    for path in ("act", "conv"):  # a convolution is never taken in
        model.get_submodule(path).register_forward_hook(halve)
    plan = msfx.transform(model, IMAGES, fuse="all").meta["plan"]
    assert [s.fused for s in plan] == [
        "norm; a module beside it has hooks",
        "norm",
        "LayerScale + sum; a module beside it has hooks",
    ]
    for path in ("bn", "body", "scale"):
        model.get_submodule(path).register_forward_hook(halve)
    plan = msfx.transform(model, IMAGES, fuse="all").meta["plan"]
    assert {s.name: (s.activation.fused, s.fused) for s in plan} == {
        "act": (False, "a module beside it has hooks"),
        "body.2": (True, "norm; a module beside it has hooks"),
        "softsign": (False, "sum; a module beside it has hooks"),
    }


@pytest.mark.parametrize("kind", ["forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook"])
def test_hooks_of_all_modules_are_refused(kind):
    handle = getattr(torch.nn.modules.module, f"register_module_{kind}")(halve)
    try:
        with pytest.raises(StateError, match=r"registered for every module there is \(halve\).*remove them"):
            msfx.transform(net(), IMAGES)
    finally:
        handle.remove()


def test_a_hook_that_hides_an_activation_is_refused():
    for path in ("body", "conv", "act"):
        model = net()
        model.get_submodule(path).register_forward_hook(lambda module, args, result: F.silu(result))
        with pytest.raises(CaptureError, match="the model calls 4 activations and the graph shows 3"):
            msfx.transform(model, IMAGES)


@pytest.mark.parametrize(
    ("register", "message"),
    [
        (lambda m: m.register_forward_hook(lambda module, args, result: (*result, 1)), "a hook of Times returns"),
        (lambda m: m.register_forward_pre_hook(lambda module, args: (args[0], 3)), "a pre-hook of Times changes"),
    ],
)
def test_a_hook_that_changes_more_than_tensors_is_refused(register, message):
    class Times(nn.Module):
        def forward(self, x, times):
            return x * times, times

    model = net()
    model.times = Times().eval()
    model.forward = types.MethodType(lambda self, x: self.act(self.conv(self.times(x, 2)[0])), model)
    assert_same(model, msfx.transform(model, IMAGES))
    register(model.times)
    with pytest.raises(CaptureError, match=message):
        msfx.transform(model, IMAGES)


def test_hooks_of_modules_that_take_and_return_several():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x, other, *, scale=1.0, more=None):
            return {"a": self.act(x) * scale, "b": [other, more]}

    model = net()
    model.pair = Pair().eval()

    def forward(self, x):
        x = self.conv(x)
        pair = self.pair(x, x + 1, scale=2.0, more=x - 1)
        return self.head((pair["a"] + pair["b"][0] * pair["b"][1]).mean((2, 3)))

    model.forward = types.MethodType(forward, model)
    model.pair.register_forward_hook(lambda module, args, result: result | {"a": result["a"] / 2})
    model.pair.register_forward_pre_hook(
        lambda module, args, kwargs: ((args[1], args[0]), kwargs | {"more": args[0]}), with_kwargs=True
    )
    sparse = msfx.transform(model, IMAGES)
    assert list(msfx.operators(sparse)) == ["pair.act"]
    assert_same(model, sparse)


def test_a_transformed_model_refuses_hooks_where_nothing_is_called():
    model = net().requires_grad_(False)
    sparse, calls = msfx.transform(model, IMAGES, fuse="all"), []
    for hooked in (sparse, copy.deepcopy(sparse)):
        for path in ("act", "body.2", "bn", "body.1"):
            with pytest.raises(StateError, match=f"{path} is a part of the operator meansparse"):
                hooked.get_submodule(path).register_forward_hook(halve)
        for path in ("body", "scale"):
            for register in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
                with pytest.raises(StateError, match=f"does not call {path}: register the hook on"):
                    getattr(hooked.get_submodule(path), f"register_{register}")(halve)
    for path in ("", "conv", "head", "meansparse.act", "softsign"):
        sparse.get_submodule(path).register_forward_hook(lambda *_: calls.append(1))
    sparse(IMAGES)
    assert len(calls) == 5
    for path in ("act", "body.2", "bn", "body.1", "scale"):  # nor another module in its place, which changes nothing
        owner, _, name = path.rpartition(".")
        with pytest.raises(StateError, match=f"{path}.*: put another module there in the base"):
            setattr(sparse.get_submodule(owner), name, nn.Softplus())
    sparse.head = nn.Identity()
    base = msfx.restore(sparse)
    base.head = model.head
    for path in ("act", "body.1"):
        base.get_submodule(path).register_forward_hook(halve)
    assert not torch.equal(base(IMAGES), model(IMAGES))
    assert not sparse.act._forward_hooks


@pytest.mark.parametrize("path", ["bn", "act", "scale"])
def test_pruning_what_is_not_called_is_refused_and_changes_nothing(path):
    model = net()
    model.act = nn.PReLU(4)
    sparse = msfx.transform(model.eval().requires_grad_(False), IMAGES, fuse="all")
    before, module = sparse(IMAGES), sparse.get_submodule(path)
    name = next(name for name, _ in module.named_parameters())
    with pytest.raises(StateError, match=f"{path}.*: prune it in the base"):
        prune.l1_unstructured(module, name, amount=0.5)
    assert sparse.state_dict().keys() - {"meansparse"} == msfx.transform(model, IMAGES, fuse="all").state_dict().keys()
    assert torch.equal(sparse(IMAGES), before)


@pytest.mark.parametrize(
    ("act", "change"),
    [
        (nn.LeakyReLU(0.1), {"negative_slope": 0.3}),
        (nn.GELU(), {"approximate": "tanh"}),
        (nn.Softplus(), {"beta": 2.0}),
        (nn.ReLU(), {"forward": F.silu}),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("copier", [lambda model: model, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_an_activation_that_becomes_another_is_refused(act, change, copier):
    model = net()
    model.act = copy.deepcopy(act).eval()
    sparse = copier(msfx.transform(model, IMAGES))
    sparse.act.inplace, sparse.act.note = True, "no part of its function"  # both are taken
    sparse(IMAGES)
    for name, value in change.items():
        setattr(sparse.act, name, value)
    with pytest.raises(StateError, match=f"act: .*{next(iter(change))}.*set it in the base model, and transform that"):
        sparse(IMAGES)
    base = msfx.restore(sparse)
    for name, value in change.items():
        setattr(model.act, name, value)
    assert torch.equal(base(IMAGES), model(IMAGES))


class Settings:
    def __init__(self):
        self.factor, self.labels = 1.5, {0: "cat"}


class Configured(nn.Module):
    """Reads plain attributes of every kind, its own and a child's, and one of a module that the graph calls."""

    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 3), nn.ReLU()
        self.flag, self.rates, self.config, self.unread = True, {"low": [2.0]}, Settings(), 1
        self.squash = torch.tanh

    def forward(self, x):
        x = F.conv2d(x, self.conv.weight, stride=self.conv.stride) * self.config.factor
        return self.squash(self.act(x * self.rates["low"][0] if self.flag else x))


CHANGES = {
    "a flag": lambda m: setattr(m.own, "flag", False),
    "an entry": lambda m: m.own.rates["low"].insert(0, 3.0),
    "a configuration": lambda m: setattr(m.own.config, "factor", 2.0),
    "a function": lambda m: setattr(m.own, "squash", torch.sin),
    "of a module that is called elsewhere": lambda m: setattr(m.own.conv, "stride", (2, 2)),
    "the model's own": lambda m: setattr(m, "level", 2.0),
    "another activation": lambda m: m.own._modules.update(act=nn.GELU()),
    "another block": lambda m: m._modules.update(own=nn.Conv2d(3, 4, 3)),
}


class Levelled(nn.Module):
    def __init__(self):
        super().__init__()
        self.level, self.own, self.soft = 3.0, Configured(), nn.Softsign()

    def forward(self, x):
        return self.soft(self.own(x)) * self.level


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("copier", [lambda model: model, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_what_forward_read_of_plain_attributes_stays_or_is_refused(change, copier):
    """The graph had the former value, silently."""
    model = Levelled().eval()
    untouched = msfx.transform(model, IMAGES)
    sparse = copier(untouched)
    compiled = torch.compile(sparse, backend="eager")
    sparse.own.unread, sparse.own.new, sparse.own.rates = 2, 3, {"low": [2.0]}  # equal, or nothing that was read
    sparse.own.config.labels.clear()
    assert torch.equal(sparse(IMAGES), model(IMAGES))
    assert torch.equal(compiled(IMAGES), model(IMAGES))
    CHANGES[change](sparse)
    for run in (sparse, compiled):
        with pytest.raises(StateError, match="the graph has the former: set it in the base model, and transform that"):
            run(IMAGES)
    if copier is copy.deepcopy:
        assert torch.equal(untouched(IMAGES), model(IMAGES))


def test_modules_made_under_torch_compile_are_none_of_ours():
    class Disables(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.GELU()

        def forward(self, x):
            return torch.compiler.disable(self.act)(x)

    model = Disables()
    assert torch.equal(torch.compile(model, backend="eager")(IMAGES), model(IMAGES))


def test_a_module_that_the_graph_calls_for_its_hooks_takes_more():
    model, calls = net(), []
    model.body.register_forward_pre_hook(lambda module, args: None)
    sparse = msfx.transform(model, IMAGES)
    sparse.body.register_forward_hook(lambda *_: calls.append(1))
    sparse(IMAGES)
    assert len(calls) == 1


_RECORDED = []


def record(module, args, result):
    _RECORDED.append(result)


def test_hooks_survive_pickle():
    model = net()
    model.body.register_forward_hook(record)
    sparse = pickle.loads(pickle.dumps(msfx.transform(model, IMAGES)))
    _RECORDED.clear()
    assert torch.equal(sparse(IMAGES), model(IMAGES))
    assert len(_RECORDED) == 2


@torch.no_grad()
def test_hooks_run_in_exports_and_in_the_plug_in():
    model = net()
    for path in ("", "act", "body"):
        model.get_submodule(path).register_forward_hook(halve)
    expected = model(IMAGES)
    sparse = msfx.transform(model, IMAGES)
    msfx.calibrate(sparse, [IMAGES], progress=False)
    torch.testing.assert_close(to_exported_program(sparse, IMAGES).module()(IMAGES), expected)
    compiled = torch.compile(model, backend="meansparse", options={"inner": "eager"})
    torch.testing.assert_close(compiled(IMAGES), expected)
    assert [s.name for s in msfx.compile_report(compiled).plan.active] == ["act", "body.2", "softsign"]


def test_hooks_of_a_published_operator_are_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Published(4), nn.ReLU()).eval()
    model[1].register_forward_hook(halve)
    with pytest.raises(SiteError, match="the published operator 1 has hooks"):
        msfx.transform(model, IMAGES)


def test_hooks_on_a_wrapper_are_refused():
    model = nn.DataParallel(net()).eval()
    model.register_forward_hook(halve)
    with pytest.raises(CaptureError, match="DataParallel has hooks, and is taken off the Net"):
        msfx.transform(model, IMAGES)


def test_state_dict_hooks_of_the_model_itself_are_kept():
    model = net()
    model.register_load_state_dict_pre_hook(
        lambda module, state, *_: state.update({k.removeprefix("old."): state.pop(k) for k in list(state)})
    )
    model.register_state_dict_post_hook(lambda module, state, *_: state.update(extra=torch.ones(1)))
    sparse = msfx.transform(model, IMAGES)
    held = {k: v if k.endswith("_extra_state") else v + 1 for k, v in sparse.state_dict().items()}
    state = {f"old.{k}": v for k, v in held.items() if k != "extra"}
    assert len(state) == len(sparse.state_dict()) - 1
    before = sparse.head.bias.clone()
    sparse.load_state_dict(state)
    assert torch.equal(sparse.head.bias, before + 1)


# A forward of its own.


def own_forward(module):
    forward = module.forward
    module.forward = lambda *args: forward(*args) * 2


@contextmanager
def of_class(module, forward):
    """Put a forward into a module's class."""
    before = type(module).forward
    type(module).forward = functools.wraps(before)(lambda self, *args: forward(before, self, *args))
    try:
        yield
    finally:
        type(module).forward = before


@pytest.mark.parametrize("fuse", ["activation", "all"])
@pytest.mark.parametrize("path", MODULES)
def test_an_instances_own_forward_counts(path, fuse):
    model, plain = net().requires_grad_(False), net()
    own_forward(model.get_submodule(path))
    assert not torch.equal(model(IMAGES), plain(IMAGES))
    sparse = msfx.transform(model, IMAGES, fuse=fuse)
    assert len(sparse.meta["plan"]) == 3
    assert_same(model, sparse)


@pytest.mark.parametrize("path", ["conv", "bn", "act", "body", "body.2", "softsign"])
def test_a_forward_put_into_a_class_counts(path):
    model = net().requires_grad_(False)
    module, expected = model.get_submodule(path), model(IMAGES)
    with of_class(module, lambda before, *args: before(*args) * 2):
        assert not torch.equal(model(IMAGES), expected)
        assert_same(model, msfx.transform(model, IMAGES, fuse="all"))


def test_activations_in_an_own_forward_are_sites():
    model = net()
    model.conv.forward = types.MethodType(lambda self, x: F.silu(self._conv_forward(x, self.weight, None)), model.conv)
    model.act.forward = lambda x: F.relu(x).clamp(max=0.3)
    model.softsign.forward = lambda x: x + 1
    assert [s.activation.name for s in msfx.inspect(model, IMAGES).active] == ["silu", "relu", "gelu"]
    assert_same(model, msfx.transform(model, IMAGES))


def test_a_module_of_two_names_takes_hooks_whichever_is_called():
    conv = nn.Conv2d(3, 3, 1)
    for name in ("a", "b"):
        graph = fx.Graph()
        graph.output(graph.call_module(name, (graph.placeholder("x"),)))
        module = fx.GraphModule({name: conv}, graph)
        module._modules = {"a": conv, "b": conv, "other": nn.ReLU()}
        refuse_hooks(module)
        conv.register_forward_hook(lambda *args: None).remove()
        with pytest.raises(StateError, match="does not call other"):
            module.other.register_forward_hook(lambda *args: None)


def test_hooks_of_a_module_in_a_plain_list_are_refused():
    class Holding(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.held = nn.Conv2d(3, 4, 3), [nn.ReLU()]

        def forward(self, x):
            return self.held[0](self.conv(x))

    model, images = Holding().eval(), torch.rand(2, 3, 8, 8)
    assert len(msfx.inspect(model, images).active) == 1
    model.held[0].register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(CaptureError, match="ReLU, held in a list or by a class, has hooks: register it, or them"):
        msfx.transform(model, images)


@pytest.mark.parametrize("fuse", ["activation", "all"])
@pytest.mark.parametrize("path", MODULES[1:])
def test_parts_called_past_the_operators_are_refused(path, fuse):
    """As in ``nn.Sequential(*sparse.children())``; by themselves, parts without an activation are the base's."""
    model = net().requires_grad_(False)
    sparse = msfx.transform(model, IMAGES, fuse=fuse)
    expected = sparse(IMAGES)
    x = IMAGES if path == "conv" else torch.ones(4, 4) if path == "head" else model.conv(IMAGES)
    own, restored = (m.get_submodule(path) for m in (model, msfx.restore(sparse)))
    assert torch.equal(restored(x), own(x))
    refused = path in ("act", "body", "body.2")
    msfx.calibrate(sparse, [IMAGES], progress=False)
    for transformed in (sparse, copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
        part = transformed.get_submodule(path)
        if refused:
            with pytest.raises(StateError, match=f"^{path}, called by itself, computes without the operators"):
                part(x)
        else:
            assert torch.equal(part(x), own(x))
        assert torch.equal(transformed(IMAGES), expected)
