"""The Trainer of transformers with ckptman's checkpoints: one flag resumes a fine-tuning run, bit for bit."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Seq2SeqTrainer, Trainer, TrainerCallback, TrainerControl, TrainingArguments
from transformers.trainer_utils import TrainOutput

from ckptman.errors import IntegrityError
from ckptman.integrations.transformers.choosing import WORDS, Resume, check_resume
from ckptman.integrations.transformers.directory import faults
from ckptman.integrations.transformers.fetching import Fetches, watch
from ckptman.integrations.transformers.parts import put_back_loss, put_back_streams
from ckptman.integrations.transformers.refusals import refuse_arguments, refuse_trainer
from ckptman.integrations.transformers.session import Session
from ckptman.repository import keep as keep_rules
from ckptman.repository.keep import Keep
from ckptman.storage.base import Storage
from ckptman.storage.opening import open_storage

if TYPE_CHECKING:
    from transformers import Trainer as Base
else:
    Base = object


class CkptmanMixin(Base):  # type: ignore[misc]
    """
    Put before any subclass of ``Trainer``: ``class MyTrainer(CkptmanMixin, SFTTrainer): pass``.

    Saves when the ``TrainingArguments`` say so, but into *root* and from the live objects: model, optimizer, scheduler,
    gradient scaler, the Trainer's own state with its callbacks, and the random streams of every rank. ``train()``
    continues the newest intact checkpoint there is, or starts afresh: run the same command again after any kind of end.

    Promised: a resumed run has the weights, moments, schedule, losses, random streams and data order of one that was
    never interrupted, bit for bit, on the same machine with as many processes; what data set and collator draw at
    random included.

    *Not* promised: what data set and collator draw after a resume in mid-epoch, where worker processes do it
    (``dataloader_num_workers``) or the data set is iterable; a state of `Trainer` subclasses beyond what is listed
    here; anything about the output directory, where ckptman writes nothing and deletes nothing.

    Example:
        >>> trainer = CkptmanTrainer(model, args, train_dataset=data, root="runs/a")  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP

    Args:
        *args: For the Trainer.
        root: Where checkpoints lie: a path, a URL, or a storage. A trial of a hyperparameter search has a root of its
            own in it, and never resumes.
        keep: What to retain. None stands for ``args.save_total_limit``, or everything. The newest checkpoint and the
            best one by ``metric_for_best_model`` (tagged ``best``) are always kept.
        resume: ``"auto"``: the newest intact checkpoint, or a fresh start; ``"must"``: no fresh start; ``"never"``: a
            fresh start, in the same root; ``"best"``; or a step. ``train(resume_from_checkpoint=…)`` overrides it:
            with one of these, with True (``"must"``), False (``"never"``), or the path of a directory that a plain
            Trainer wrote.
        lock_timeout: Seconds to wait for another writer to go away.
        storage_options: For the driver of a URL such as ``s3://…``: credentials, ``endpoint_url``.
        **kwargs: For the Trainer.

    Raises:
        ValueError, TypeError: An argument is wrong, or something was asked for that cannot work: pushes to the hub
            while training, just-in-time checkpoints, ``save_only_model``, DeepSpeed, FSDP.
    """

    def __init__(
        self,
        *args: Any,
        root: str | os.PathLike[str] | Storage,
        keep: Keep | None = None,
        resume: Resume = "auto",
        lock_timeout: float = 60.0,
        storage_options: Mapping[str, object] | None = None,
        **kwargs: Any,
    ) -> None:
        given = next((one for one in (*args, *kwargs.values()) if isinstance(one, TrainingArguments)), None)
        if given is not None:
            refuse_arguments(given)  # before the Trainer talks to anybody
        if keep is not None and not isinstance(keep, Keep):
            raise TypeError(f"keep must be a rule such as keep.last(3), got {keep!r}")
        open_storage(root, storage_options=storage_options)  # raises for what is no root
        self._ckptman_root = os.fspath(root) if isinstance(root, os.PathLike) else root
        self._ckptman_storage_options = storage_options
        self._ckptman_keep = keep
        self._ckptman_resume = check_resume(resume)
        self._ckptman_lock_timeout = lock_timeout
        self._ckptman_session: Session | None = None
        self._ckptman_fetches = Fetches()
        super().__init__(*args, **kwargs)
        refuse_trainer(self)
        self.add_callback(_Watching(self))

    def train(
        self,
        resume_from_checkpoint: str | bool | int | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """
        Train, from the checkpoint that *resume_from_checkpoint* or else ``resume`` names. All saves are committed then.

        Raises:
            CheckpointNotFound: There is none such.
            IntegrityError: All checkpoints are damaged, or the directory of a plain Trainer is incomplete.
            StateMismatch: The checkpoint is one of another model, optimizer or schedule. No tensor was touched.
            Preempted: SIGTERM or SIGUSR1 had arrived, and the step is saved. A ``SystemExit`` with code 75.
            SaveFailed, Fenced, LockTimeout, CommitUnknown: From a save, as ``CheckpointManager.save``.
        """
        resume, directory = self._ckptman_wanted(resume_from_checkpoint)
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # it would delete directories at the end
        try:
            with self._ckptman_begin("never" if trial is not None else resume, trial, limit) as session:
                self._ckptman_session = session
                output: TrainOutput = super().train(session.directory or directory, trial, ignore_keys_for_eval)
        finally:
            self._ckptman_session = None
            self.args.save_total_limit = limit
        return output

    def _ckptman_wanted(self, asked: str | bool | int | None) -> tuple[Resume, str | None]:
        """What to resume from: one of ours, or the directory of a plain Trainer."""
        if asked is None:
            return self._ckptman_resume, None
        if isinstance(asked, bool):
            return "must" if asked else "never", None
        if isinstance(asked, int) or asked in WORDS:
            return check_resume(asked), None
        found = faults(asked)
        if found:
            raise IntegrityError(f"{asked} cannot be resumed from: {'; '.join(found)}")
        return "never", asked

    def _ckptman_begin(self, resume: Resume, trial: Any, limit: int | None) -> Session:
        root = self._ckptman_root
        if trial is not None:
            root = _beneath(root, Path(self._get_output_dir(trial)).name)
        keep = self._ckptman_keep
        if keep is None:
            keep = keep_rules.last(limit) if limit and limit > 0 else keep_rules.everything
        storage = open_storage(root, storage_options=self._ckptman_storage_options)
        return Session(storage, resume=resume, keep=keep, lock_timeout=self._ckptman_lock_timeout)

    def _ckptman_on_train_begin(self) -> None:
        """The Trainer has made everything, and has reset its counters of the loss."""
        session = self._ckptman_session
        if session is None:
            return
        if not session.is_open:
            session.open(self)
        session.listen()
        own = session.of_this_rank()
        if own is not None:
            put_back_loss(self, own)
            put_back_streams(own)  # the Trainer asks for them later, but not where no step is left to train
        if session.best_step is not None:
            self.state.best_model_checkpoint = session.name_of_best()

    def _ckptman_on_step_end(self, control: TrainerControl) -> None:
        """A step is done, and is about to be logged, evaluated and saved."""
        session = self._ckptman_session
        if session is not None and session.is_preempted():
            control.should_save = True

    # ------------------------------------------------------------------ what the Trainer asks of itself

    def _ckptman_is_ours(self, checkpoint: str | None) -> bool:
        session = self._ckptman_session
        return session is not None and checkpoint is not None and checkpoint == session.directory

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # a run that was killed after its last save; the Trainer would train one step more before it looks
            self.control.should_training_stop = True
            return
        self._ckptman_begin_epoch(**kwargs)
        super()._run_epoch(*args, **kwargs)

    def _ckptman_begin_epoch(
        self,
        *,
        train_dataloader: Any = None,
        epoch: int = 0,
        epochs_trained: int = 0,
        steps_trained_in_current_epoch: int = 0,
        resume_from_checkpoint: str | None = None,
        **_: Any,
    ) -> None:
        """Watch what the loader fetches; in the epoch that a checkpoint is in the middle of, go on as it would have."""
        is_resumed = epoch == epochs_trained and resume_from_checkpoint is not None and not self.args.ignore_data_skip
        skipped = steps_trained_in_current_epoch if is_resumed else 0
        own = None
        if skipped and self._ckptman_session is not None and self._ckptman_is_ours(resume_from_checkpoint):
            own = self._ckptman_session.of_this_rank()
        self._ckptman_fetches.begin(skipped, own if own is not None and "ahead" in own else None)
        watch(train_dataloader, self._ckptman_fetches.before_batch)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """As the Trainer's; counts what was taken."""
        batches, count = super().get_batch_samples(*args, **kwargs)
        self._ckptman_fetches.take(len(batches))
        return batches, count

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        session = self._ckptman_session
        if session is None or not session.is_open:
            raise ValueError("ckptman saves while train() runs: use save_model() for a model outside of it")
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        session.save(self, self._ckptman_fetches.ahead())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self._ckptman_is_ours(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        session = self._ckptman_session
        if session is None or not self._ckptman_is_ours(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        session.open(self)
        session.restore()

    def _load_scaler(self, checkpoint: str | None) -> None:
        if not self._ckptman_is_ours(checkpoint):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        session = self._ckptman_session
        if session is None or not self._ckptman_is_ours(checkpoint):
            super()._load_rng_state(checkpoint)
            return
        if self._ckptman_fetches.has_continued:
            return
        own = session.of_this_rank()
        if own is not None:
            put_back_streams(own)

    def _load_best_model(self) -> None:
        session = self._ckptman_session
        if session is None or session.best_step is None:
            super()._load_best_model()  # the best one lies in a directory that a plain Trainer wrote
        else:
            session.restore_best()


class _Watching(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Tells the trainer that training begins, and that a step is done: there is no other place to learn it."""

    def __init__(self, trainer: CkptmanMixin) -> None:
        self._trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._trainer._ckptman_on_train_begin()

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        self._trainer._ckptman_on_step_end(control)


class CkptmanTrainer(CkptmanMixin, Trainer):  # type: ignore[misc]
    """``Trainer`` with ckptman's checkpoints. See `CkptmanMixin`."""


class CkptmanSeq2SeqTrainer(CkptmanMixin, Seq2SeqTrainer):  # type: ignore[misc]
    """``Seq2SeqTrainer`` with ckptman's checkpoints. See `CkptmanMixin`."""


def _beneath(root: str | Storage, name: str) -> str:
    if not isinstance(root, str):
        raise TypeError("a hyperparameter search needs a root that is a path or a URL, to put each trial's beneath it")
    return f"{root.rstrip('/')}/{name}"
