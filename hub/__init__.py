"""Door to ``a2fpn hub``: ``python -m hub push | card | convert | verify | backbone``."""
