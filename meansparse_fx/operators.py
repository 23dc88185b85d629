"""Floor 4: the operators of a transformed model: finding them, and the switches that act on all of them.

Changes buffers and attributes of `MeanSparse` modules, never a graph.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from .arguments import half_widths, some
from .batches import examples
from .capture.codegen import refuse_changes
from .capture.preconditions import refuse_train_mode
from .capture.randomness import generator_state
from .copies import shadow
from .errors import StateError, StatisticsError
from .hooks import has_foreign_hooks
from .nn import MeanSparse
from .outputs import flatten
from .passes import Added
from .rewrite import PREFIX
from .state import kept_buffers, kept_random_state
from .statistics import Answers, Statistics, fingerprint

OTHER_FUNCTION = (
    "it has the same weights and sites, and computes something else: a slope, eps, stride, normalisation or "
    "connection is another"
)

OTHER_CHECKPOINT = (
    f"a checkpoint of another model; {OTHER_FUNCTION}, or hooks came or went: remove it to start from the beginning"
)
TRAINED = "the weights are not those that the statistics were measured on"


def operators(model: nn.Module) -> dict[str, MeanSparse]:
    """Return the operators of a transformed model by site name, in graph order.

    Raises:
        StateError: The model has none.
    """
    found = _find(model)
    if not found:
        raise StateError("this model has no MeanSparse operators: call meansparse_fx.transform(model, images) first")
    return found


def require_transformed(model: nn.Module, verb: str, calibrated: bool = False) -> None:
    """Raise StateError unless ``model`` is the GraphModule that `transform` returned, in eval mode, and calibrated."""
    found = operators(model)
    if not isinstance(model, fx.GraphModule):
        raise StateError(f"{verb} needs the GraphModule that transform returned, not a wrapper around it")
    refuse_train_mode(model, "the model", f"before {verb}")
    if any(tensor.is_meta for tensor in itertools.chain(model.parameters(), model.buffers())):
        raise StateError(f"the model is on the meta device, without weights: load them before {verb}")
    lacking = [name for name, operator in found.items() if not operator.calibrated]
    if calibrated and lacking:
        raise StateError(f"{lacking[0]}: no statistics: calibrate the model, or set_statistics, before {verb}")
    for operator in found.values():
        operator.check_written(values=True)
    if calibrated:
        refuse_changes(model)


def added(model: nn.Module) -> Added:
    """Return what a transformed model keeps of how it was made.

    Raises:
        StateError: It is not what `transform` returned.
    """
    if (found := added_if_any(model)) is None:
        raise StateError("this is not the model that transform returned: call meansparse_fx.transform(model, images)")
    return found


def added_if_any(model: nn.Module) -> Added | None:
    """Return the same, or None of any other model: a base, or what wraps a transformed one."""
    found = model._modules.get(PREFIX)
    return found if isinstance(found, Added) else None


def get_alpha(model: nn.Module, by_site: bool = False) -> float | dict[str, float]:
    """Return alpha as `set_alpha` takes it: one number if all sites share it, otherwise a mapping from site name.

    Args:
        model: A transformed model.
        by_site: Always the mapping, in graph order, for code that goes through the sites.
    """
    alphas = {name: m.get_alpha() for name, m in operators(model).items()}
    values = set(alphas.values())
    return values.pop() if len(values) == 1 and not by_site else alphas


def set_alpha(model: nn.Module, alpha: float | Mapping[str, float]) -> None:
    """Set the half width of the band, in standard deviations of each channel; 0 gives the base model.

    Recompiles nothing.

    Args:
        model: A transformed model.
        alpha: One value for all sites, or a mapping to values, of which others keep theirs: from names of sites, or
            from regular expressions found in them, as `Placement` takes them (``{"layer[12]": 0.1, "layer1.0.relu":
            0}``). The name of a site is that site alone and counts before patterns, and a later pattern before an
            earlier one.

    Raises:
        ArgumentError: alpha is no number, negative, NaN or infinite; a ValueError, too.
        StateError: The model is not transformed, no site has such a name, or a site has no statistics yet.
    """
    found = operators(model)
    for name, value in alpha_by_site(alpha, found).items():
        found[name].set_alpha(value)


def alpha_by_site(
    alpha: float | Mapping[str, float], sites: Collection[str], allow_unknown: bool = False
) -> dict[str, float]:
    """Return what an alpha as `set_alpha` takes it is at each of the sites, without those that keep theirs.

    Args:
        allow_unknown: Pass over names and patterns that are no site's.

    Raises:
        ArgumentError, StateError: As `set_alpha` raises them.
    """
    given = half_widths(alpha)
    if not isinstance(given, dict):
        return dict.fromkeys(sites, given)
    if (unknown := unknown_sites(given, sites)) and not allow_unknown:
        raise StateError(f"no such site: {', '.join(unknown[:3])}; sites are {some(sites)}")
    patterns = {key: value for key, value in given.items() if key not in sites}
    matches = {site: value for key, value in patterns.items() for site in sites if _is_found(key, site)}
    return matches | {key: value for key, value in given.items() if key in sites}


def unknown_sites(alpha: Mapping[str, float], sites: Collection[str]) -> list[str]:
    """Return the names and patterns in a mapping as `set_alpha` takes it that are no site's."""
    return [key for key in alpha if key not in sites and not any(_is_found(key, site) for site in sites)]


def _is_found(pattern: str, site: str) -> bool:
    try:
        return re.search(pattern, site) is not None
    except re.error:
        return False


