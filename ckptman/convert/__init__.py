"""
Checkpoints of other tools, in both directions: ``import_checkpoint`` and ``export_checkpoint``.

One room for each format (``torch_file``, ``safetensors_file``, …): it reads a place into components of plain values
and promised bytes (``foreign``), and writes a checkpoint of ours (``stored``) to a place. What is the same for all is
said once: reading pickles without running them (``unpickling``), the way in (``importing``), and out (``exporting``).
"""

from ckptman.convert.exported import Exported
from ckptman.convert.exporting import export_checkpoint
from ckptman.convert.importing import Imported, import_checkpoint

__all__ = ["Exported", "Imported", "export_checkpoint", "import_checkpoint"]
