"""Door to :mod:`a2fpn.training`: ``accelerate launch train/ --config NAME data.root=DIR``."""
