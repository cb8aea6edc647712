"""Checkpoints are complete or absent, are restored bit for bit, and survive kill -9 and a full disk."""

import json
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io import checkpoint, folders
from antgmm_jax.io.books import write_book
from experiments.lab.servers.starting import free_port

ROOT = Path(__file__).resolve().parents[2]
RECORD = {
    "config": {"family": "llava", "text": {"layers": 2}},
    "parent": "runs/a/stages/01-blocks",
    "keep": {"text/layers": np.array([0, 2], np.int32)},
    "metrics": {"loss": np.float32(0.1), "exact": 1 / 3},
    "seeds": {"data": 7},
    "data": {"fingerprint": "ab12", "position": {"next_index": 640}},
}


def params():
    return {
        "text": {
            "embed/tokens": jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.bfloat16),
            "scale": np.linspace(0, 1, 4, dtype=np.float32),
            "count": jnp.int32(3),
        },
        "empty": {"bias": jnp.zeros((2, 0), jnp.float32)},
    }


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_stage_is_restored_bit_for_bit(tmp_path):
    stage = tmp_path / "stages" / "01-blocks"
    assert not checkpoint.is_complete(stage)
    checkpoint.save_stage(stage, params(), RECORD)
    assert checkpoint.is_complete(stage)
    tree, record = checkpoint.load_stage(stage)
    assert_same(tree, params())
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(tree))
    assert record.pop("versions")["jax"] == jax.__version__
    expected = {**RECORD, "keep": {"text/layers": [0, 2]}, "metrics": {"loss": float(np.float32(0.1)), "exact": 1 / 3}}
    assert record == expected
    assert checkpoint.load_record(stage)["data"] == RECORD["data"]


def test_a_stage_is_never_overwritten(tmp_path):
    checkpoint.save_stage(tmp_path / "a", {"w": jnp.ones(2)}, {})
    with pytest.raises(AntgmmError, match="already exists"):
        checkpoint.save_stage(tmp_path / "a", {"w": jnp.zeros(2)}, {})
    assert checkpoint.load_stage(tmp_path / "a")[0]["w"].tolist() == [1.0, 1.0]


def test_only_arrays_are_saved(tmp_path):
    with pytest.raises(TypeError, match=r"leaf 'a.step' is a int, not an array"):
        checkpoint.save_stage(tmp_path / "a", {"a": {"step": 3}}, {})
    assert list(tmp_path.iterdir()) == []


def train_state():
    weights = {"w": jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)), jnp.float32), "b": jnp.ones(3)}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(1e-3, 10)))
    state = optimizer.init(weights)
    for scale in (1.0, 0.3):
        updates, state = optimizer.update(jax.tree.map(lambda x, s=scale: jnp.sin(x) * s, weights), state, weights)
        weights = optax.apply_updates(weights, updates)
    return {"params": weights, "optimizer": state, "key": jax.random.key(5), "raw_key": jax.random.PRNGKey(6)}


def test_a_step_is_restored_in_the_structure_of_like(tmp_path):
    state = train_state()
    checkpoint.save_step(tmp_path / "steps", 12, state, {"position": 96})()
    like = jax.tree.map(lambda leaf: leaf if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf * 0, state)
    restored, record = checkpoint.load_step(tmp_path / "steps", 12, like)
    assert record["position"] == 96
    key, expected_key = restored.pop("key"), state.pop("key")
    assert key.dtype == expected_key.dtype
    np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(expected_key))
    assert_same(restored, state)
    assert isinstance(restored["optimizer"][1][0], optax.ScaleByAdamState)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored))


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_a_step_is_restored_in_the_floats_that_were_saved(tmp_path, kind):
    values = {"a": kind(np.arange(3, dtype=ml_dtypes.bfloat16)), "b": kind(np.ones(2, np.int32))}
    checkpoint.save_step(tmp_path / "steps", 1, values, {})()
    like = {**values, "a": kind(np.zeros(3, np.float32))}
    assert_same(checkpoint.load_step(tmp_path / "steps", 1, like)[0], values)


def test_a_step_is_restored_with_the_sharding_of_like(tmp_path):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    checkpoint.save_step(tmp_path, 1, {"w": np.arange(4.0)}, {})()
    like = {"w": jax.ShapeDtypeStruct((4,), np.float64, sharding=sharding)}
    with jax.enable_x64(True):
        restored, _ = checkpoint.load_step(tmp_path, 1, like)
    assert restored["w"].sharding == sharding
    assert restored["w"].tolist() == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"w": jnp.zeros(3, jnp.int32)}, r"'w' is .*float32.*, not .*int32"),
        ({"w": jnp.zeros(4)}, r"'w' is .*\[3\].*, not .*\[4\]"),
        ({"w": jnp.zeros(3), "v": jnp.zeros(1)}, "'v' is absent"),
        ({}, "'w' is .*, not absent"),
    ],
)
def test_a_step_of_another_run_is_refused(tmp_path, like, message):
    checkpoint.save_step(tmp_path, 1, {"w": jnp.ones(3)}, {})()
    with pytest.raises(AntgmmError, match=message):
        checkpoint.load_step(tmp_path, 1, like)


