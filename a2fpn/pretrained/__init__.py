"""Pretrained weights: the catalog, checkpoint folders, the Hub, model cards and loading."""