def set_backward(model: nn.Module, mode: str, steepness: float = 10.0) -> None:
    """Choose the gradient an attacker sees; forward values never depend on it.

    Args:
        model: A transformed model.
        mode: ``exact`` (zero inside the band), ``identity`` (straight through: BPDA) or ``smooth`` (of a sigmoid gate).
            What `evaluate` calls ``annealed`` is ``smooth`` with steepness 3, 5, 9, 17 and 30, each for a fifth of an
            attack's steps.
        steepness: Of the smooth backward's gate, per relative distance to the band's edge; that of the smooth variant
            is another, which `set_variant` sets.
    """
    for operator in operators(model).values():
        operator.set_backward(mode, steepness)


def set_variant(model: nn.Module, variant: str = "mean", centre: str = "channel", steepness: float = 10.0) -> None:
    """Choose what values inside the band become.

    Args:
        model: A transformed model.
        variant: ``mean`` (the paper's), ``edge`` (the nearer edge of the band) or ``smooth`` (a sigmoid gate).
        centre: ``channel`` (the paper's), ``zero`` or ``layer``: the band's centre (paper, Table 8).
        steepness: Of the smooth gate.
    """
    for operator in operators(model).values():
        operator.set_variant(variant, centre, steepness)


def set_statistics(model: nn.Module, statistics: Statistics | str | Path, check_weights: bool = True) -> None:
    """Give every operator its site's mean and std; alpha stays.

    Args:
        model: A transformed model.
        statistics: Of the same base model, or the path of a file of them; those of sites that the model's placement
            leaves alone are left out.
        check_weights: Refuse statistics measured on other weights; otherwise they count as this model's from now on.

    Raises:
        StatisticsError: They do not fit; nothing was changed.
    """
    if not isinstance(statistics, Statistics):
        statistics = Statistics.load(statistics)
    found, own = operators(model), added_if_any(model)
    if own is not None:
        kinds = {*own.placement.kinds, *(site.kind for site in own.plan)}  # a published model's are not its placement's
        statistics = statistics.without(own.plan.left, kinds)
    channels = {name: operator.channels for name, operator in found.items()}
    activations = {name: operator.activation.name for name, operator in found.items() if operator.activation}
    statistics.check(channels, fingerprint(model) if check_weights else None, activations)
    if check_weights and isinstance(model, fx.GraphModule) and answers_differ(model, statistics):
        raise StatisticsError(f"these statistics are of another model; {OTHER_FUNCTION}: calibrate this model")
    for name, operator in found.items():
        operator.set_statistics(statistics[name])
    if own is not None:
        if not check_weights:
            statistics = replace(statistics, fingerprint=fingerprint(model), answers=answers(model, own.shape))
        own.statistics, own.reloaded = statistics, False


def answers(model: nn.Module, shape: Sequence[int] | None) -> Answers | None:
    """Return some of what a model, or its base, computes of a pattern; None if that would tell nothing.

    So it is where the model draws random numbers or fails, or where the user's hooks would see the pattern.

    Args:
        shape: Of one image; None if the model takes no floats.
    """
    found = _find(model)
    place = next((t.device for t in itertools.chain(model.parameters(), model.buffers())), torch.device("cpu"))
    if shape is None or any(map(has_foreign_hooks, model.modules())):
        return None
    pattern = torch.arange(2.0 * math.prod(shape), dtype=torch.float64, device="cpu").mul(0.7548776662466927).frac()
    images = examples(pattern.reshape(2, *shape), model).to(place)
    try:
        with switched(model), kept_buffers(model), torch.no_grad(), torch.autocast(place.type, enabled=False):
            if found:
                set_alpha(model, 0.0)
            else:
                model = shadow(model)
            with kept_random_state(place):
                before = generator_state(place)
                outputs = flatten(model(images))[0]
                drew = generator_state(place) != before
    except Exception:  # the graph does not hold for images of that size, or the model is on the meta device
        return None
    floats = [t.flatten().double().cpu() for t in outputs if isinstance(t, Tensor) and t.is_floating_point()]
    values = torch.cat([torch.zeros(0, device="cpu"), *floats])
    values = values[:: max(1, len(values) // 64)]
    if drew or not len(values) or not values.isfinite().all():
        return None
    exact = place.type == "cpu" and images.dtype in (torch.float32, torch.float64)
    return Answers(tuple(shape), tuple(values.tolist()), exact)


def answers_differ(model: nn.Module, statistics: Statistics) -> bool:
    """Return whether a model, or its base, is seen to compute something else than the one that was measured."""
    there = statistics.answers
    here = there and answers(model, there.shape)
    return there is not None and here is not None and not here.agree(there)


def was_trained(model: nn.Module) -> bool:
    """Return whether a transformed model is seen to have other weights than its statistics were measured on.

    Of weights in half precision that were measured in single, or on a GPU and now on a CPU, it is not known.
    """
    known = added(model).statistics
    if known is None or known.answers is None or fingerprint(model) == known.fingerprint:
        return False
    here = answers(model, known.answers.shape)
    return here is not None and here.exact == known.answers.exact and not here.agree(known.answers)


@contextmanager
def switched(model: nn.Module) -> Iterator[None]:
    """Put alpha, variant and backward mode of every site back as they were on leaving the block; a base has none."""
    before = {m: (m.variant, m.get_alpha(), m.backward, m.backward_steepness) for m in _find(model).values()}
    try:
        yield
    finally:
        for operator, (variant, alpha, mode, steepness) in before.items():
            operator.set_variant(variant)
            operator.set_alpha(alpha)
            operator.set_backward(mode, steepness)


def _find(model: nn.Module) -> dict[str, MeanSparse]:
    every = [m for m in model.modules() if isinstance(m, MeanSparse)]
    found = {m.name: m for m in every}
    if len(found) < len(every):
        raise StateError(
            f"{type(model).__name__} holds several transformed models, whose sites share names: pass each by itself"
        )
    return found
