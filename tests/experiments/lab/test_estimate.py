"""Times that are read off programs for TPUs equal those by hand."""

from collections import Counter

import pytest

from experiments.lab.planning.chips import CHIPS, Chip
from experiments.lab.planning.estimate import cycles
from experiments.lab.planning.step import Step


def test_cycles_of_a_tpu_program_by_hand():
    text = """
%fused (p: f32[8]) -> f32[8] {
  %inside = f32[8]{0} add(%p, %p), backend_config={"estimated_cycles":"1000"}
}

%windowed_body (p: (s32[])) -> (s32[]) {
  %dot = f32[8]{0} fusion(%p), calls=%fused, metadata={op_name="jit(step)/dot"}, backend_config={"estimated_cycles":"5"}
}

%windowed_condition (p: (s32[])) -> pred[] {
  %two = u32[]{:T(128)} constant(2)
  ROOT %lt = pred[] compare(%i, %two), direction=LT
}

%body (p: (s32[])) -> (s32[]) {
  %dot.1 = f32[8]{0} fusion(%p), metadata={op_name="jit(step)/dot"}, backend_config={"estimated_cycles":"10"}
  %inner = (s32[]) while(%dot.1), condition=%windowed_condition, body=%windowed_body
}

%condition (p: (s32[])) -> pred[] {
  %seven = s32[]{:T(128)} constant(7)
  ROOT %lt = pred[] compare(%i, %seven), direction=LT
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %add = f32[8]{0} fusion(%p), calls=%fused, metadata={op_name="jit(step)/add"}, backend_config={"estimated_cycles":"3"}
  ROOT %loop = (s32[]) while(%add), condition=%condition, body=%body
}
"""
    # What is inside a fusion is part of the estimate of the fusion.
    assert cycles(text, CHIPS["v5e"], 1) == {"add": 3, "dot": 7 * 10, "windowed dot": 7 * 2 * 5}
    step = Step({"fsdp": 1}, {}, 0.1 * 197e12, 0, Counter(), "v5e", cycles=Counter(dot=300_000_000))
    assert step.estimated == pytest.approx(0.2) and step.share == pytest.approx(0.5)
    assert step._replace(cycles=Counter()).share is None


def test_both_branches_of_a_conditional_count():
    text = """
%near (p: f32[8]) -> f32[8] {
  %a = f32[8]{0} fusion(%p), metadata={op_name="jit(step)/near"}, backend_config={"estimated_cycles":"5"}
}

%far.2 (p: f32[8]) -> f32[8] {
  %b = f32[8]{0} fusion(%p), metadata={op_name="jit(step)/far"}, backend_config={"estimated_cycles":"70"}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %c = f32[8]{0} conditional(%q, %p, %p), BRANCHES, metadata={op_name="jit(step)/a, b"}
}
"""
    for branches in ("branch_computations={%near, %far.2}", "true_computation=%near, false_computation=%far.2"):
        assert cycles(text.replace("BRANCHES", branches), CHIPS["v5e"], 1) == {"near": 5, "far": 70}


# Sends 3/4 of 4 kB = 3 kB a gather, in 3 cycles at 1 kB a cycle; the all-reduce sends 6 kB.
_WAITS = """
%start (p: f32[256]) -> f32[1024] {
  %gather.1 = f32[1024]{0} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[8]
  ROOT %call = (f32[256]{0}, f32[1024]{0}) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.3 (p: f32[256]) -> f32[1024] {
  %gather.2 = f32[1024]{0} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[8]
}

%done (p: f32[256]) -> f32[1024] {
  %gather.3 = f32[1024]{0} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[8]
  ROOT %call = f32[1024]{0} custom-call(%gather.3), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (p: f32[256]) -> f32[1024] {
  %a = f32[1024]{0} fusion(%p), calls=%start
  %b = f32[1024]{0} fusion(%a), calls=%async_collective_fusion.3, backend_config={"estimated_cycles":"BESIDE"}
  %c = f32[1024]{0} fusion(%b), calls=%done
  %d = f32[1024]{0} all-reduce(%c), channel_id=8, replica_groups=[2,4]<=[8]
  %e = (f32[256]{0}, f32[1024]{0}) all-gather-start(%c), channel_id=9, replica_groups=[2,4]<=[8]
  ROOT %f = f32[1024]{0} all-gather-done(%e)
}
"""


@pytest.mark.parametrize(("beside", "gathers"), [(2, 1 + 3), (3, 3), (5, 3)])
def test_a_program_waits_for_links_that_its_products_do_not_hide(beside, gathers):
    chip = Chip(1.0, 1.0, 1.0, link=1024.0, island=8, network=64.0, source="", clock=1.0)
    text = _WAITS.replace("BESIDE", str(beside))
    counts = cycles(text, chip, 8)
    assert counts == {"?": beside, "links all-gather": gathers, "links all-reduce": 6}
    # Sixteen devices send over the network, at a sixteenth of the rate.
    assert cycles(text, chip, 16)["links all-reduce"] == 16 * 6
    step = Step({"fsdp": 8}, {}, 0.0, 0, Counter(), "v5e", cycles=counts)
    assert step.waits == pytest.approx((gathers + 6) / CHIPS["v5e"].clock)


_KERNEL = """
ENTRY %main (p: f32[8]) -> f32[8] {
  %x = f32[8]{0} add(%p, %p), backend_config={"estimated_cycles":"1"}
  %splash_mha_NAME_segmented.1 = (RESULTS, f32[4,8,256]{2,1,0})\
 custom-call(%p, %p),\
 custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,1,1]{2,1,0}, bf16[4,8,256,64]{3,2,1,0},\
 bf16[4,8,512,64]{3,2,1,0}, bf16[4,8,512,64]{3,2,1,0}}, frontend_attributes={kernel_metadata={
}}, metadata={op_name="jit(step)/splash/pallas_call"}
}
"""


@pytest.mark.parametrize(("name", "results", "products"), [("fwd", 1, 2), ("dkv", 3, 5), ("dkv", 2, 4), ("dq", 1, 3)])
def test_a_kernel_takes_its_products_or_its_bytes(name, results, products):
    result, chip = "bf16[4,8,256,64]{3,2,1,0:T(8,128)(2,1)S(1)}", CHIPS["v5e"]
    text = _KERNEL.replace("NAME", name).replace("RESULTS", ", ".join([result] * results))
    # The width of 64 fills half of the matrix unit of 128 x 128.
    flops = products * 2 * 4 * 8 * 256 * 512 * 128
    counts = cycles(text, chip, 1)
    assert counts == {"?": 1, f"kernel splash_mha_{name}_segmented": round(flops / chip.flops * chip.clock)}
    moved = 1 + 2 * ((1 + results) * 4 * 8 * 256 * 64 + 2 * 4 * 8 * 512 * 64) + 4 * 4 * 8 * 256
    slow = cycles(text, chip._replace(bandwidth=1e9), 1)
    assert slow[f"kernel splash_mha_{name}_segmented"] == round(moved / 1e9 * chip.clock)
    # Of a kernel without a name that is known here, only bytes count.
    other = cycles(text.replace("splash_mha", "other"), chip, 1)
    assert other[f"kernel other_{name}_segmented"] == round(moved / chip.bandwidth * chip.clock)
