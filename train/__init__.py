"""Training of a2fpn models with Accelerate: ``accelerate launch train/ --config train/recipes/NAME.yaml``."""
