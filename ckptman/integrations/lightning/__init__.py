"""
Lightning: checkpoints of ``Trainer`` and ``Fabric`` in a ckptman root.

Example:
    Put `CkptmanCheckpoint` where ``ModelCheckpoint`` was, and resume by the same command::

        trainer = Trainer(callbacks=[CkptmanCheckpoint("runs/a", every_n_train_steps=500)])
        trainer.fit(model, ckpt_path="last")
"""

from ckptman.integrations.lightning.callback import CkptmanCheckpoint
from ckptman.integrations.lightning.paths import resume_path
from ckptman.integrations.lightning.plugin import CkptmanCheckpointIO
from ckptman.integrations.lightning.random_streams import FabricStreams, TrainerStreams

__all__ = ["CkptmanCheckpoint", "CkptmanCheckpointIO", "FabricStreams", "TrainerStreams", "resume_path"]
