"""Figures of a plan equal counts by hand on small programs and the arrays of a real step."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec, get_mesh

import distill
from antgmm_jax.axes import sizes
from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.convert import load_hf
from antgmm_jax.io.placed import on_devices
from antgmm_jax.parallel.sharding import make_mesh
from antgmm_jax.presets import preset
from antgmm_jax.pure import functional
from experiments.lab.planning import compilers
from experiments.lab.planning import step as planning
from experiments.lab.planning.chips import CHIPS, Chip
from experiments.lab.planning.collectives import sent
from experiments.lab.planning.compilers import slice_of
from experiments.lab.planning.step import Step, StepSpec, check, compiled, roofline, smallest, stays, step_flops
from pruning.costs import forward_flops, total_parameters
from tests import reference
from tests.families.cases import config_with
from tests.pruning.models import CONFIGS, randomised

ROOT = Path(__file__).resolve().parents[3]
CONFIG = CONFIGS["blip2_t5"]
DECODER = CONFIGS["llava"]
"""It compiles in a quarter of the time."""
ONE, TWO = ({"data": 1, "fsdp": fsdp, "tensor": 1} for fsdp in (1, 2))
MESH = {"data": 1, "fsdp": 4, "tensor": 2}


def spec(config=CONFIG, batch=8):
    return StepSpec(config, config, batch, length=config.image_tokens + 4, answer=8)


@pytest.mark.parametrize("name", [("idefics3", "smolvlm"), ("qwen3_vl", "one merger, tied")])
def test_more_tiles_or_larger_pictures_are_counted_in_batches_and_products(name):
    config = config_with(*name)
    few = StepSpec(config, config, 8, 4 * config.usual_tokens, 6)
    many = few._replace(slots=3 * config.slots)
    # Pixels, float32 scale and offset of each channel, whether the slot is used, and where it is.
    place = 0 if config.usual_place is None else config.usual_place.shape[1]
    slot = config.vision.channels * (config.side**2 + 8) + 1 + 4 * place
    assert stays(many, ONE) - stays(few, ONE) == 8 * 2 * config.slots * slot
    passes = [forward_flops(config, 8, few.length + 6, logits=6, slots=n * config.slots) for n in (1, 3)]
    assert step_flops(many) - step_flops(few) == 4 * (sum(passes[1].values()) - sum(passes[0].values()))
    check(many)
    with pytest.raises(AntgmmError, match=f"the images alone take {4 * config.usual_tokens} tokens"):
        check(few._replace(slots=4 * config.slots))


@pytest.mark.parametrize("config", [CONFIG, DECODER], ids=["encoder and decoder", "decoder"])
def test_the_products_of_a_step_are_those_of_all_its_tokens_without_stored_features(config):
    """A decoder alone reads the answers behind the prompts."""
    step = spec(config)
    lengths = (step.length, step.answer) if config.encoder_decoder else (step.length + step.answer,)
    once = forward_flops(config, step.batch, *lengths, logits=step.answer)
    assert step_flops(step) == 4 * sum(once.values())
    assert step_flops(step._replace(source="cache")) == 3 * sum(once.values())
    stored = once["vision"] + once["bridge"]
    assert step_flops(step) - step_flops(step._replace(features=True)) == 3 * stored > 0


def program(function, *arguments):
    with jax.set_mesh(make_mesh(**MESH)):
        placed = [
            jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(get_mesh(), PartitionSpec(*parts)))
            for shape, parts in arguments
        ]
        return jax.jit(function).lower(*placed).compile().as_text()


def test_a_product_of_split_halves_is_one_all_reduce():
    text = program(lambda a, b: a @ b, ((16, 64), (None, "tensor")), ((64, 32), ("tensor", None)))
    # Each of 2 devices sends half of 16 x 32 floats twice.
    assert sent(text, 8) == {("all-reduce", 2): 2 * 16 * 32 * 4 // 2}


def test_bytes_sent_in_a_loop_count_every_iteration():
    def loop(x, weights):
        def turn(x, weight):
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ weight), PartitionSpec()), None

        return jax.lax.scan(turn, x, weights)[0]

    text = program(loop, ((16, 64), ()), ((7, 64, 64), (None, None, "fsdp")))
    # In each of 7 iterations each of 4 devices sends three quarters of 16 x 64 floats.
    assert sent(text, 8) == {("all-gather", 4): 7 * 16 * 64 * 4 * 3 // 4}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("%a = f32[8]{0} all-gather(%x), replica_groups={{0,1},{2,3}}, dimensions={0}", {("all-gather", 2): 16}),
        ("%a = bf16[8]{0} reduce-scatter(%x), replica_groups=[2,4]<=[8]", {("reduce-scatter", 4): 48}),
        ("%a = (f32[2]{0}, f32[6]{0}) all-reduce(%x, %y), replica_groups={}", {("all-reduce", 8): 56}),
        ("%a = s8[8]{0} all-to-all(%x), replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", {("all-to-all", 2): 4}),
        (
            "%a = f32[8]{0} all-reduce(%x), replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}",
            {("all-reduce", 4): 48},
        ),
        ("%a = f32[8]{0} collective-permute(%x), source_target_pairs={{0,1}}", {("collective-permute", 8): 32}),
        # Starts of asynchronous collectives also return their operands, and contexts.
        ("%a = (f32[2]{0}, f32[8]{0}) all-gather-start(%x), replica_groups=[2,4]<=[8]", {("all-gather", 4): 24}),
        ("%a = f32[8]{0} all-reduce-start(%x), replica_groups=[2,4]<=[8]", {("all-reduce", 4): 48}),
        (
            "%a = ((f32[8]{0}, f32[4]{0}), (f32[2]{0}, f32[1]{0})) reduce-scatter-start(%x), replica_groups=[2,4]<=[8]",
            {("reduce-scatter", 4): 36},
        ),
        (
            "%a = (f32[8], f32[8], u32[]{:S(2)}, u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}",
            {("collective-permute", 8): 32},
        ),
    ],
)
def test_sent_reads_all_operations_and_group_notations(line, expected):
    assert sent(f"ENTRY %main (p: f32[8]) -> f32[8] {{\n  {line}\n}}\n", 8) == expected


def test_what_a_tpu_program_repeats_counts_once():
    text = """