def test_the_newest_two_steps_are_kept(tmp_path):
    steps = tmp_path / "steps"
    assert checkpoint.latest_step(steps) is None
    for step in (5, 10, 15, 20):
        checkpoint.save_step(steps, step, {"w": jnp.full(2, step)}, {})()
    assert checkpoint.latest_step(steps) == 20
    assert sorted(path.name for path in steps.iterdir()) == ["00000015", "00000020"]
    assert checkpoint.load_step(steps, 15, {"w": jnp.zeros(2, int)})[0]["w"].tolist() == [15, 15]
    checkpoint.discard_steps(steps)
    checkpoint.discard_steps(steps)
    assert list(tmp_path.iterdir()) == []


def test_training_continues_while_a_step_is_saved(tmp_path, monkeypatch):
    """The saved state is that of the call, although later steps donate its arrays and the record changes."""
    going_on, checksums = threading.Event(), folders.checksums
    monkeypatch.setattr(folders, "checksums", lambda path: going_on.wait(60) and checksums(path))
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    state, history = step(jnp.zeros((500, 500))), [1]
    finish = checkpoint.save_step(tmp_path, 1, {"w": state}, {"history": history})
    history.append(2)
    for _ in range(3):
        state = step(state)
    assert state[0, 0] == 4
    assert checkpoint.latest_step(tmp_path) is None
    going_on.set()
    finish()
    restored, record = checkpoint.load_step(tmp_path, 1, {"w": jnp.zeros((500, 500))})
    assert (restored["w"] == 1).all() and record["history"] == [1]


def test_an_absent_stage_is_refused_in_one_line(tmp_path):
    with pytest.raises(AntgmmError, match="does not contain a complete stage") as caught:
        checkpoint.load_stage(tmp_path / "none")
    assert "\n" not in str(caught.value)


def damage(path, how):
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "altered":
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["truncated", "altered", "removed"])
def test_every_damaged_file_is_detected(tmp_path, how):
    checkpoint.save_stage(tmp_path / "a", {"w": jnp.arange(100.0)}, RECORD)
    for path in sorted(p for p in (tmp_path / "a").rglob("*") if p.is_file() and p.stat().st_size):
        before = path.read_bytes()
        damage(path, how)
        with pytest.raises(AntgmmError) as caught:
            checkpoint.load_stage(tmp_path / "a")
        assert str(tmp_path / "a") in str(caught.value)
        assert "\n" not in str(caught.value)
        assert checkpoint.is_complete(tmp_path / "a") == (how == "altered" and path.name != "stage.json")
        path.write_bytes(before)
    assert checkpoint.is_complete(tmp_path / "a")


LEAF = {"path": ["w"], "shape": [2], "dtype": "float32"}


@pytest.mark.parametrize(
    "contents",
    [
        None,
        {"leaves": {}},
        {"leaves": {"w": LEAF}, "files": [1]},
        {"leaves": {"w": LEAF}, "files": {"a": None}},
        {"leaves": {"w": LEAF}, "files": {"../../etc/passwd": [1, 2]}},
        {"leaves": {"w": LEAF}, "files": {"/etc/passwd": [1, 2]}},
        *({"leaves": {"w": {**LEAF, **change}}, "files": {}} for change in ({"path": [5]}, {"path": []}, {"dtype": 5})),
        *({"leaves": {"w": {**LEAF, "shape": shape}}, "files": {}} for shape in ([-1], ["a"], 5, None)),
    ],
)
def test_a_table_of_contents_with_a_valid_checksum_is_checked(tmp_path, contents):
    checkpoint.save_stage(tmp_path / "a", {"w": jnp.arange(2.0)}, RECORD)
    record = checkpoint.load_record(tmp_path / "a")
    write_book(tmp_path / "a" / "stage.json", {**record, "contents": contents})
    with pytest.raises(AntgmmError, match=r"stage\.json has no table of contents: remove .* and run it again"):
        checkpoint.load_stage(tmp_path / "a")
    assert not checkpoint.is_complete(tmp_path / "a")


