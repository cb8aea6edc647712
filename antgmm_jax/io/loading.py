"""Configs and processors of checkpoints, by transformers: their code never runs, and every failure is one line."""

import json
from collections.abc import Mapping
from os.path import lexists
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import (
    CONFIG_MAPPING,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    PretrainedConfig,
    ProcessorMixin,
)

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.bounds import check_model_config, check_processor_config, check_replacements
from antgmm_jax.io.companions import COMPANIONS
from antgmm_jax.io.files import check_regular, check_size, one_line, read_json
from antgmm_jax.io.hub import local
from antgmm_jax.io.templates import render, with_fixed_day

CONFIG, GENERATION = "config.json", "generation_config.json"
_SAFE = {"local_files_only": True, "trust_remote_code": False}
_RULES, _OFFSETS = ("normalizer", "pre_tokenizer", "decoder"), ("trim_offsets",)
_PROCESSOR, _IMAGES, _TOKENIZER = "processor_config.json", "preprocessor_config.json", "tokenizer.json"
_NUMBERS = frozenset((_PROCESSOR, _IMAGES, "video_preprocessor_config.json", "tokenizer_config.json"))
"""Files with numbers by which a processor reserves memory."""


def read_config(directory: Path) -> dict[str, Any]:
    """Reads config.json as written.

    Raises:
        AntgmmError: it is missing, damaged, or a number in it is out of bounds.
    """
    raw = read_json(directory / CONFIG)
    check_model_config(directory / CONFIG, raw)
    return raw


def generation_settings(directory: Path) -> dict[str, Any]:
    """Returns the contents of generation_config.json; empty without one."""
    path = directory / GENERATION
    return read_json(path) if path.exists() else {}


def hf_config(directory: Path, raw: Mapping[str, Any] | None = None) -> PretrainedConfig:
    """Returns the config of a checkpoint with the defaults of transformers.

    Args:
        directory: Hugging Face directory.
        raw: result of `read_config`, if it is read already.

    Raises:
        AntgmmError: config.json is damaged, or transformers refuses it.
    """
    raw = read_config(directory) if raw is None else raw
    with one_line(lambda: f"{directory / CONFIG} is not accepted by transformers", "correct it"):
        return CONFIG_MAPPING[raw["model_type"]].from_dict(dict(raw))


def load_processor(directory: str | Path) -> ProcessorMixin:
    """Loads the processor of a checkpoint directory or a name of the Hub.

    Its tokenizer splits text as tokenizer.json says, and ends answers as the model's files say. Its chat template is
    that of the tokenizer if only the tokenizer has one, and writes a fixed day.

    Raises:
        AntgmmError: the directory has no processor that can be loaded offline, or one of its files is damaged.
    """
    folder = local(directory)
    present = {name for name in COMPANIONS if lexists(folder / name)}
    for name in sorted(present):
        check_regular(folder / name)
        check_size(folder / name)
    if _TOKENIZER in present:
        check_replacements(folder / _TOKENIZER)
    for name in sorted(present & _NUMBERS):
        check_processor_config(folder / name, read_json(folder / name))
    if (folder / CONFIG).exists():
        read_config(folder)
    subject = f"{directory} has no processor that AutoProcessor can load"
    with one_line(lambda: f"{subject}: {_damaged(folder)} cannot be used", "save the model's processor there"):
        processor = stock_processor(folder)
        if _TOKENIZER in present:
            _split_as_file(processor, folder / _TOKENIZER)
    _check_unknown(processor, directory)
    template = processor.chat_template or _template_of_tokenizer(processor)
    processor.chat_template = template.get("default") if isinstance(template, Mapping) else template
    _end_as_model(processor, folder)
    if isinstance(processor.chat_template, str):
        processor.chat_template = with_fixed_day(processor.chat_template)
    return processor


def template_warning(processor: ProcessorMixin) -> str:
    """Returns a warning if the tokenizer has a chat template that is not used, as it holds no picture; else "".

    Args:
        processor: from `load_processor`.
    """
    own = getattr(getattr(processor, "tokenizer", None), "chat_template", None)
    if processor.chat_template or not own:
        return ""
    return (
        "the tokenizer has a chat template that cannot write a picture, and it is not used: save it as"
        " chat_template.jinja beside config.json, with the image token in the place of each picture"
    )


def stock_processor(directory: Path) -> Any:
    """Returns the processor of a checkpoint directory as transformers and servers load it."""
    return AutoProcessor.from_pretrained(directory, **_SAFE)


