"""What TFDS would trust in a prepared folder is checked: names, links, numbers of shards and of records."""

import json
import shutil

import pytest

from antgmm_jax.errors import AntgmmError
from data.readers import read_records
from tests.robustness.files import as_tfds

ROWS = [{"question": "what?", "answer": f"a{number}"} for number in range(3)]
NAME = "dataset_info.json"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with three rows."""
    return as_tfds(tmp_path_factory.mktemp("tfds"), ROWS)[1]


@pytest.fixture
def folder(prepared, tmp_path):
    """A copy that may be changed."""
    return shutil.copytree(prepared, tmp_path / "tfds")


def change(folder, **fields):
    """Changes fields of the only split."""
    about = json.loads((folder / NAME).read_text())
    about["splits"][0].update(fields)
    (folder / NAME).write_text(json.dumps(about))


def refused(message, folder):
    with pytest.raises(AntgmmError, match=message) as caught:
        read_records("tfds", folder, split="train")
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def shard(folder):
    (path,) = folder.glob("*.array_record-*")
    return path


def test_rows_are_read(folder):
    assert sorted(record.answer for record in read_records("tfds", folder, split="train")) == ["a0", "a1", "a2"]


@pytest.mark.parametrize(
    "template", ["/etc/{SPLIT}", "../{SPLIT}-{SHARD_X_OF_Y}", "sub/{SPLIT}", "{SPLIT:999999999}", "{SPLIT.__class__}"]
)
def test_names_of_files_stay_in_the_folder_and_are_plain(folder, template):
    change(folder, filepathTemplate=template)
    refused(r"dataset_info\.json names files .*: write names within the folder", folder)


@pytest.mark.parametrize("target", ["outside", "nowhere"])
def test_a_link_out_of_the_folder_is_refused(folder, tmp_path, target):
    shutil.move(shard(folder), tmp_path / "outside")
    (folder / "linked.array_record-00000-of-00001").symlink_to(tmp_path / target)
    refused("is a link", folder)


@pytest.mark.parametrize(("lengths", "noted"), [(["1"], 1), (["5"], 5), (["1000000000"], 10**9)])
def test_numbers_of_records_are_those_of_the_files(folder, lengths, noted):
    change(folder, shardLengths=lengths)
    refused(f"has 3 records, but {noted} are noted: prepare the data set again", folder)


def test_more_shards_than_any_data_set_has_are_refused(folder):
    change(folder, shardLengths=["1"] * 20_000)
    refused("has 20000 shards, at most 10000 are supported", folder)


@pytest.mark.parametrize("left", [0, 10, 0.5])
def test_a_shard_that_is_cut_short_or_missing_is_one_line(folder, left):
    content = shard(folder).read_bytes()
    shard(folder).write_bytes(content[: int(left * len(content)) if left < 1 else left])
    refused("prepare the data set again", folder)
    shard(folder).unlink()
    refused("has 0 records, but 3 are noted: prepare the data set again", folder)


def test_features_have_no_names_of_files(folder):
    features = json.loads((folder / "features.json").read_text())
    inner = features["featuresDict"]["features"]
    inner["../../secret"] = inner.pop("question")
    (folder / "features.json").write_text(json.dumps(features))
    refused(r"features\.json names a feature '\.\./\.\./secret': rename it", folder)