@pytest.fixture
def small_disk(tmp_path):
    """The mount point of a file system of 400 kB; mounting needs root."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(mount)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a tmpfs needs root")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_full_disk_keeps_earlier_steps(small_disk, capfd):
    small = {"w": jnp.arange(8.0)}
    checkpoint.save_step(small_disk, 1, small, {})()
    noise = np.random.default_rng(0).integers(0, 256, 2_000_000, dtype=np.uint8)
    with pytest.raises(AntgmmError, match="no space left on the disk") as caught:
        checkpoint.save_step(small_disk, 2, {"w": noise}, {})()
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
    assert [path.name for path in small_disk.iterdir()] == ["00000001"]
    assert_same(checkpoint.load_step(small_disk, 1, small)[0], small)
    checkpoint.save_step(small_disk, 3, small, {})()


def test_a_disk_that_fills_up_at_the_record_leaves_nothing(tmp_path, monkeypatch):
    def full(self, text):
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(AntgmmError, match="no space left on the disk"):
        checkpoint.save_stage(tmp_path / "a", {"w": jnp.ones(3)}, RECORD)
    assert list(tmp_path.iterdir()) == []


SAVER = textwrap.dedent("""
    import sys
    import numpy as np
    from antgmm_jax.io import checkpoint

    steps = sys.argv[1]
    step = (checkpoint.latest_step(steps) or 0) + 1
    while True:
        checkpoint.save_step(steps, step, {"a": {"w": np.full((64, 64), step)}, "b": np.arange(step)}, {"step": step})()
        print(step, flush=True)
        step += 1
""")


@pytest.mark.long
def test_kill_9_loses_nothing_that_was_reported(tmp_path):
    """The loop only saves, so most kills, at random moments, fall into a write, a rename or a removal."""
    steps = tmp_path / "steps"
    log = tmp_path / "log"
    random = np.random.default_rng(0)
    for _ in range(5):
        with log.open("ab") as out:
            child = subprocess.Popen([sys.executable, "-c", SAVER, str(steps)], stdout=out, cwd=ROOT)
            began = log.stat().st_size
            while log.stat().st_size == began:
                assert child.poll() is None
                time.sleep(0.005)
            time.sleep(random.uniform(0, 0.1))
            child.send_signal(signal.SIGKILL)
            child.wait()
        reported = int(log.read_text().split()[-1])
        latest = checkpoint.latest_step(steps)
        assert latest in (reported, reported + 1)
        like = {"a": {"w": np.zeros((64, 64), int)}, "b": np.zeros(latest, int)}
        tree, record = checkpoint.load_step(steps, latest, like)
        assert record["step"] == latest
        assert (tree["a"]["w"] == latest).all()
        assert tree["b"].tolist() == list(range(latest))


PAIR = textwrap.dedent("""
    import sys
    import jax
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
    import numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from antgmm_jax.io import checkpoint
    from antgmm_jax.parallel import processes

    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, P("data"))
    whole = np.arange(8.0, dtype=np.float32).reshape(8, 1)
    w = jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])
    for step in (1, 2, 3):
        checkpoint.save_step(sys.argv[3], step, {"w": w * step}, {"step": step})()
    processes.barrier("process 0 has published the step")
    restored, _ = checkpoint.load_step(sys.argv[3], 3, {"w": w})
    assert restored["w"].sharding == sharding
    for shard in restored["w"].addressable_shards:
        np.testing.assert_array_equal(shard.data, whole[shard.index] * 3)
""")


@pytest.mark.long
def test_two_processes_save_one_checkpoint(tmp_path):
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-c", PAIR, address]
    children = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "steps")], stderr=subprocess.PIPE, cwd=ROOT)
        for rank in range(2)
    ]
    for child in children:
        _, errors = child.communicate(timeout=120)
        assert child.returncode == 0, errors.decode()
    assert sorted(path.name for path in (tmp_path / "steps").iterdir()) == ["00000002", "00000003"]
    restored, _ = checkpoint.load_step(tmp_path / "steps", 2, {"w": np.zeros((8, 1), np.float32)})
    assert restored["w"].ravel().tolist() == [0, 2, 4, 6, 8, 10, 12, 14]


def test_the_record_is_plain_json(tmp_path):
    checkpoint.save_stage(tmp_path / "a", {"w": jnp.ones(1)}, RECORD)
    text = json.loads((tmp_path / "a" / "stage.json").read_text())
    assert set(RECORD) | {"versions", "contents", "checksum"} == set(text)
    assert not list((tmp_path / "a").rglob("*.pkl"))


def test_replace_swaps_whole_folders(tmp_path, monkeypatch):
    target = tmp_path / "export"
    for name in ("first", "second"):
        fresh = tmp_path / "fresh"
        fresh.mkdir()
        (fresh / name).write_text(name)
        folders.replace(fresh, target)
        assert [path.name for path in target.iterdir()] == [name]
        assert [path.name for path in tmp_path.iterdir()] == ["export"]
    # The old folder is removed only after the new one is in place.
    (tmp_path / "fresh").mkdir()
    removed = []
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: removed.append((path.exists(), [*target.iterdir()])))
    folders.replace(tmp_path / "fresh", target)
    assert removed == [(False, [target / "second"]), (True, [])]
