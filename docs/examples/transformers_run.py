"""
Fine-tune with the Trainer of transformers; kill it, run the same command again, and it goes on.

    python docs/examples/transformers_run.py runs/transformers
    torchrun --nproc-per-node 2 docs/examples/transformers_run.py runs/ranks
"""

import argparse
import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments, set_seed

from ckptman import keep
from ckptman.integrations.transformers import CkptmanTrainer

BLOCK = 32


class Text(torch.utils.data.Dataset):
    """This very file, byte by byte."""

    def __init__(self) -> None:
        with open(__file__, "rb") as file:
            data = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8).long()
        self.rows = data[: len(data) // BLOCK * BLOCK].view(-1, BLOCK)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("root")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--resume", default="auto", choices=["auto", "must", "never", "best"])
    given = parser.parse_args()
    torch.set_num_threads(1)
    set_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=BLOCK, n_embd=64, n_layer=2, n_head=4))
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),  # ckptman writes nothing there
        max_steps=given.steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        save_steps=4,
        eval_strategy="steps",
        eval_steps=4,
        load_best_model_at_end=True,
        logging_steps=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = CkptmanTrainer(
        model,
        arguments,
        train_dataset=Text(),
        eval_dataset=Text(),
        root=given.root,
        keep=keep.last(2),
        resume=given.resume,
    )
    trainer.train()
    if trainer.is_world_process_zero():
        total = sum(weight.detach().double().sum().item() for weight in model.parameters())
        print(
            f"done at step {trainer.state.global_step}, best loss {trainer.state.best_metric}, weights sum to {total}"
        )


if __name__ == "__main__":
    main()
