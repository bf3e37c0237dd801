"""Training of detectors with Accelerate: ``a2fpn train``, ``accelerate launch -m a2fpn.training``."""
