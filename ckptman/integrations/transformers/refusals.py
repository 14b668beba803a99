"""What cannot work beside ckptman is refused before anything is trained, with the reason."""

from __future__ import annotations

from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import HubStrategy


def refuse_arguments(args: TrainingArguments) -> None:
    """
    Refuse what *args* ask for and ckptman cannot give.

    Raises:
        ValueError: One sentence for each, and what to do instead.
    """
    reasons = [
        "push_to_hub uploads in the background what the Trainer wrote into its output directory, and ckptman writes "
        "elsewhere: use hub_strategy='end' and trainer.push_to_hub() after training"
        if args.push_to_hub and args.hub_strategy != HubStrategy.END
        else "",
        "enable_jit_checkpoint saves on a signal into the output directory, past ckptman: leave it out, ckptman saves "
        "on SIGTERM itself"
        if getattr(args, "enable_jit_checkpoint", False)
        else "",
        "save_only_model leaves out what a resumed run needs: leave it out, or use save_strategy='no' and "
        "trainer.save_model()"
        if args.save_only_model
        else "",
    ]
    _refuse(reasons)


def refuse_trainer(trainer: Trainer) -> None:
    """
    Refuse a *trainer* whose state is not whole on one rank.

    Raises:
        ValueError: As above.
    """
    marks = {
        "DeepSpeed": "is_deepspeed_enabled",
        "FSDP": "is_fsdp_enabled",
        "FSDP on XLA": "is_fsdp_xla_enabled",
    }
    _refuse(
        f"{name} spreads the state over the ranks in its own format, and this integration saves only what is whole on "
        "every rank (one process, DataParallel, DistributedDataParallel)"
        for name, mark in marks.items()
        if getattr(trainer, mark, False)
    )


def _refuse(reasons: object) -> None:
    found = [reason for reason in reasons if reason]  # type: ignore[attr-defined]
    if found:
        raise ValueError("ckptman: " + "; ".join(found))
