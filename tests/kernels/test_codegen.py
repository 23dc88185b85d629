"""The machine code, held without a GPU: no spills, 128-bit accesses, no division of its own for each element."""

from __future__ import annotations

import re

import pytest


@pytest.fixture(scope="module")
def codes() -> list[dict]:
    pytest.importorskip("triton")
    from benchmarks import codegen

    asked = codegen.cases(["sm_90"], ["relu", "gelu", "silu"], ["fp32", "bf16"])
    return [codegen.read_code(case) for case in asked]


def label(code: dict) -> str:
    return " ".join(str(code[k]) for k in ("kernel", "activation", "variant", "backward", "dtype", "layout", "target"))


@pytest.mark.slow
def test_no_spills(codes) -> None:
    assert [label(c) for c in codes if c["spilled_bytes"]] == []


@pytest.mark.slow
def test_every_tensor_moves_in_128_bits(codes) -> None:
    for code in codes:
        accesses = code["elements_per_thread"] * (4 if code["dtype"] == "fp32" else 2) // 16
        reads, writes = code["streams"]
        assert code["loads"][128] >= reads * accesses, label(code)
        assert code["stores"].get(128, 0) == writes * accesses, label(code)


@pytest.mark.slow
def test_only_activations_divide(codes) -> None:
    own = {"silu": 1}  # the sigmoid's
    for code in codes:
        # The smooth gate's sigmoid, and where a vector has several channels the gate's threshold.
        gates = (code["variant"] == "smooth") + (code["backward"] == "smooth")
        gates *= 1 if code["layout"] == "rows" else 2
        # Below one half: the divisions of a program or of a row, over its elements.
        assert code["reciprocals_per_element"] < own.get(code["activation"], 0) + gates + 0.4, label(code)


@pytest.mark.slow
def test_relu_waits_for_memory(codes) -> None:
    # By its datasheet (4.8 TB/s, 132 multiprocessors of 128 lanes at 1.98 GHz) an H200 issues 62 instructions while one
    # float32 element is read and written at 90% of its bandwidth; 31 for bfloat16.
    for code in codes:
        if code["activation"] == "relu" and code["kernel"] in ("forward", "backward"):
            plain = code["variant"] == "mean" and code["backward"] == "exact"
            assert code["instructions_per_element"] < (22 if plain else 55), label(code)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["forward+norm+residual", "backward+norm+residual", "moments+activation"])
@pytest.mark.parametrize("form", ["rows", "columns"])
def test_offsets_beyond_2_to_31_are_of_64_bits(kernel, form, monkeypatch) -> None:
    """And no product of 32 bits, which may have overflowed, is widened."""
    pytest.importorskip("triton")
    from benchmarks import codegen

    for shape, bits in (((64, 256, 56, 56), 32), ((2100, 1000, 32, 32), 64)):
        monkeypatch.setitem(codegen.LAYOUTS, form, shape)
        ir = codegen.compile_case(codegen.Case(kernel, "relu", "bf16", form, "sm_90")).asm["ttir"]
        accesses = re.findall(r"tt\.addptr .*: tensor<\S*!tt\.ptr<bf16>>, tensor<\S*x(i\d+)>", ir)
        assert accesses
        assert set(accesses) == {f"i{bits}"}
        makers = dict(re.findall(r"(%\w+)(?::\d+)? = (\S+)", ir))
        widened = {makers.get(name) for name in re.findall(r"arith\.extsi (%\w+) : tensor", ir)}
        assert "arith.muli" not in widened