%start (p: f32[2]) -> f32[8] {
  %gather.1 = f32[8]{0} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[8]
  ROOT %call = (f32[2]{0}, f32[8]{0}) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.3 (p: f32[2]) -> f32[8] {
  %gather.2 = f32[8]{0} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[8]
}

%done (p: f32[2]) -> f32[8] {
  %gather.3 = f32[8]{0} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[8]
  ROOT %call = (f32[2]{0}, f32[8]{0}) custom-call(%gather.3), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.5 (p: f32[8]) -> f32[2] {
  %all-reduce = f32[8]{0} all-reduce(%p), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %slice = f32[2]{0} dynamic-slice(%all-reduce)
}

ENTRY %main (p: f32[2]) -> f32[8] {
  %a = f32[8]{0} fusion(%p), calls=%start
  %b = f32[8]{0} fusion(%a), calls=%async_collective_fusion.3
  %c = f32[8]{0} fusion(%b), calls=%done
  ROOT %d = f32[2]{0} fusion(%c), calls=%all-reduce-scatter.5
}
"""
    # Three quarters of 8 floats each: an all-reduce and a slice send what a reduce-scatter sends.
    assert sent(text, 8) == {("all-gather", 4): 24, ("reduce-scatter", 4): 24}


def clean(tmp_path):
    """Environment of a process without the settings of the tests."""
    folders = [ROOT, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(str(folder) for folder in folders if folder),
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


def test_a_chip_without_its_compiler_is_refused_with_the_remedy(refused, monkeypatch):
    monkeypatch.setattr(compilers, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "path", [*sys.path])  # the check adds the folder of compilers
    plan = ("plan", "--preset", "llava-tiny", "--batch", "8", "--mesh", "fsdp=4", "--chip")
    assert refused(*plan, "v5e") == (
        "--chip v5e: its compiler is not installed: .venv/bin/pip install -e '.[plan]' -c constraints.txt"
        " (or add --compiler cpu)"
    )
    assert f"pip install --no-deps --target {compilers.folder()} jax-cuda12-plugin==" in refused(*plan, "H100")


def test_slices_follow_from_the_number_of_chips():
    assert [slice_of("v5e", count) for count in (1, 4, 16, 256)] == ["1x1", "2x2", "4x4", "16x16"]
    assert [slice_of("v5p", count) for count in (4, 16, 512)] == ["2x2x1", "2x2x4", "8x8x8"]
    assert [slice_of("H100", count) for count in (1, 8, 16)] == ["1x1x1", "1x1x8", "1x2x8"]
    with pytest.raises(AntgmmError, match="6 v5e: slices have 1, 4, 8, 16, 32, 64, 128, 256 chips"):
        slice_of("v5e", 6)
    with pytest.raises(AntgmmError, match="9 H100: use a multiple of 8"):
        slice_of("H100", 9)
    with pytest.raises(AntgmmError, match="slices have"):
        slice_of("v6e", 512)


_PRODUCTS = """
import jax, jax.numpy as jnp
from experiments.lab.planning import compilers
from experiments.lab.planning.chips import CHIPS
from experiments.lab.planning.estimate import cycles

compilers.only_compile()
for chip in ("v5e", "v5p", "v6e"):
    compilers.check(chip)
    [device] = compilers.devices(chip, 4)[:1]
    assert device.device_kind == CHIPS[chip].kind
    assert chip == "v5p" or len(compilers.devices(chip, 1)) == 1
    where = jax.sharding.SingleDeviceSharding(device)
    shapes = ((4096, 4096), (4096, 16384), (16384, 4096))
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=where) for shape in shapes]
    loop = jax.jit(lambda x, up, down: jax.lax.fori_loop(0, 10, lambda i, x: x @ up @ down, x))
    seconds = sum(cycles(loop.lower(*arrays).compile().as_text(), CHIPS[chip], 1).values()) / CHIPS[chip].clock
    print(10 * 2 * 2 * 4096**2 * 16384 / CHIPS[chip].flops / seconds)
