"""TRL's GKD as a contender: teacher forcing (`lmbda=0`), batches grouped by length, in the peers' environment."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import os
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl.experimental.gkd import GKDConfig, GKDTrainer

from experiments.lab.peers.record import SIDE, Recorder
from experiments.lab.peers.task import Task, Text, read

WARM_STEPS = 2


class _Timed(GKDTrainer):
    """A trainer that stores every loss; its log contains only averages."""

    losses: list[torch.Tensor]

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.losses.append(loss.detach())
        return loss


class _StepCallback(TrainerCallback):
    def __init__(self, record: Recorder):
        self._record = record
        self.trainer: _Timed

    def on_train_begin(self, args, state, control, **kwargs):
        self._record.ready()

    def on_step_end(self, args, state, control, **kwargs):
        self._record.step(float(self.trainer.losses[-1]))


def main(work: Path, out: Path, mode: str) -> None:
    """Runs the contender.

    Args:
        work: folder of the task.
        out: JSON file to write.
        mode: the sampling strategy of transformers' trainer, "group_by_length" or "random".
    """
    record = Recorder("trl", "torch", "transformers")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    task, text = read(work)
    scratch = out.parent
    # Warm up with a separate trainer, so that the measured one starts from the initial weights.
    _trainer(task, text, work, scratch, mode, steps=WARM_STEPS).train()
    callback = _StepCallback(record)
    callback.trainer = _trainer(task, text, work, scratch, mode, steps=task.steps)
    callback.trainer.add_callback(callback)
    callback.trainer.train()
    matrix = torch.ones(SIDE, SIDE)
    record.write(out, lambda: torch.mm(matrix, matrix), task.batch)


def _trainer(task: Task, text: Text, work: Path, scratch: Path, mode: str, *, steps: int) -> _Timed:
    torch.manual_seed(task.seed)
    student, teacher = (
        LlamaForCausalLM.from_pretrained(work / "text" / name, dtype=torch.float32) for name in ("student", "teacher")
    )
    settings = GKDConfig(
        output_dir=str(scratch / "trl"),
        lmbda=0.0,
        beta=0.0,  # KL(teacher || student); GKD's loss always has temperature 1 (`temperature` is for sampling)
        per_device_train_batch_size=task.batch,
        max_steps=steps,
        learning_rate=task.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=task.weight_decay,
        max_grad_norm=0.0,
        train_sampling_strategy=mode,
        length_column_name="length",
        optim="adamw_torch_fused",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=task.seed,
    )
    trainer = _Timed(
        student,
        teacher,
        settings,
        train_dataset=_dataset(text),
        processing_class=_tokenizer(task),
    )
    trainer.losses = []
    return trainer


def _dataset(text: Text) -> Dataset:
    """The rows in the format of GKD's collator for tokenized text, with a mask of the answers."""
    return Dataset.from_dict(
        {
            "prompt": [""] * len(text.ids),
            "input_ids": [row.tolist() for row in text.ids],
            "completion_mask": [
                [0] * int(prompt) + [1] * (len(row) - int(prompt))
                for row, prompt in zip(text.ids, text.prompts, strict=True)
            ],
            "length": text.lengths.tolist(),
        }
    )


def _tokenizer(task: Task) -> PreTrainedTokenizerFast:
    """A tokenizer with a name for every id: the trainer requires one, and the collator its padding token."""
    words = Tokenizer(WordLevel({f"w{n}": n for n in range(task.vocab)}, unk_token="w0"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2", model_max_length=1 << 20
    )