def splits_as_file(processor: Any, path: Path) -> bool:
    """Whether the tokenizer of a processor splits text as its file says.

    Some classes of transformers 5 take the vocabulary alone from the file (GPT2Tokenizer, which some released models
    name, splits numbers otherwise).

    Args:
        processor: from `stock_processor`.
        path: tokenizer.json.
    """
    return _other_rules(processor, path) is None


def _split_as_file(processor: Any, path: Path) -> None:
    """Gives a tokenizer the rules of its file."""
    if (own := _other_rules(processor, path)) is not None:
        for part in _RULES:
            setattr(processor.tokenizer.backend_tokenizer, part, getattr(own, part))


def _other_rules(processor: Any, path: Path) -> Tokenizer | None:
    """The rules of the file; None if the tokenizer has them, or there is no file."""
    backend = getattr(getattr(processor, "tokenizer", None), "backend_tokenizer", None)
    if backend is None or not path.exists():
        return None
    own = _rules(path)
    if getattr(backend, "fix_mistral_regex", False):  # transformers replaced a wrong rule of the file
        own.pre_tokenizer = backend.pre_tokenizer
    same = all(_rule(getattr(backend, part), part) == _rule(getattr(own, part), part) for part in _RULES)
    return None if same else own


def _rules(path: Path) -> Tokenizer:
    """The tokenizer of a file without its vocabulary, which takes seconds to read."""
    content = json.loads(path.read_bytes())
    model = {"type": "BPE", "vocab": {}, "merges": []}
    rules = {part: content.get(part) for part in _RULES}
    return Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], "model": model, **rules}))


def _rule(part: Any, name: str) -> Any:
    """A rule as JSON, without what changes no token: offsets, and the settings of a decoder of bytes."""

    def plain(node: Any) -> Any:
        if isinstance(node, list):
            return [plain(each) for each in node]
        if not isinstance(node, Mapping):
            return node
        of_bytes = name == "decoder" and node.get("type") == "ByteLevel"
        return {key: plain(value) for key, value in node.items() if key == "type" or not (of_bytes or key in _OFFSETS)}

    return None if part is None else plain(json.loads(part.__getstate__()))


def _template_of_tokenizer(processor: Any) -> Any:
    """Returns the chat template that the tokenizer alone has, as servers take it; None if it cannot write an image."""
    tokenizer = getattr(processor, "tokenizer", None)
    template = getattr(tokenizer, "chat_template", None)
    if tokenizer is None or not template:
        return None
    text = {"type": "text", "text": "a"}
    try:
        with_image, without = (
            render(template, [{"role": "user", "content": parts}], tokenizer.special_tokens_map, generate=True)
            for parts in ([{"type": "image"}, text], [text])
        )
    except AntgmmError:
        return None
    # A template for text alone writes the list of the parts as Python does.
    return template if with_image != without and "'type'" not in with_image else None


def _end_as_model(processor: Any, folder: Path) -> None:
    """Takes the end token that the model's files name, if no chat template writes one and the tokenizer has another.

    Some models end answers with a line break, and their tokenizers have the end token of the language model: they would
    answer on and on. Special tokens that the files name are ignored: some name the start token, which ends no answer.
    """
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or processor.chat_template or not (folder / CONFIG).exists():
        return
    text = read_config(folder).get("text_config") or {}
    sources = (generation_settings(folder), text)
    named = next((each["eos_token_id"] for each in sources if each.get("eos_token_id") is not None), [])
    ends = [named] if isinstance(named, int) else named
    special = {key for key, token in tokenizer.added_tokens_decoder.items() if token.special}
    ordinary = [end for end in ends if 0 <= end < len(tokenizer) and end not in {*tokenizer.all_special_ids, *special}]
    if ordinary and tokenizer.eos_token_id not in ends:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ordinary[0])


def _check_unknown(processor: ProcessorMixin, directory: str | Path) -> None:
    """Checks the token for unknown words: where the vocabulary lacks it, transformers looks it up without an end."""
    tokenizer = getattr(processor, "tokenizer", None)
    backend, unknown = getattr(tokenizer, "backend_tokenizer", None), getattr(tokenizer, "unk_token", None)
    if backend is not None and unknown is not None and backend.token_to_id(unknown) is None:
        raise AntgmmError(f"{directory}: unk_token {unknown!r} is not in the vocabulary: correct tokenizer_config.json")


def _damaged(folder: Path) -> str:
    """Name of the file that transformers cannot load, by loading the parts of a processor one after another."""
    for name, part in ((_TOKENIZER, AutoTokenizer), (_IMAGES, AutoImageProcessor)):
        try:
            part.from_pretrained(folder, **_SAFE)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # the caller reports the first failure
            return name if (folder / name).exists() else _PROCESSOR
    return _PROCESSOR