"""


@pytest.mark.long
def test_products_in_a_loop_run_near_the_peak_by_the_estimate_of_the_tpus_compiler(tmp_path):
    command = [sys.executable, "-c", _PRODUCTS]
    done = subprocess.run(command, cwd=tmp_path, env=clean(tmp_path), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shares = [float(line) for line in done.stdout.split()]
    assert len(shares) == 3 and all(0.8 < share < 1.02 for share in shares)


@pytest.mark.long
@pytest.mark.parametrize(("chip", "mesh"), [("v5e", "fsdp=4"), ("H200", "fsdp=2")])  # H100s have the same compiler
def test_a_step_is_compiled_for_a_chip_that_is_not_there(tmp_path, chip, mesh):
    if chip != "v5e" and not (compilers.folder() / "jax_plugins").is_dir():
        pytest.skip("make cuda-compiler installs what this test needs")
    words = ["plan", "--preset", "llava-tiny", "--batch", "8", "--mesh", mesh, "--chip", chip, "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.cli", *words],
        cwd=tmp_path,
        env=clean(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    devices = {"fsdp=4": 4, "fsdp=2": 2}[mesh]
    # Widths are split over all devices; a few parameters are too small for that.
    parameters = total_parameters(preset("llava-tiny"))
    assert 4 * parameters / devices <= figures["memory"]["parameters"] < 1.2 * 4 * parameters / devices
    # Every device gathers what the others hold, in bfloat16: once forwards and once backwards for the student.
    assert figures["sent"]["all-gather"] > 2 * 2 * 0.9 * parameters * (devices - 1) / devices
    seconds = figures["chips"][chip]["estimated"]
    assert (seconds is None) == (chip != "v5e")
    assert seconds is None or seconds > figures["chips"][chip]["seconds"]["compute"]
    assert seconds is None or 0 < figures["chips"][chip]["waits"] < seconds


@pytest.fixture(scope="module")
def steps():
    """The compiled steps for one, two and eight devices."""
    return {devices: compiled(spec(DECODER), mesh) for devices, mesh in ((1, ONE), (2, TWO), (8, MESH))}


@pytest.mark.long
def test_memory_equals_the_arrays_of_a_real_step(steps):
    step = steps[8]
    optimizer = distill.make_optimizer(distill.OptimizerConfig(learning_rate=1e-3), steps=1)
    with jax.set_mesh(make_mesh(**MESH)):
        state = distill.shard_state(
            distill.init_state(on_devices(DECODER, randomised(DECODER), "float32"), optimizer),
            functional(DECODER).axes,
            optimizer,
        )

    def here(tree):
        shards = [leaf.addressable_shards[0].data for leaf in jax.tree.leaves(tree)]
        return sum(shard.size * shard.dtype.itemsize for shard in shards)

    assert step.memory["parameters"] == here(state.params)
    assert step.memory["teacher"] == step.memory["parameters"] // 2
    assert step.memory["moments"] == here(state.opt_state)
    assert step.memory["temporaries"] > 0


@pytest.mark.long
def test_flops_are_divided_among_the_devices(steps):
    assert steps[1].flops == pytest.approx(8 * steps[8].flops)
    assert not steps[1].sent and sum(steps[8].sent.values()) > 0


@pytest.mark.long
def test_the_smallest_mesh_is_the_first_that_fits(steps, monkeypatch):
    tried = []

    def known(spec, mesh, chip):
        assert not chip
        tried.append(mesh["fsdp"])
        return steps[mesh["fsdp"]]

    monkeypatch.setattr(planning, "compiled", known)
    assert steps[2].total < steps[1].total
    other = {"data": 2, "fsdp": 1, "tensor": 1}
    assert smallest(spec(DECODER), other, steps[1].total - 1) == steps[2]
    assert tried == [1, 2]
    # The parameters alone exceed the memory, so nothing is compiled.
    assert smallest(spec(DECODER), other, steps[1].memory["teacher"]) is None
    assert tried == [1, 2]
    # The mesh that was already refused is not compiled again.
    assert smallest(spec(DECODER), ONE, steps[1].total - 1) == steps[2]
    assert tried == [1, 2, 2]


def test_the_roofline_by_hand():
    chip = Chip(100.0, 1.0, 10.0, link=4.0, island=8, network=1.0, source="")
    step = Step({"data": 1, "fsdp": 8, "tensor": 2}, {}, 500.0, 30, {("all-gather", 8): 8, ("all-reduce", 2): 4})
    # 16 devices: the tensor pairs are neighbours, the groups of 8 leave the island.
    assert roofline(step, chip) == {"compute": 5.0, "memory": 3.0, "links": 8 / 1.0 + 4 / 4.0}
    assert roofline(step._replace(mesh={"fsdp": 8}), chip)["links"] == 12 / 4.0


def test_a_prompt_shorter_than_the_image_tokens_is_refused():
    with pytest.raises(AntgmmError, match="--length 3: the images alone take"):
        check(spec()._replace(length=CONFIG.image_tokens))


def test_a_plan_is_printed_or_refused_with_a_sufficient_mesh(antgmm, refused, monkeypatch):
    def fake(spec, mesh, chip):
        compiled_for.append((chip, sizes(spec.student)))
        memory = {"teacher": 10 // mesh["fsdp"], "temporaries": 6}
        return Step(dict(mesh), memory, 2e12, 100, Counter({("all-gather", 4): 8, ("all-gather", 2): 4}))

    monkeypatch.setattr(planning, "compiled", fake)
    monkeypatch.setattr(planning, "_kept", lambda arguments: {"teacher": 1})
    compiled_for = []
    monkeypatch.setattr(compilers, "check", lambda chip: None)
    plan = ("plan", "--preset", "antgmm-tiny", "--batch", "8", "--length", "24", "--answer", "8")
    figures = json.loads(antgmm(*plan, "--mesh", "fsdp=2", "--json").stdout)
    assert figures["memory"] == {"teacher": 5, "temporaries": 6, "total": 11}
    assert figures["sent"] == {"all-gather": 12}
    assert figures["chips"].keys() == CHIPS.keys() and all(each["fits"] for each in figures["chips"].values())
    assert figures["chips"]["H100"]["seconds"]["compute"] == pytest.approx(2e12 / 989e12)
    shown = antgmm(*plan, "--mesh", "fsdp=2").stdout
    assert "Milliseconds per step" in shown and "Compiled with the CPU's compiler" in shown
    figures = json.loads(antgmm(*plan, "--mesh", "fsdp=4", "--chip", "v5e", "--size", "text/embed=96", "--json").stdout)
    assert figures["compiler"] == "own" and figures["chips"].keys() == {"v5e"}
    antgmm(*plan, "--mesh", "fsdp=4", "--chip", "v5e", "--compiler", "cpu", "--size", "encoder/mlp=0.5")
    assert [chip for chip, _ in compiled_for] == ["", "", "v5e", ""]
    assert compiled_for[2][1]["text/embed"] == 96 and compiled_for[3][1]["encoder/mlp"] == 256
    assert refused(*plan, "--size", "text/embed=900").startswith("text/embed = 900 would enlarge the axis")
    monkeypatch.setitem(CHIPS, "H100", CHIPS["H100"]._replace(memory=8.0))
    error = refused(*plan, "--mesh", "fsdp=2", "--chip", "H100")
    assert error.endswith("more than H100 has; the smallest sufficient mesh is --mesh fsdp=4 (8e-09 GB)")
    monkeypatch.setitem(CHIPS, "H100", CHIPS["H100"]._replace(memory=6.0))
    error = refused(*plan, "--mesh", "fsdp=2", "--chip", "H100")
    remedy = "increase tensor, or reduce --batch, --length or --answer"
    assert error.endswith(f"no mesh with this tensor size and batch is sufficient: {remedy}")
    assert refused(*plan, "--chip", "v9") == "--chip v9: choose one of v5e, v5p, v6e, H100, H200"
    assert refused(*plan, "--mesh", "fsdp=1024") == "--mesh fsdp=1024: at most 512 devices are supported"
    assert refused(*plan, "--student", "antgmm-deep").startswith("the student's ")


@pytest.mark.long
def test_a_checkpoint_is_planned_by_a_process_that_starts_with_one_device(tmp_path):
    model = reference.saved(reference.llava(), tmp_path / "model")
    words = ["plan", str(model), "--mesh", "data=2", "--batch", "2", "--length", "8", "--answer", "2", "--json"]
    command = [sys.executable, "-m", "experiments.cli", *words]
    # Without the settings of the tests: the command must make its own.
    done = subprocess.run(command, cwd=ROOT, env=clean(tmp_path), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["mesh"] == {"data": 2, "fsdp": 1, "tensor": 1}
    # Rows are split and parameters are not: every device holds all parameters in float32, and gradients are summed
    # (a few parameters have none).
    parameters = sum(leaf.size for leaf in jax.tree.leaves(load_hf(model)[1]))
    assert figures["memory"]["parameters"] == 4 * parameters
    assert figures["sent"]["all-reduce"] > 0.99 * 4 * parameters
