"""Publishing: ``python -m hub push | card | verify``. What models need to load from the Hub is in :mod:`a2fpn.hub`."""
