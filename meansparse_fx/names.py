"""Floor 1: what can be asked for by name, and what is tried if nothing is. The tables are in the rooms; tests compare.

Imports nothing, so that the command line can help and refuse without waiting for torch.
"""

from __future__ import annotations

SPECS = "timm:NAME, torchvision:NAME, robustbench:Linf/cifar10/NAME, path/to/file.py:function, or bundled"
SOURCES = ("timm", "torchvision", "robustbench")
PLACEMENTS = (
    "activations", "robustbench:wrn", "robustbench:rawrn", "robustbench:swin", "robustbench:convnext",
    "robustbench:rawrn-imagenet",
)  # fmt: skip
FORMATS = {"export": ".pt2", "aoti": ".pt2", "onnx": ".onnx"}  # of exported files, with their suffixes
VARIANTS = ("mean", "edge", "smooth")
AUTOCAST = ("float16", "bfloat16")
NORMS = ("Linf", "L2")

ATTACKS = (
    "apgd-ce", "apgd-nearest", "apgd-dlr", "apgd-margin", "apgd-t", "fab", "fab-t", "square", "pgd", "adaptive-1-1",
    "adaptive-2-2", "apgd-ce-r5", "apgd-dlr-r5", "apgd-ce-eot20", "apgd-dlr-eot20", "apgd-start",
)  # fmt: skip
VERSIONS = ("adaptive", "standard", "plus", "rand")  # lists of attacks
ATTACK_NAMES = (*ATTACKS, *VERSIONS)
SURROGATES = ("exact", "identity", "smooth", "annealed")

# Mean and deviation per colour that most ImageNet weights were trained with.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
ALPHAS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5)
# What finds most for its steps; Square, targets and starts at another model's images are left to `evaluate`.
SEARCH_ATTACKS = ("apgd-ce/exact", "apgd-ce/identity", "apgd-margin/annealed", "apgd-ce/annealed")
DEFAULT_ATTACKS = ("adaptive",)
CLEAN_BUDGET = 0.003  # as a fraction of the images
