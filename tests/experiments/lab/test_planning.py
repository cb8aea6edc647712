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
from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.convert import load_hf
from antgmm_jax.io.placed import on_devices
from antgmm_jax.parallel.sharding import make_mesh
from antgmm_jax.pure import functional
from experiments.lab.planning import step as planning
from experiments.lab.planning.chips import CHIPS, Chip
from experiments.lab.planning.collectives import sent
from experiments.lab.planning.step import Step, StepSpec, check, compiled, roofline, smallest
from tests import reference
from tests.pruning.models import CONFIGS, randomised

ROOT = Path(__file__).resolve().parents[3]
CONFIG = CONFIGS["blip2_t5"]
ONE, TWO = ({"data": 1, "fsdp": fsdp, "tensor": 1} for fsdp in (1, 2))
MESH = {"data": 1, "fsdp": 4, "tensor": 2}


def spec(config=CONFIG, batch=8):
    return StepSpec(config, config, batch, length=config.image_tokens + 4, answer=8)


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
    ],
)
def test_sent_reads_all_operations_and_group_notations(line, expected):
    assert sent(f"ENTRY %main (p: f32[8]) -> f32[8] {{\n  {line}\n}}\n", 8) == expected


@pytest.fixture(scope="module")
def steps():
    """The compiled steps for one, two and eight devices."""
    return {devices: compiled(spec(), mesh) for devices, mesh in ((1, ONE), (2, TWO), (8, MESH))}


@pytest.mark.long
def test_memory_equals_the_arrays_of_a_real_step(steps):
    step = steps[8]
    optimizer = distill.make_optimizer(distill.OptimizerConfig(learning_rate=1e-3), steps=1)
    with jax.set_mesh(make_mesh(**MESH)):
        state = distill.shard_state(
            distill.init_state(on_devices(CONFIG, randomised(CONFIG), "float32"), optimizer),
            functional(CONFIG).axes,
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

    def known(spec, mesh):
        tried.append(mesh["fsdp"])
        return steps[mesh["fsdp"]]

    monkeypatch.setattr(planning, "compiled", known)
    assert steps[2].total < steps[1].total
    other = {"data": 2, "fsdp": 1, "tensor": 1}
    assert smallest(spec(), other, steps[1].total - 1) == steps[2]
    assert tried == [1, 2]
    # The parameters alone exceed the memory, so nothing is compiled.
    assert smallest(spec(), other, steps[1].memory["teacher"]) is None
    assert tried == [1, 2]
    # The mesh that was already refused is not compiled again.
    assert smallest(spec(), ONE, steps[1].total - 1) == steps[2]
    assert tried == [1, 2, 2]


def test_the_roofline_by_hand():
    chip = Chip(100.0, 1.0, 10.0, link=4.0, island=8, network=1.0, source="")
    step = Step({"data": 1, "fsdp": 8, "tensor": 2}, {}, 500.0, 30, {("all-gather", 8): 8, ("all-reduce", 2): 4})
    # 16 devices: the tensor pairs are neighbours, the groups of 8 leave the island.
    assert roofline(step, chip) == {"compute": 5.0, "memory": 3.0, "links": 8 / 1.0 + 4 / 4.0}
    assert roofline(step._replace(mesh={"fsdp": 8}), chip)["links"] == 12 / 4.0


def test_a_prompt_shorter_than_the_image_tokens_is_refused():
    with pytest.raises(AntgmmError, match="the image alone takes"):
        check(spec()._replace(length=CONFIG.image_tokens))


def test_a_plan_is_printed_or_refused_with_a_sufficient_mesh(antgmm, refused, monkeypatch):
    def fake(spec, mesh):
        memory = {"teacher": 10 // mesh["fsdp"], "temporaries": 6}
        return Step(dict(mesh), memory, 2e12, 100, Counter({("all-gather", 4): 8, ("all-gather", 2): 4}))

    monkeypatch.setattr(planning, "compiled", fake)
    monkeypatch.setattr(planning, "_kept", lambda arguments: {"teacher": 1})
    plan = ("plan", "--preset", "antgmm-tiny", "--batch", "8", "--length", "24", "--answer", "8")
    figures = json.loads(antgmm(*plan, "--mesh", "fsdp=2", "--json").stdout)
    assert figures["memory"] == {"teacher": 5, "temporaries": 6, "total": 11}
    assert figures["sent"] == {"all-gather": 12}
    assert figures["chips"].keys() == CHIPS.keys() and all(each["fits"] for each in figures["chips"].values())
    assert figures["chips"]["H100"]["seconds"]["compute"] == pytest.approx(2e12 / 989e12)
    assert "Milliseconds per step" in antgmm(*plan, "--mesh", "fsdp=2").stdout
    monkeypatch.setitem(CHIPS, "H100", CHIPS["H100"]._replace(memory=8.0))
    error = refused(*plan, "--mesh", "fsdp=2", "--chip", "H100")
    assert error.endswith("more than H100 has; the smallest sufficient mesh is --mesh fsdp=4 (8e-09 GB)")
    monkeypatch.setitem(CHIPS, "H100", CHIPS["H100"]._replace(memory=6.0))
    error = refused(*plan, "--mesh", "fsdp=2", "--chip", "H100")
    assert error.endswith("no mesh with this tensor size and batch is sufficient: increase tensor, or reduce --batch")
    assert refused(*plan, "--chip", "v9") == "--chip v9: choose one of v5e, v5p, v6e, H100, H200"
    assert refused(*plan, "--mesh", "fsdp=1024") == "--mesh fsdp=1024: at most 512 devices are supported"
    assert refused(*plan, "--student", "antgmm-deep").startswith("the student's ")


def test_a_checkpoint_is_planned_by_a_process_that_starts_with_one_device(tmp_path):
    model = reference.saved(reference.llava(), tmp_path / "model")
    words = ["plan", str(model), "--mesh", "data=2", "--batch", "2", "--length", "8", "--answer", "2", "--json"]
    command = [sys.executable, "-m", "experiments.cli", *words]
    # Without the settings of the tests: the command must make its own.
    clean = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["mesh"] == {"data": 2, "fsdp": 1, "tensor": 1}
    # Rows are split and parameters are not: every device holds all parameters in float32, and gradients are summed
    # (a few parameters have none).
    parameters = sum(leaf.size for leaf in jax.tree.leaves(load_hf(model)[1]))
    assert figures["memory"]["parameters"] == 4 * parameters
    assert figures["sent"]["all-reduce"] > 0.99 * 4 * parameters
