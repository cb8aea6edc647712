"""Answers conversations with vLLM's Python interface. Runs in an environment of its own and imports nothing of ours.

    python vllm_answers.py EXPORT CONVERSATIONS ANSWERS

CONVERSATIONS and ANSWERS are JSON files; images are files next to EXPORT.
"""

import base64
import json
import os
import sys
from pathlib import Path

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    # In one process, so that the arguments of the model can be recorded.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def main(export: Path, conversations: Path, answers: Path) -> None:
    """Writes token ids, pixels and greedy answers of all conversations."""
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    requests = json.loads(conversations.read_text())
    llm = LLM(
        model=str(export),
        dtype="float32",
        max_model_len=requests["length"],
        enforce_eager=True,
        max_num_seqs=2,
        limit_mm_per_prompt={"image": 2, "video": 0},
        mm_device_do_normalize=False,  # the model is given the processor's values
    )
    pixels: list[list] = []
    llm.apply_model(lambda model: record(model, pixels))
    sampling, results = SamplingParams(temperature=0, max_tokens=requests["tokens"]), []
    for chat, text in zip(requests["conversations"], requests["texts"], strict=True):
        pixels.clear()
        if requests["template"]:
            (out,) = llm.chat([served(chat, export.parent)], sampling, use_tqdm=False)
        else:
            (out,) = llm.generate([prompt(chat, text, export.parent)], sampling, use_tqdm=False)
        ids, answer = [*out.prompt_token_ids], [*out.outputs[0].token_ids]
        results.append({"ids": ids, "answer": answer, "pixels": [*pixels]})
    answers.write_text(json.dumps(results))


def record(model, pixels: list[list]) -> None:
    """Adds the pixel values that the model is given to `pixels`, one array in lists for each image or patch."""
    embed = model.embed_multimodal

    def recorded(**inputs):
        values = inputs["pixel_values" if "pixel_values" in inputs else "pixel_values_flat"]
        pixels.extend(part.float().tolist() for part in values)
        return embed(**inputs)

    model.embed_multimodal = recorded


def served(chat, folder: Path) -> list[dict]:
    """The messages of a request to the chat endpoint."""

    def part(one):
        if one["type"] == "text":
            return one
        data = base64.b64encode((folder / one["image"]).read_bytes()).decode()
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}

    return [{"role": turn["role"], "content": [part(one) for one in turn["content"]]} for turn in chat]


def prompt(chat, text: str, folder: Path) -> dict:
    """The prompt of a model without a chat template."""
    from PIL import Image

    names = [part["image"] for turn in chat for part in turn["content"] if part["type"] == "image"]
    images = [Image.open(folder / name).convert("RGB") for name in names]
    return {"prompt": text, "multi_modal_data": {"image": images}}


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
