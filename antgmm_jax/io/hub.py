"""Repositories of the Hugging Face Hub by name: `hf:ORG/NAME`, `hf:ORG/NAME@REVISION`, and files of data sets."""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from functools import cache
from glob import escape
from pathlib import Path
from typing import NamedTuple

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io import stores

PREFIX = "hf:"
ENDPOINT = "HF_ENDPOINT"
"""Environment variable with the URL of a mirror of the Hub."""
OFFLINE = "ANTGMM_OFFLINE"
"""Environment variable that forbids or allows network access for names; `huggingface_hub`'s own decides without it."""
SILENCE = 60.0
"""Seconds that the Hub may be silent before a request ends."""
MODEL = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "README.md", "LICENSE", "LICENSE.md", "NOTICE")
"""Files of a model with its card and licence: no pickled weights and no code."""
LOADED = (
    *("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json"),
    *("*tokenizer.json", "*tokenizer_config.json", "*processor_config.json", "chat_template.*"),
)
"""Files of a model without which it cannot be read: `transformers` downloads these, and no card and no licence."""
SUFFIXES = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "avif", "jp2", "ppm")
"""Suffixes of pictures, in small letters."""
PICTURES = tuple(f"*.{form}" for suffix in SUFFIXES for form in (suffix, suffix.upper()))
DATA = {
    "jsonl": ("*.jsonl", "*.json", *PICTURES),
    "parquet": ("*.parquet",),
    "arrow": ("*.arrow", "*.json"),
    "webdataset": ("*.tar",),
    "tfds": ("*.json", "*array_record*"),
}
"""Kind of data -> its files."""
# All folders but that of a Q-Former's tokenizer.
_FOLDERS = ("[!q]*/*", "q[!f]*/*")
# Other formats and second copies of a model's weights.
_SKIPPED = (*_FOLDERS, "consolidated*")
_CONFIG = "config.json"
_NAME = re.compile(r"hf:(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.-]+))?(?:/(?P<path>.+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FORMS = "write it as hf:ORG/NAME or hf:ORG/NAME@REVISION"


class Repository(NamedTuple):
    """A name of the Hub.

    Attributes:
        id: ORG/NAME.
        revision: branch, tag or commit; "" for the main branch.
        path: file, folder or pattern in a data set; "" for all of it.
    """

    id: str
    revision: str
    path: str

    @property
    def fixed(self) -> bool:
        """Whether the revision is a commit, which never changes."""
        return bool(_COMMIT.fullmatch(self.revision))

    def __str__(self) -> str:
        return f"{PREFIX}{self.id}{self.revision and '@' + self.revision}{self.path and '/' + self.path}"


def parse(path: str | os.PathLike) -> Repository | None:
    """Returns the repository that a path names; None for other paths.

    Args:
        path: a path, or a name with the prefix `hf:`.

    Raises:
        AntgmmError: the name is not valid.
    """
    text = os.fspath(path)
    if not text.startswith(PREFIX):
        return None
    match = _NAME.fullmatch(text)
    if match is None or ".." in text.split("/"):
        raise AntgmmError(f"{text} is not a name of the Hub: {_FORMS}, for data also with /PATH")
    return Repository(match["id"], match["revision"] or "", (match["path"] or "").rstrip("/"))


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is a name of the Hub or the URL of an object store.

    Args:
        path: a path, or a name as in `parse`.

    Raises:
        AntgmmError: as in `parse`.
    """
    return stores.is_url(path) or parse(path) is not None


def local(path: str | os.PathLike, kind: str = "") -> Path:
    """Returns a local path; a name of the Hub is downloaded into the cache of `huggingface_hub`, a URL into our own.

    Without a network, a snapshot of the Hub in the cache is used if it is complete; of a model, it needs only `LOADED`.

    Args:
        path: a path, which is returned unchanged, a name of the Hub, or the URL of an object store.
        kind: kind of data, a key of `DATA`; "" for a model.

    Returns:
        The path; for a name, its path in the snapshot, below a folder named like its commit.

    Raises:
        AntgmmError: the files cannot be downloaded, are a model without safetensors or of no supported family, or one
            file instead of a folder.
    """
    if stores.is_url(path):
        beside = [pattern for pattern in DATA.get(kind, ()) if pattern in PICTURES]
        return stores.local(path, DATA[kind] if kind else MODEL, beside, () if kind else _SKIPPED)
    repository = parse(path)
    if repository is None:
        if not kind and os.path.isfile(path):
            raise AntgmmError(f"{path} is a file: name the Hugging Face folder of a model")
        return Path(path)
    if kind:
        below = _below(DATA[kind], repository.path)
        return _snapshot(repository, "dataset", _allowed(DATA[kind], repository.path), below) / repository.path
    if repository.path:
        raise AntgmmError(f"{repository} is not a name of a model: {_FORMS}")
    folder = _snapshot(repository, "model", MODEL, _SKIPPED)
    if not any(folder.glob("*.safetensors")):
        raise without_safetensors(repository)
    return folder


def without_safetensors(repository: Repository) -> AntgmmError:
    """Returns the error for a model that has no safetensors."""
    return AntgmmError(f"{repository} has no safetensors: convert it with transformers and use that folder")


def config_of(repository: Repository) -> Path:
    """Downloads config.json of a model alone.

    Args:
        repository: its name.

    Returns:
        The folder that holds it, named like the commit.

    Raises:
        AntgmmError: it cannot be downloaded, or no family reads such a model.
    """
    with reading(repository, "model", MODEL):
        folder = _download(repository, "model", (_CONFIG,), _SKIPPED)
        _check_supported(folder)
        return folder


def pinned(path: str, kind: str = "") -> str:
    """Returns a path with the commit of its Hub name, which is downloaded.

    Args:
        path: a path, which is returned unchanged, or a name of the Hub.
        kind: as in `local`.

    Raises:
        AntgmmError: as in `local`.
    """
    repository = parse(path)
    if repository is None or repository.fixed:
        return path
    folder = local(path, kind)
    commit = next(part for part in reversed(folder.parts) if _COMMIT.fullmatch(part))
    return str(repository._replace(revision=commit))


def contents(folder: Path) -> Path:
    """Returns the folder to which the links of a snapshot lead; any other folder is returned unchanged."""
    for parent in (folder, *folder.parents):
        if parent.parent.name == "snapshots" and (blobs := parent.parent.parent / "blobs").is_dir():
            return blobs
    return folder


def check_target(name: str) -> None:
    """Checks the name of a repository to upload to, before there is anything to upload.

    Args:
        name: hf:ORG/NAME.

    Raises:
        AntgmmError: the name is not valid, or network access is forbidden.
    """
    repository = parse(name)
    if repository is None or repository.revision or repository.path:
        raise AntgmmError(f"--push {name}: write it as hf:ORG/NAME")
    if offline():
        raise AntgmmError(f"--push {name}: HF_HUB_OFFLINE is set: unset it, or leave out --push")


def push(directory: Path, name: str) -> str:
    """Uploads the files of a Hugging Face directory; a new repository is private.

    Weights, settings and tokenizer files of an earlier model are removed from the repository in the same upload. Its
    card, its other folders and its history stay.

    Args:
        directory: the directory.
        name: hf:ORG/NAME.

    Returns:
        URL of the commit.

    Raises:
        AntgmmError: as in `check_target`, or the upload failed.
    """
    check_target(name)
    target = name.removeprefix(PREFIX)
    from huggingface_hub import HfApi
    from huggingface_hub.utils import filter_repo_objects

    try:
        with _network():
            api = HfApi(os.environ.get(ENDPOINT))
            api.create_repo(target, private=True, exist_ok=True)
            old = filter_repo_objects(
                api.list_repo_files(target), allow_patterns=_loaded(), ignore_patterns=[*_FOLDERS]
            )
            return api.upload_folder(
                repo_id=target,
                folder_path=directory,
                allow_patterns=[*MODEL],
                delete_patterns=[escape(name) for name in old],  # without those that are uploaded
                commit_message=f"Upload {directory.name}",
            ).commit_url
    except Exception as error:
        raise AntgmmError(
            f"{directory} was not uploaded to {name} ({_line(error)}): log in with `hf auth login`, then run"
            f" `{upload_command(directory, name)}`"
        ) from error


def _loaded() -> list[str]:
    """Patterns of what servers load: such files of an earlier upload would be read with the new ones."""
    # Imported on use: it imports this module.
    from antgmm_jax.io.companions import COMPANIONS

    names = [name for name in COMPANIONS if not name.startswith(("LICENSE", "NOTICE"))]
    return ["*.safetensors", "*.safetensors.index.json", _CONFIG, *names, *(f"q*/{name}" for name in names)]


def upload_command(directory: Path, name: str) -> str:
    """Returns the command that uploads a directory; as in `push`, a new repository is private.

    Args:
        directory: Hugging Face directory.
        name: hf:ORG/NAME.
    """
    return f"hf upload {name.removeprefix(PREFIX)} {directory} --private --delete 'model*.safetensors*'"


def _allowed(files: Sequence[str], path: str) -> tuple[str, ...]:
    """Patterns of the files to download: those below a folder, or a file with the pictures next to it."""
    if not path:
        return tuple(files)
    folder, _, last = path.rpartition("/")
    if not any(fnmatch(last, pattern) for pattern in files):
        return tuple(f"{path}/{pattern}" for pattern in files)
    return path, *(f"{folder}/{pattern}".lstrip("/") for pattern in files if pattern in PICTURES)


def _below(files: Sequence[str], path: str) -> tuple[str, ...]:
    """Patterns of rows in folders below a folder, which are not read: `*` matches `/` too."""
    folder = f"{path}/" if path else ""
    return tuple(f"{folder}*/{pattern}" for pattern in files if pattern not in PICTURES)


@cache
def _snapshot(repository: Repository, repo_type: str, files: tuple[str, ...], skipped: tuple[str, ...]) -> Path:
    if repo_type != "model":
        with reading(repository, repo_type, files):
            return _download(repository, repo_type, files, skipped)
    commit = repository._replace(revision=config_of(repository).name)
    from huggingface_hub.errors import LocalEntryNotFoundError

    with reading(repository, repo_type, files):
        try:
            return _download(commit, repo_type, files, skipped)
        except Exception:  # without a network, threads of `huggingface_hub` may fail in several ways
            with suppress(LocalEntryNotFoundError):
                return _download(commit, repo_type, LOADED, skipped, cached=True)
            raise


def _download(
    repository: Repository, repo_type: str, files: Sequence[str], skipped: Sequence[str], *, cached: bool = False
) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            repository.id,
            repo_type=repo_type,
            revision=repository.revision or None,
            allow_patterns=[*files],
            ignore_patterns=[*skipped],
            endpoint=os.environ.get(ENDPOINT),
            local_files_only=cached,
            tqdm_class=_progress(),
        )
    )


@contextmanager
def reading(repository: Repository, repo_type: str, files: Sequence[str]) -> Iterator[None]:
    """Allows network access, and explains errors of `huggingface_hub`.

    Args:
        repository: the repository that is read.
        repo_type: "model" or "dataset".
        files: patterns of the files that the remedy names.

    Raises:
        AntgmmError: in place of any other exception of the block.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        with _network():
            yield
    except AntgmmError:
        raise
    except GatedRepoError as error:
        remedy = "accept its terms on the Hub, then log in with `hf auth login`"
        raise AntgmmError(f"{repository} is gated: {remedy}") from error
    except RepositoryNotFoundError as error:
        remedy = "check the name; for a private one, log in with `hf auth login`"
        raise AntgmmError(f"{repository}: there is no such public {repo_type} on the Hub: {remedy}") from error
    except RevisionNotFoundError as error:
        raise AntgmmError(f"{repository}: there is no revision {repository.revision!r}: check it on the Hub") from error
    except Exception as error:
        raise AntgmmError(
            f"{repository} is not in the cache and cannot be downloaded ({_line(error)}): where there is a network, run"
            f" `{_command(repository, repo_type, files)}`, and use the folder {repository.id.partition('/')[2]} as path"
        ) from error


def _check_supported(folder: Path) -> None:
    """Raises AntgmmError if no family reads a model with this config.json: its weights may take long to download."""
    # Imported on use: it imports this module.
    from antgmm_jax.io.convert import check_supported

    if (folder / _CONFIG).exists():
        check_supported(folder)


def _progress() -> type:
    """A class of progress bars for a terminal; it prints nothing in a log."""
    from tqdm.auto import tqdm

    class Progress(tqdm):
        def __init__(self, *args, **options):
            super().__init__(*args, **{**options, "leave": False, "disable": not sys.stderr.isatty()})

    return Progress


def _command(repository: Repository, repo_type: str, files: Sequence[str]) -> str:
    """The command that downloads the files into a folder."""
    words = ["hf download", repository.id, *(["--repo-type dataset"] if repo_type == "dataset" else [])]
    words += [f"--revision {repository.revision}"] if repository.revision else []
    words += ["--include", *(f"'{pattern}'" for pattern in files)]
    return " ".join([*words, "--local-dir", repository.id.partition("/")[2]])


def _line(error: Exception) -> str:
    """The first line of an error, shortened."""
    text = re.sub(r"//[^/@\s]+@", "//", " ".join(str(error).split())) or type(error).__name__  # without a password
    return text if len(text) <= 160 else f"{text[:160]}..."


def offline() -> bool:
    """Returns whether network access is forbidden, by `OFFLINE` or by `huggingface_hub`'s own variable."""
    from huggingface_hub import constants

    value = os.environ.get(OFFLINE)
    return constants.HF_HUB_OFFLINE if value is None else value.upper() in {"1", "ON", "YES", "TRUE"}


@contextmanager
def _network() -> Iterator[None]:
    """Applies `OFFLINE` and `SILENCE` to `huggingface_hub`, which is otherwise offline in commands."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = offline()
    get_session().timeout = SILENCE  # none by default
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
