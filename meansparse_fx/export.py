"""Floor 5: a transformed model as a file for deployment, which runs without this package.

Statistics and alpha become constants, and the file holds standard operators only. Changes no model.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from .artifacts import require_place, write_whole
from .batches import examples
from .capture.derivatives import own_derivatives
from .copies import copied
from .errors import ArtifactError, CaptureError, first_line
from .hooks import has_hooks
from .names import FORMATS
from .operators import operators, require_transformed
from .outputs import names
from .rewrite import sharing_copy

_ONNX_LIMIT = 2**31 - 2**20  # bytes of one ONNX file: a protocol buffer, less some room for the graph


def to_exported_program(sparse: fx.GraphModule, images: Tensor, dynamic_batch: bool = True) -> ExportedProgram:
    """Return a transformed model as an exported program of aten operators, for inference.

    Later changes of the model, of alpha for example, do not reach it. A fused model is exported as it was before
    fusion: compilers fuse by themselves. Standard operators have no backward of a model's own: where the model has one,
    a warning says that the program's gradients are others.

    Args:
        sparse: What `transform` returned, with statistics, in eval mode.
        images: ``[N, ...]``, example inputs on the model's device.
        dynamic_batch: Take any number of images; otherwise N, as many as ``images``.

    Raises:
        StateError: The model is not transformed, has no statistics, or is in train mode.
        CaptureError: The model cannot be exported so.

    Example:
        >>> import torch, meansparse_fx as msfx
        >>> from meansparse_fx.export import to_exported_program
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.GELU()).eval()
        >>> images = torch.rand(8, 1, 8, 8)
        >>> sparse = msfx.transform(net, images)
        >>> stats = msfx.calibrate(sparse, [images], progress=False)
        >>> msfx.set_alpha(sparse, 0.2)
        >>> program = to_exported_program(sparse, images)
        >>> torch.allclose(program.module()(images[:3]), sparse(images[:3]), atol=1e-6)
        True
    """
    require_transformed(sparse, "export", calibrated=True)
    baked, images = _baked(sparse), examples(images, sparse)
    # With one image torch.export would take the batch size for a constant.
    example = images if len(images) > 1 or not dynamic_batch else torch.cat([images, images])
    shapes = ({0: Dim("batch", min=1)},) if dynamic_batch else None
    try:
        with torch.no_grad():
            program = torch.export.export(baked, (example,), dynamic_shapes=shapes)
    except Exception as error:  # torch raises many kinds; each names the line of the model it failed at
        advice = "; dynamic_batch=False may be what it can do" if dynamic_batch else ""
        if "not a known type" in str(error):
            advice = "; torch.export.register_dataclass first what it returns, and wherever a file of it is read"
        raise CaptureError(f"torch.export cannot take this model{advice}: {error}") from error
    if lost := own_derivatives(sparse):
        warnings.warn(
            f"exported for inference: {', '.join(lost)} would give the model other gradients than standard operators "
            "do, and is not in the program. Differentiate the model itself",
            stacklevel=2,
        )
    return program


def export(
    sparse: fx.GraphModule, images: Tensor, path: str | Path, format: str = "export", dynamic_batch: bool = True
) -> Path:
    """Write a transformed model to a file for deployment, its statistics and alpha baked in; return the path.

    Args:
        sparse: What `transform` returned, with statistics, in eval mode.
        images: ``[N, ...]``, example inputs on the model's device.
        path: File to write; written whole or not at all.
        format: ``export``: a ``.pt2`` that `torch.export.load` reads. ``aoti``: machine code for this machine's kind of
            device, a ``.pt2`` for `torch._inductor.aoti_load_package` or C++. ``onnx``: an ``.onnx``, input ``images``
            and output ``logits``.
        dynamic_batch: Take any number of images; otherwise N, as many as ``images``.

    Raises:
        ArtifactError: Unknown format, wrong suffix, missing packages, or an operator that the format lacks.
        StateError, CaptureError: As `to_exported_program`.
    """
    path = Path(path)
    require_file(path, format)
    program = to_exported_program(sparse, images, dynamic_batch)

    def write(place: Path) -> None:
        try:
            _WRITERS[format](program, place)
        except RuntimeError as error:
            if "PytorchStreamWriter" not in str(error):  # torch's OSError
                raise
            raise OSError(first_line(error)) from error

    write_whole(path, write)
    return path


def require_file(path: Path, format: str) -> None:
    """Raise ArtifactError, before the work is done, where a file of that format cannot be written."""
    if format not in FORMATS:
        raise ArtifactError(f"no export format {format!r}: use one of {', '.join(FORMATS)}")
    if path.suffix != FORMATS[format]:
        others = [f"; format {name!r} ends in {suffix}" for name, suffix in FORMATS.items() if suffix == path.suffix]
        raise ArtifactError(f"{path}: a file of format {format!r} ends in {FORMATS[format]}{''.join(others)}")
    require_place(path)


class _Called(nn.Module):
    """Calls a model with its hooks, of which torch.export takes the forward alone, and keeps the type of its result."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, images: Tensor) -> Any:
        return self.model(images)


def _baked(sparse: fx.GraphModule) -> nn.Module:
    """Return a copy whose operators keep what the kernel reads, and nothing that it is made of."""
    own = sharing_copy(sparse)
    baked = copied(own)
    # Each tensor in a storage of its own, in the one layout that torch.export.save writes without a warning: weights
    # may be views of a file, and channels-last.
    baked._apply(lambda tensor: tensor.detach().clone(memory_format=torch.contiguous_format))
    for operator in operators(baked).values():
        del operator.mean, operator.std, operator.alpha, operator.gate_steepness
        operator.backward = "exact"  # the other modes' forward is longer, and its result the same
    (output,) = own.graph.find_nodes(op="output")
    return _Called(baked) if has_hooks(baked) or not isinstance(output.args[0], fx.Node) else baked


def _write_export(program: ExportedProgram, path: Path) -> None:
    try:
        torch.export.save(program, path)
    except NotImplementedError as error:
        raise ArtifactError(f"torch.export.save cannot write what the model returns: {error}") from error


def _write_onnx(program: ExportedProgram, path: Path) -> None:
    if missing := [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]:
        raise ArtifactError(f"ONNX export needs {' and '.join(missing)}: pip install 'meansparse_fx[onnx]'")
    size = sum(t.numel() * t.element_size() for t in program.state_dict.values())
    if size > _ONNX_LIMIT:
        raise ArtifactError(f"{size / 2**30:.1f} GiB of weights: an ONNX file holds 2 GiB at most; use another format")
    try:
        batch = ({0: "batch"},) if program.range_constraints else None
        spec = program.call_spec.out_spec
        outputs = names(spec.unflatten(range(spec.num_leaves)))
        outputs = ["logits"] if outputs == [""] else [f"output_{n}" if n.isdigit() else n for n in outputs]
        model = torch.onnx.export(
            program, input_names=["images"], output_names=outputs, dynamic_shapes=batch, verbose=False
        )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ArtifactError(f"torch.onnx cannot express this model: {error}") from error
    assert model is not None
    model.save(path, external_data=False)


_WRITERS: dict[str, Callable[[ExportedProgram, Path], object]] = {
    "export": _write_export,
    "aoti": lambda program, path: torch._inductor.aoti_compile_and_package(program, package_path=str(path)),
    "onnx": _write_onnx,
}
